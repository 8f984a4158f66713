"""Lightning without what it would import for nothing, and an end at once: looked at in fresh processes."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import json, sys
from src.training.startup import import_lightning
import_lightning()
import torch
unneeded = ["torchvision", "scipy.signal", "matplotlib", "mlflow"] + ["triton"] * (not torch.cuda.is_available())
after_start = [name for name in unneeded if name in sys.modules]

from src.models.resnet import resnet18
from src.reporting import classification, translation
pictures = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
similarity = translation.metrics.structural_similarity_index_measure(pictures / 255, pictures / 255)
json.dump({
    "after_start": after_start,
    "lightning": "pytorch_lightning" in sys.modules,
    "similarity": float(similarity),
    "resnet": list(resnet18([3, 32, 32], 10)(torch.zeros(2, 3, 32, 32)).shape),
}, sys.stdout)
"""


def test_lightning_starts_without_torchvision_and_scipy_signal_and_all_that_is_used_works_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"after_start": [], "lightning": True, "similarity": 1.0, "resnet": [2, 10]}


HELD = """
import json, sys
from src.common.hardware import hand_back_memory, keep_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

keep_memory()
import torch
found = [resident()]
small = [torch.ones(2**19) for _ in range(200)]  # of 2 MiB each
end = torch.ones(2**10)
found.append(resident())
del small
found.append(resident())
hand_back_memory()
found.append(resident())
json.dump(found, sys.stdout)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's memory alone is held and handed back")
def test_freed_memory_is_kept_until_it_is_handed_back() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, held, freed, handed_back = json.loads(done.stdout)
    assert held > before + 390
    assert freed > held - 10
    assert handed_back < before + 10


ENDING = """
import atexit, threading, time
from src.training.startup import leave

class Part:
    def __del__(self): print("taken apart")

part = Part()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
print("stage")
leave()
"""


def test_a_process_leaves_after_its_threads_and_what_is_registered_and_is_not_taken_apart() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["stage", "thread", "registered", ""]

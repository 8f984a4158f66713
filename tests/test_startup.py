"""Lightning without what it would import for nothing: looked at in a fresh process, since imports stay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import json, sys
from src.training.startup import import_lightning
import_lightning()
after_start = [name for name in ("torchvision", "scipy.signal", "matplotlib", "mlflow") if name in sys.modules]

import torch
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

"""Plants faults in the code, one at a time, and runs the tests that should notice them.

    nice -n 19 python -m verification.mutants              every fault of verification/mutants.toml
    nice -n 19 python -m verification.mutants gan schedule those whose file or description holds one of these words

Works in a copy of the tree, uncommitted changes included. Each selection of tests must pass without a fault first. Exit
codes: 0 every fault was noticed, 1 one was not, or the table does not fit the code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from src.common.errors import Failure
from src.common.git import git
from src.common.paths import ROOT

TABLE = ROOT / "verification" / "mutants.toml"
TIMEOUT_S = 300
PASSED, FAILED, USAGE_ERROR, NO_TESTS = 0, 1, 4, 5  # pytest's exit codes
PRELOADED = ("torch", "pytorch_lightning", "torchmetrics", "torchvision", "optuna", "mlflow", "onnx", "hydra", "pytest")


@dataclass(frozen=True)
class Fault:
    """A fault: `old` in a file is replaced by `new`, and one of the `tests`, pytest's node ids, must fail."""

    file: str
    fault: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def title(self) -> str:
        """What a reader of a list sees."""
        return f"{self.file}: {self.fault}"


def read_faults(table: Path = TABLE) -> list[Fault]:
    """The faults of the table."""
    content = tomllib.loads(table.read_text())
    return [
        Fault(file, entry["fault"], entry["old"], entry["new"], tuple(entry["tests"].split()))
        for file, entries in content.items()
        for entry in entries
    ]


def mismatches(faults: Sequence[Fault], root: Path = ROOT) -> Iterator[str]:
    """Where the table does not fit the code: an old text that is not there exactly once, a test that is gone."""
    for fault in faults:
        path = root / fault.file
        count = path.read_text().count(fault.old) if path.is_file() else 0
        if count != 1:
            yield f"{fault.title}: the old text occurs {count} times, not once"
        if fault.old == fault.new:
            yield f"{fault.title}: the new text is the old one"
        for test in fault.tests:
            file, _, name = test.partition("::")
            if not (root / file).is_file() or f"def {name}(" not in (root / file).read_text():
                yield f"{fault.title}: there is no test {test}"


def plant(fault: Fault, root: Path) -> bool:
    """Runs the fault's tests with the fault in a tree, and takes it out again; returns whether they noticed it."""
    path = root / fault.file
    original = path.read_text()
    path.write_text(original.replace(fault.old, fault.new))
    try:
        return _run(fault.tests, root) != PASSED
    finally:
        path.write_text(original)


def _run(tests: Sequence[str], root: Path) -> int:
    """pytest's exit code, in a fork of this process; a run that does not end within the time limit has failed.

    Raises:
        Failure: there is no such test.
    """
    pid = os.fork()
    if not pid:
        _become_pytest(tests, root)
    deadline = time.monotonic() + TIMEOUT_S
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return FAILED
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(ended[1])
    if code in (USAGE_ERROR, NO_TESTS):
        raise Failure(f"pytest {' '.join(tests)}: exit code {code}, no such test")
    return code


def _become_pytest(tests: Sequence[str], root: Path) -> NoReturn:
    """Runs tests of a copy in this process, in which of the repository's modules none may be imported yet."""
    import pytest

    for name in list(sys.modules):
        if name.partition(".")[0] in ("src", "tests", "verification"):
            del sys.modules[name]
    sys.path[:] = [str(root), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.dont_write_bytecode = True  # it is valid for a second: a fault that has been taken out would be run
    os.chdir(root)
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    code: int = FAILED
    try:
        code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))
    finally:
        os._exit(code)


def _copy(target: Path) -> None:
    """Copies the tree, without what git ignores, into a repository of its own."""
    for name in git("ls-files", "-co", "--exclude-standard").splitlines():
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    identity = ("-c", "user.name=mutants", "-c", "user.email=mutants@example.invalid")
    for words in (("init", "--quiet"), ("add", "."), (*identity, "commit", "--quiet", "-m", "as tested")):
        git(*words, cwd=target)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m verification.mutants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="only faults whose file or description holds one")
    words = parser.parse_args().words
    faults = [fault for fault in read_faults() if not words or any(word in fault.title for word in words)]
    if faulty := list(mismatches(faults)):
        sys.exit("\n".join(["mutants: the table does not fit the code", *faulty]))
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in PRELOADED:  # once, for all forks
        importlib.import_module(module)
    unnoticed: list[Fault] = []
    passing: dict[tuple[str, ...], bool] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        _copy(Path(folder))
        for fault in faults:
            if fault.tests not in passing:
                passing[fault.tests] = _run(fault.tests, Path(folder)) == PASSED
            if not passing[fault.tests]:
                sys.exit(f"mutants: {' '.join(fault.tests)} fails without a fault")
            is_noticed = plant(fault, Path(folder))
            unnoticed += [] if is_noticed else [fault]
            print(f"{'noticed' if is_noticed else 'UNNOTICED':9}  {fault.title}", flush=True)
    print(f"{len(faults) - len(unnoticed)} of {len(faults)} faults were noticed")
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()

"""Edits a repository, one change at a time, and asks DVC which stages would run again: `python -m tests.reruns`.

Runs in the root of a clone whose pipeline is up to date. Reads a JSON list of [file, old, new] from stdin and prints a
JSON list of {"stages": [...], "training": {experiment: key}}; `training` holds the key under which an unfinished
training is resumed. Each edit is applied in a forked child, so that nothing of src/ stays imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

Edit = tuple[str, str, str]
COMPOSED = ("data/*.yaml", "experiments/*/config.yaml", "experiments/*/code.yaml")


def after(edit: Edit) -> dict[str, Any]:
    """The stages that would run again after an edit, and the keys of the experiments' trainings."""
    path, old, new = Path(edit[0]), edit[1].encode(), edit[2].encode()
    before = path.read_bytes()
    assert old in before, f"{path} does not hold {edit[1]!r}"
    inode = path.stat()
    path.unlink()  # a link into DVC's cache
    path.write_bytes(before.replace(old, new, 1))
    try:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reading)
            with contextlib.redirect_stdout(io.StringIO()), os.fdopen(writing, "w") as pipe:
                pipe.write(json.dumps(_asked()))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            answer: dict[str, Any] = json.loads(pipe.read())
        os.waitpid(child, 0)
        return answer
    finally:
        path.unlink()
        path.write_bytes(before)
        os.utime(path, ns=(inode.st_atime_ns, inode.st_mtime_ns))


def _asked() -> dict[str, Any]:
    import yaml
    from dvc.repo import Repo

    from src import compose
    from src.data import packed
    from src.training.checkpoints import identity

    sys.argv = ["compose"]
    compose.main()
    params = yaml.safe_load(Path("params.yaml").read_text())
    configs = {name: compose.compose_experiment(params, name) for name in params["run"]}
    keys = {name: identity(config, packed.read_meta(config.processed)["splits"]) for name, config in configs.items()}
    with Repo() as repo:
        changed = sorted(stage for stage in repo.status() if not stage.startswith("compose"))
    return {"stages": changed, "training": keys}


def main() -> None:
    """The command."""
    edits = json.load(sys.stdin)
    import pytorch_lightning  # noqa: F401  (once, before the forks)
    from dvc.repo import Repo

    with Repo() as repo:
        repo.status()
    composed = {path: path.read_bytes() for pattern in COMPOSED for path in Path().glob(pattern)}
    answers = []
    for edit in edits:
        answers.append(after(edit))
        for path, content in composed.items():
            path.write_bytes(content)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()

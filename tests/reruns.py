"""Edits a repository and asks DVC which stages would run again: `python -m tests.reruns`.

Runs in the root of a clone whose pipeline is up to date. Reads a JSON list of changes from stdin, each a list of edits
[file, old, new], and prints a JSON list of {"stages": [...], "training": {experiment: key}}; `training` holds the key
under which an unfinished training is resumed. Each change is applied alone, and composed in a forked child, so that
nothing of src/ stays imported.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

Edit = tuple[str, str, str]
COMPOSED = ("data/*.yaml", "experiments/*/config.yaml", "experiments/*/code.yaml")


@contextlib.contextmanager
def applied(edit: Edit) -> Iterator[None]:
    """Replaces the first `old` in a file while the block runs; afterwards the file is as before, its time included."""
    path, old, new = Path(edit[0]), edit[1].encode(), edit[2].encode()
    before, times = path.read_bytes(), path.stat()
    assert old in before, f"{path} does not hold {edit[1]!r}"
    path.unlink()  # a link into DVC's cache
    path.write_bytes(before.replace(old, new, 1))
    try:
        yield
    finally:
        path.unlink()
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def after(edits: list[Edit]) -> dict[str, Any]:
    """The stages that would run again after the edits, and the keys of the experiments' trainings."""
    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.enter_context(applied(edit))
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reading)
            with contextlib.redirect_stdout(io.StringIO()), os.fdopen(writing, "w") as pipe:
                pipe.write(json.dumps(_answer()))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            answer: dict[str, Any] = json.loads(pipe.read())
        os.waitpid(child, 0)
        return answer


def _answer() -> dict[str, Any]:
    import yaml
    from dvc.repo import Repo

    from src import compose
    from src.configuration import composing
    from src.data import packed
    from src.training.checkpoints import identity
    from src.training.start import digests

    once = functools.cache(lambda overrides: composing.compose(list(overrides)))
    # Several files hold the same configuration.
    mock.patch.object(compose, "compose", lambda overrides: once(tuple(overrides))).start()
    sys.argv = ["compose"]
    compose.main()
    params = yaml.safe_load(Path("params.yaml").read_text())
    configs = {name: compose.compose_experiment(params, name) for name in params["run"]}
    keys = {
        name: identity(config, packed.read_meta(config.processed)["splits"], digests(config))
        for name, config in configs.items()
    }
    with Repo() as repo:
        changed = sorted(stage for stage in repo.status() if not stage.startswith("compose"))
    return {"stages": changed, "training": keys}


def main() -> None:
    """The command."""
    changes = json.load(sys.stdin)
    import pytorch_lightning  # noqa: F401  (once, before the forks)
    from dvc.repo import Repo

    with Repo() as repo:
        repo.status()
    composed = {path: path.read_bytes() for pattern in COMPOSED for path in Path().glob(pattern)}
    answers = []
    for edits in changes:
        answers.append(after(edits))
        for path, content in composed.items():
            path.write_bytes(content)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()

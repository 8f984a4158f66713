"""Where the repository, its configuration and its record of runs lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CONF = ROOT / "conf"


def _outer_repository(root: Path) -> Path:
    """The repository whose copy, made by `dvc exp run --temp` or `--queue`, is `root`; of any other root, itself."""
    for folder in root.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return root


# What outlives DVC's temporary copies of the repository: the MLflow store, the journals, the checkpoints.
RECORD_ROOT = _outer_repository(ROOT)
WORK = RECORD_ROOT / "experiments" / ".work"  # unfinished runs and unsent journals


def sqlite_address(database: Path) -> str:
    """The SQLAlchemy URL of an SQLite file, whatever characters its folders' names have.

    With the driver's name where characters are escaped: MLflow (3.17) makes the folders of `sqlite:///` unescaped.
    """
    escaped = str(database).replace("%", "%25").replace("?", "%3F")
    return f"sqlite{'' if escaped == str(database) else '+pysqlite'}:///{escaped}"


def input_path(name: str) -> Path:
    """A path that the user gave; a relative one is looked up in the working folder, then in the outer repository."""
    path = Path(name).expanduser()
    return path if path.exists() else RECORD_ROOT / path if RECORD_ROOT != ROOT else path

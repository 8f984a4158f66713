"""Answers `python src/NAME.py`, for which Python finds this file in place of the package `src`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "src":
    script, root = Path(sys.argv[0]), Path(__file__).parent.parent
    sys.exit(f"{script} is a module of the package src: run `python -m src.{script.stem} ...` in {root}")

"""Sends to MLflow what it could not be told while a run was under way: the server was down, or the run was killed.

python -m src.sync
"""

from __future__ import annotations

import argparse
import sys

from src.common.paths import ROOT


def main() -> None:
    """The command; exits with 1 while something is still unsent."""
    argparse.ArgumentParser(
        prog="python -m src.sync", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    from src.tracking.tracker import send_unsent

    report = send_unsent(ROOT / "experiments" / ".work")
    for problem in report.problems:
        print(problem, file=sys.stderr)
    print(f"{report.sent} records sent, {report.unsent} still unsent")
    sys.exit(1 if report.unsent else 0)


if __name__ == "__main__":
    main()

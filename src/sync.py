"""Sends the records that MLflow did not get during a run, because the server was down or the run was killed.

python -m src.sync
"""

from __future__ import annotations

import argparse
import sys

from src.common.console import console
from src.common.paths import WORK


def main() -> None:
    """The command; exits with 1 while records are unsent."""
    argparse.ArgumentParser(
        prog="python -m src.sync", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    from src.tracking.tracker import send_unsent

    report = send_unsent(WORK)
    for problem in report.problems:
        console.error(problem)
    console.print(f"{report.sent} records sent, {report.unsent} still unsent")
    sys.exit(1 if report.unsent else 0)


if __name__ == "__main__":
    main()

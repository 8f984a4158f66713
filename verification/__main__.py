"""Verifies the claims on reproducibility: trains in every way that the documentation names, and compares digests.

    python -m verification                    the experiments that params.yaml runs, a few real steps each
    python -m verification imdb_lstm          one experiment
    python -m verification --pipeline         also `dvc repro --force` twice

Everything runs in a scratch worktree of this repository, uncommitted changes included. Exit codes: 0 all claims hold,
1 a claim does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from src.common.errors import Failure
from src.common.git import worktree
from src.common.paths import CONF
from src.configuration.params import read_params
from verification.claims import Claim, experiment_claims, pipeline_claim

VERDICTS = {True: "holds", False: "BROKEN", None: "-"}


def claims(experiments: Sequence[str], with_pipeline: bool) -> Iterator[Claim]:
    """Every claim, in a worktree that is removed at the end."""
    from src.tracking.provenance import dirty_patch

    with worktree("HEAD", dirty_patch()) as folder:
        if with_pipeline:
            yield pipeline_claim(folder)
        for name in experiments:
            yield from experiment_claims(name, folder)


def main() -> None:
    """The command."""
    names = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
    parser = argparse.ArgumentParser(
        prog="python -m verification", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "experiments",
        nargs="*",
        choices=[*names, []],
        metavar="NAME",
        help=f"any of {', '.join(names)}; default: those that params.yaml runs",
    )
    parser.add_argument("--pipeline", action="store_true", help="also `dvc repro --force` twice, ten minutes")
    arguments = parser.parse_args()
    all_hold = True
    try:
        experiments = arguments.experiments or list(read_params()["run"])
        for claim in claims(experiments, arguments.pipeline):
            print(f"{claim.experiment:18} {claim.text:48} {VERDICTS[claim.holds]:7} {claim.detail}", flush=True)
            all_hold &= claim.holds is not False
    except Failure as error:
        print(f"verify failed: {error}", file=sys.stderr)
        sys.exit(1)
    print("all claims hold" if all_hold else "a claim does not hold")
    sys.exit(0 if all_hold else 1)


if __name__ == "__main__":
    main()

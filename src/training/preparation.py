"""The data that a run asks for: found where it lies, or made."""

from __future__ import annotations

import subprocess
import sys

from filelock import FileLock

from src.common.errors import Failure
from src.common.identity import fingerprint
from src.common.paths import ROOT
from src.configuration.composing import write_resolved
from src.configuration.schema import Config, DataConfig, plain
from src.data import packed


def prepared(config: Config) -> Config:
    """The configuration with the folder of the data that it asks for.

    That is DVC's, if it was packed with this very configuration. Otherwise the run's own, in data/direct/, which is
    made by the download and preprocess stages where it is not there: what DVC made is never overwritten by a direct
    run.

    Raises:
        Failure: a stage failed; it has said why.
    """

    def fits(candidate: Config) -> bool:
        folder = candidate.processed
        return (folder / "meta.json").is_file() and packed.read_meta(folder)["config"] == config.packing

    if fits(config):
        return config
    own = config.model_copy(update={"data_folder": f"data/direct/{fingerprint(config.packing)[:8]}"})
    folder = ROOT / own.data_folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not fits(own):
            write_resolved(folder / "config.yaml", {key: plain(getattr(own, key)) for key in DataConfig.model_fields})
            for stage in ("download", "preprocess"):
                command = [sys.executable, "-m", f"src.{stage}", "-cp", str(folder), "-cn", "config"]
                if subprocess.run(command, cwd=ROOT).returncode:
                    raise Failure(f"the data of {config.data.name} could not be prepared: {stage} failed, see above")
    return own

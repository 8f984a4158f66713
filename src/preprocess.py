"""Stage `preprocess`: from the raw archive to packed splits, with a validation part drawn from the training data.

python -m src.preprocess -cp ../data -cn cifar10    (what DVC runs)
"""

from __future__ import annotations

import json

from src.common.files import sha256_of
from src.configuration.command import main
from src.configuration.schema import DataConfig
from src.data import packed
from src.data.fetching.files import SourceError


def preprocess(config: DataConfig) -> None:
    """Packs the raw archive.

    Raises:
        SourceError: the archive is missing, changed since it was downloaded, or does not hold what it should.
    """
    raw, folder = config.raw, config.processed
    note = raw / "source.json"
    if not note.is_file():
        raise SourceError(f"{note} is missing: run `dvc repro`, or the download stage, first")
    source = json.loads(note.read_text())
    archive = raw / source["archive"]
    if not archive.is_file() or sha256_of(archive) != source["sha256"]:
        raise SourceError(f"{archive} is missing or damaged: delete {raw} and run `dvc repro`")
    meta = packed.write(config.data().pack(archive), folder, config=config.packing, source=source)
    counts = ", ".join(f"{split} {facts['examples']}" for split, facts in meta["splits"].items())
    print(f"{config.data.name}: {counts}", flush=True)
    for where, count in meta["duplicates"].items():
        if count:
            print(
                f"{config.data.name}: {count} duplicates {'between' if '/' in where else 'within'} {where}", flush=True
            )


if __name__ == "__main__":
    main(preprocess, DataConfig)()

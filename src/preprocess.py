"""Stage `preprocess`: from the raw archive to packed splits, with a validation part drawn from the training data.

python -m src.preprocess -cp ../data -cn cifar10    (what DVC runs)
"""

from __future__ import annotations

from src.configuration.command import main
from src.configuration.schema import DataConfig
from src.data.packing import pack_splits
from src.data.raw import verified_archive


def preprocess(config: DataConfig) -> None:
    """Packs the raw archive.

    Raises:
        SourceError: the archive is missing, changed since it was downloaded, or does not hold what it should.
        PackedError: a split has no example.
    """
    pack_splits(config, *verified_archive(config))


if __name__ == "__main__":
    main(preprocess, DataConfig)()

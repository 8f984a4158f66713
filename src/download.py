"""Stage `download`: the raw archive, verified, and a note of where it came from.

python -m src.download -cp ../data -cn cifar10      (what DVC runs, on the file that compose wrote)
python -m src.download +experiment=cifar10_resnet profile=full data.archive=~/Downloads/cifar-10-binary.tar.gz
"""

from __future__ import annotations

from src.configuration.command import main
from src.configuration.schema import DataConfig
from src.data.fetching.obtaining import obtain_archive


def download(config: DataConfig) -> None:
    """Puts the archive and `source.json` into the raw folder.

    Raises:
        ConfigError: the profile has no source for this data set.
        SourceError: the archive can't be had, or is not what its checksum says.
    """
    note = obtain_archive(config)
    size = f"{note['bytes'] / 1e6:.1f} MB"
    print(f"{config.data.name}: {note['archive']}, {size} from {note['origin']}, sha256 {note['sha256']}", flush=True)


if __name__ == "__main__":
    main(download, DataConfig)()

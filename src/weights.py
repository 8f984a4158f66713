"""Stage `weights`: the weights that an experiment's training begins with, if it begins with any.

python -m src.weights -cp ../experiments/cifar10_resnet -cn config      (what DVC runs)
"""

from __future__ import annotations

from src.configuration.command import main
from src.configuration.schema import Config


def weights(config: Config) -> None:
    """Puts pretrained weights and those of `init_from` into the folder `weights/` of the run, with `source.json`.

    Raises:
        SourceError: pretrained weights can't be had, or are not what their checksum says.
        Failure: the earlier run is unknown, or its weights are damaged.
    """
    from src.training.start import obtain_weights

    note = obtain_weights(config)
    lines = [f"{part}: {facts}" for part, facts in note.items() if isinstance(facts, dict)]
    print("\n".join(lines) or f"{config.name} begins with random weights", flush=True)


if __name__ == "__main__":
    main(weights)()

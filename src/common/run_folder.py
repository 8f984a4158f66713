"""The layout of a run's folder: the one place that knows which file of a run lies where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The folder that the stages of one run write to."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, on which evaluate and export are called."""
        return self.path / "config.yaml"

    @property
    def lock(self) -> Path:
        """The folder of the lock against a second training into the same folder."""
        return self.path / ".held"

    # --- train --------------------------------------------------------------------------------------------------------

    @property
    def train(self) -> Path:
        """The folder of everything that train writes for DVC."""
        return self.path / "train"

    @property
    def weights(self) -> Path:
        """The trained weights."""
        return self.train / "model.safetensors"

    @property
    def model_note(self) -> Path:
        """The weights' sha256 and how they came about; written last, so it marks a complete training."""
        return self.train / "model.json"

    @property
    def train_metrics(self) -> Path:
        """The metrics of the epoch whose weights are kept."""
        return self.train / "metrics.json"

    @property
    def history(self) -> Path:
        """A row of metrics for each epoch."""
        return self.train / "history.csv"

    @property
    def progress(self) -> Path:
        """The folder of the pictures drawn during training, one per validation."""
        return self.path / "progress"

    @property
    def training_time(self) -> Path:
        """The training's seconds, with the weights' sha256: not DVC's, as they differ from run to run."""
        return self.path / "training_time.json"

    # --- evaluate -----------------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> Path:
        """The metrics on the test split."""
        return self.path / "metrics.json"

    @property
    def confusion(self) -> Path:
        """Pairs of actual and predicted class, for DVC's confusion plot."""
        return self.path / "confusion.csv"

    @property
    def evaluation(self) -> Path:
        """The folder of evaluate's pictures and tables."""
        return self.path / "evaluation"

    # --- export -------------------------------------------------------------------------------------------------------

    @property
    def export(self) -> Path:
        """The folder of the exported model."""
        return self.path / "export"

    @property
    def latency_table(self) -> Path:
        """The measured latencies; beside DVC's outputs, since times differ from run to run."""
        return self.path / "latency.md"

    @property
    def latency_plot(self) -> Path:
        """The measured latencies as a picture."""
        return self.path / "latency.png"

"""The base of all models: what a stage may ask of one, its epoch's means, and the state that a resumed epoch needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from src.configuration.schema import Optimizer, Schedule
from src.models.optimization import build_optimizer, build_schedule
from src.models.step_graphs import StepGraphs

Split = Literal["train", "val"]


class Model(LightningModule):
    """Base LightningModule: means over an epoch, kept on the device and saved in checkpoints.

    `train` and `val` name the means. Each has a row in the float64 buffers `train_sums` and `val_sums` [means, 2]: a
    total and the number of examples that it is over. They are read once an epoch: a `self.log` at each step costs
    200 us. `report` logs them as SPLIT_NAME.

    A figure that is no mean, such as F1 over entities or mean average precision, is a torchmetrics `Metric` assigned
    to an attribute: update it in the step, log its `compute()` and `reset()` it at the epoch's end. Its state is part
    of a checkpoint, as `train_sums` is, each process's own.

    Class attributes that composition reads from the source: `task`, a file in src/tasks/, and `takes`, the kinds of
    data that the model trains on, where that is fewer than its task takes.
    """

    task: ClassVar[str]
    takes: ClassVar[tuple[str, ...]]

    # Whether batches differ in shape: each shape would be compiled, and captured as a graph, anew.
    varies_in_shape: ClassVar[bool] = False

    # The library of the pretrained network, for models with a section of the configuration that names one.
    library: ClassVar[Literal["timm", "transformers"]]

    # The config.json of the pretrained network, where the model has one: it is built by it, and it is kept beside the
    # trained weights.
    architecture: Mapping[str, Any] | None = None

    gradient_clip: float | None = None  # a norm, where a step is not taken by Lightning
    step_graphs: StepGraphs | None = None  # takes the training steps, on a GPU

    def __init__(self, *, optimizer: Optimizer, schedule: Schedule, train: Sequence[str], val: Sequence[str]) -> None:
        super().__init__()
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.means: dict[Split, tuple[str, ...]] = {"train": tuple(train), "val": tuple(val)}
        self.register_buffer("train_sums", torch.zeros(len(train), 2, dtype=torch.float64), persistent=False)
        self.register_buffer("val_sums", torch.zeros(len(val), 2, dtype=torch.float64), persistent=False)
        self.train_sums: Tensor
        self.val_sums: Tensor
        # Each process's own: DDP would overwrite them with the first one's before each step.
        self._ddp_params_and_buffers_to_ignore = ["train_sums", "val_sums"]

    # --- what stages ask of a model ---

    # What a caller of the exported model gets for a batch of inputs: one output, or several.
    answer: Callable[..., Tensor | tuple[Tensor, ...]]

    def prepare(self, split: Mapping[str, Tensor]) -> None:
        """Sees the packed training split before the first step of a run; does nothing unless a model needs it."""

    def load_pretrained(self, folder: Path) -> None:
        """Takes over the weights of a pretrained network, in a folder as src/data/fetching/pretrained.py makes it.

        Raises:
            Failure: they are of another network.
        """
        raise NotImplementedError

    def compiled_parts(self) -> Iterable[nn.Module]:
        """The modules that `trainer.compile` compiles: the networks, or the parts of one that is not called itself."""
        for network in self.children():
            if isinstance(network, Metric):
                continue
            if type(network).forward is nn.Module.forward:
                yield from network.children()
            else:
                yield network

    @staticmethod
    def onnx_operators() -> dict[Any, Callable[..., Any]]:
        """The model's custom operators in ONNX, as torch.onnx.export's `custom_translation_table`."""
        return {}

    # --- a training step ---

    def step_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The loss of a training batch, a scalar; adds to the epoch's means."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor | None:
        """The loss, or None where a graph has taken the whole step."""
        if self.step_graphs is not None:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            step = partial(self._complete_step, optimizer=optimizer)
            self.log_losses(batch_idx, **self.step_graphs.take(step, batch, [optimizer]))
            return None
        loss = self.step_loss(batch)
        self.log_losses(batch_idx, loss=loss)
        return loss

    def _complete_step(self, batch: tuple[Tensor, ...], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        optimizer.zero_grad()
        loss = self.step_loss(batch)
        with torch.autocast(self.device.type, enabled=False):  # as in Lightning, where it covers the loss alone
            loss.backward()
            if self.gradient_clip is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.gradient_clip)
            optimizer.step()
        return {"loss": loss}

    # --- means over an epoch ---

    def add(self, split: Split, count: int | Tensor, **totals: Tensor) -> None:
        """Adds totals over `count` examples, scalars, to means that stand next to each other in `means[split]`."""
        first = self.means[split].index(next(iter(totals)))
        rows = slice(first, first + len(totals))  # a slice: an index would be copied to the device at each step
        if self.means[split][rows] != tuple(totals):
            raise ValueError(f"{', '.join(totals)} are no neighbours in {', '.join(self.means[split])}")
        sums = self.train_sums if split == "train" else self.val_sums
        sums[rows, 0] += torch.stack([total.detach() for total in totals.values()])
        sums[rows, 1] += count

    def report(self, split: Split) -> dict[str, float]:
        """Logs and returns the epoch's means over all processes; they start again from zero."""
        sums = self.train_sums if split == "train" else self.val_sums
        totals: Tensor = self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        sums.zero_()
        rows = zip(self.means[split], totals.tolist(), strict=True)
        means = {f"{split}_{name}": total / max(1, count) for name, (total, count) in rows}
        self.log_dict(means)
        return means

    def log_losses(self, batch_idx: int, **losses: Tensor) -> None:
        """Logs a step's losses, every `trainer.log_every` steps."""
        if batch_idx % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set at run time
            # Manual optimization steps several optimizers: what the first process logs is its own.
            self.log_dict(losses, on_step=True, on_epoch=False, sync_dist=self.automatic_optimization)

    def on_validation_epoch_start(self) -> None:
        self.val_sums.zero_()

    def on_train_epoch_end(self) -> None:
        self.report("train")
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_epoch_end(self) -> None:
        self.report("val")

    # --- the state of an interrupted epoch ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        every = self.trainer.strategy.all_gather(self.train_sums)
        checkpoint["train_sums"] = every.view(self.trainer.world_size, *self.train_sums.shape).cpu()
        if metrics := self.epoch_metrics():
            checkpoint["train_metrics"] = self._of_all_processes(
                {name: {key: _on_cpu(value) for key, value in metric.metric_state.items()} for name, metric in metrics}
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.train_sums.copy_(checkpoint["train_sums"][self.trainer.global_rank])
        for name, metric in self.epoch_metrics():
            for key, value in checkpoint["train_metrics"][self.trainer.global_rank][name].items():
                setattr(metric, key, _on_device(value, metric.device))
            metric._update_count += 1  # or `compute` warns that nothing was gathered; torchmetrics 1.9

    def epoch_metrics(self) -> list[tuple[str, Metric]]:
        """The figures of an epoch that are no means, by name."""
        return [(name, part) for name, part in self.named_modules() if isinstance(part, Metric)]

    def _of_all_processes(self, state: Any) -> list[Any]:
        """One process's state, ragged or not, as a list over all processes."""
        states = [state] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(states, state)
        return states

    # --- optimization ---

    def rate_factors(self) -> Mapping[nn.Parameter, float]:
        """Parameters whose learning rate is a multiple of the optimizer's; those not named have the optimizer's."""
        return {}

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer([self], self.optimizer_config, self.rate_factors())
        schedule = build_schedule(optimizer, self.schedule_config, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _on_cpu(state: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """A copy of a metric's state."""
    return [part.detach().cpu().clone() for part in state] if isinstance(state, list) else state.detach().cpu().clone()


def _on_device(state: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    return [part.to(device) for part in state] if isinstance(state, list) else state.to(device)

"""One GPU, in under nine minutes: accuracy and seconds beside the public record code, speed, and the same bits twice.

Each part runs in a process of its own and ends at its limit, most valuable first. With `--archives FOLDER` it takes the
official archives from there; without, the sample data, whose accuracies say nothing. On a machine without a GPU the
same code runs on the CPU: with `profile=sample` and small networks, to see that it works.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil

from benchmarks.setting import Setting
from benchmarks.table import Figure, Target, at_least, at_most
from benchmarks.timing import spread
from src.common.errors import Failure

LAST_COLUMNS = re.compile(r"eval\s*\|.*\|\s*(?P<accuracy>[\d.]+)\s*\|\s*(?P<seconds>[\d.]+)\s*\|")
FIRST_STEPS, STEPS = 5, 20  # not looked at, looked at
TOTAL_S = 530.0  # of all parts
EXPERIMENT = "cifar10_resnet_gpu"


@dataclass(frozen=True)
class Part:
    """A part: what it measures, and the seconds after which it is ended."""

    measure: Callable[[Setting], list[Figure]]
    limit_s: float


def measure(setting: Setting) -> list[Figure]:
    """All parts, each in a process of its own; a line on stderr for one that failed or was ended."""
    figures = []
    deadline = time.perf_counter() + TOTAL_S
    for name, part in PARTS.items():
        started = time.perf_counter()
        try:
            figures += in_process(part.measure, setting, limit_s=min(part.limit_s, max(0.0, deadline - started)))
        except Failure as error:
            print(f"gpu, {name}: {error}", file=sys.stderr, flush=True)
        print(f"gpu, {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return figures


def in_process(function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
    """What the function returns in a new process, which ends with all that it has started.

    Raises:
        Failure: it raised, died, or was ended after `limit_s` seconds.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            raise Failure(f"ended after {limit_s:.0f} s")
        result = receiver.recv()
    except EOFError:
        process.join()
        raise Failure(f"died with exit code {process.exitcode}") from None
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for descendant in psutil.Process(process.pid).children(recursive=True):
                descendant.kill()
        process.kill()
        process.join()
    if isinstance(result, Exception):
        raise Failure(f"{type(result).__name__}: {result}") from result
    return result


def _send_result(sender: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        sender.send(function(*arguments))
    except (Exception, SystemExit) as error:
        sender.send(RuntimeError(f"{type(error).__name__}: {error}"))


# --- trainings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A training: its seconds without the warm-up, the test split's accuracy by `evaluation.tta`, digests."""

    seconds: float
    epochs: int
    accuracy: Mapping[str, float]
    digests: tuple[str, str]  # of the weights, of the optimizers' state


def train(
    setting: Setting, experiment: str, *overrides: str, callbacks: Sequence[Any] = (), is_evaluated: bool = False
) -> Result:
    """A training as `src.train` does it, without MLflow and files.

    `is_evaluated`: its accuracy is measured with the configured views of each picture, and without.
    """
    from src.common.hardware import device_of
    from src.data import packed
    from src.data.batching import batches
    from src.data.preparing import prepared
    from src.tasks.classification import probabilities
    from src.training import determinism, run
    from src.training.start import with_weights

    config = with_weights(prepared(setting.real(experiment, *overrides)))
    determinism.fix(config.seed, config.trainer.threads)
    meta = packed.read_meta(config.processed)
    work = run.work_folder(config, meta, setting.folder / "work")
    trained = run.fit(config, meta, work, lambda metrics, step: None, callbacks)
    model: Any = trained.model
    digests = (determinism.sha256_of_state(model.state_dict()), trained.optimizer_sha256)
    accuracy = {}
    if is_evaluated:
        options: Any = config.evaluation
        device = device_of(config.trainer.accelerator)
        test = batches(config.processed, "test", config.loader, train=False).to(device)
        model.to(device).eval()
        for tta in dict.fromkeys((options.tta, "none")):
            probability, labels, _ = probabilities(model, test, tta=tta)
            accuracy[tta] = float((probability.argmax(1) == labels).float().mean())
    return Result(trained.history.seconds, len(trained.history.rows), accuracy, digests)


def classification(
    setting: Setting, experiment: str, *overrides: str, target: Target | None = None, label: str = ""
) -> list[Figure]:
    """Seconds and accuracies of a classifier over `setting.rounds` seeds."""
    label = label or experiment
    results = [
        train(setting, experiment, *overrides, f"seed={seed}", is_evaluated=True) for seed in range(setting.rounds)
    ]
    figures = [Figure(label, f"training, {results[0].epochs} epochs", spread([r.seconds for r in results]), "s")]
    for tta in results[0].accuracy:  # the configured one first, which has the target
        values = spread([100 * result.accuracy[tta] for result in results])
        name = "accuracy" if tta == "none" else f"accuracy, {tta}"
        figures.append(Figure(label, name, values, "%", target))
        target = None
    return figures


def record(setting: Setting) -> list[Figure]:
    """The public record code, from the files given, on the same pictures: all 50,000, since it validates on test."""
    import torch

    from src.data import packed
    from src.data.preparing import prepared
    from src.training.start import with_weights

    if not setting.record:
        return []
    figures = []
    config = with_weights(prepared(setting.real(EXPERIMENT)))
    folder = setting.folder / "record"
    (folder / "cifar10").mkdir(parents=True)
    for name, parts in {"train": ("train", "val"), "test": ("test",)}.items():
        splits = [packed.read_split(config.processed, part) for part in parts]
        images, labels = (torch.cat([split[key] for split in splits]) for key in ("images", "labels"))
        content = {"images": images.permute(0, 2, 3, 1).contiguous(), "labels": labels}
        classes = packed.read_meta(config.processed)["classes"]
        torch.save(content | {"classes": classes}, folder / "cifar10" / f"{name}.pt")
    for path in setting.record:
        code = re.sub(r"range\(\d+\)(?=\]\))", f"range({setting.rounds})", path.read_text())
        (folder / path.name).write_text(code)
        # Autotuning among Triton's templates as well, it compiled for more than 160 s on an H100's host.
        libraries = {f"TORCHINDUCTOR_MAX_AUTOTUNE_{kind}_BACKENDS": "ATEN" for kind in ("GEMM", "CONV")}
        done = subprocess.run(
            [sys.executable, path.name],
            cwd=folder,
            env=os.environ | libraries,
            capture_output=True,
            text=True,
            check=False,
        )
        rows = [match for line in done.stdout.splitlines() if (match := LAST_COLUMNS.search(line))]
        if done.returncode or not rows:
            raise Failure(f"{path}: exit code {done.returncode}: {done.stderr[-500:]}")
        rows = rows[1:] or rows  # the first one warms up
        seconds, accuracy = ([float(row[key]) for row in rows] for key in ("seconds", "accuracy"))
        figures += [
            Figure(path.stem, "training, by its own clock", spread(seconds), "s"),
            Figure(path.stem, "accuracy, with its six views", spread([100 * value for value in accuracy]), "%"),
        ]
    return figures


def eager(setting: Setting) -> list[Figure]:
    """94 % on CIFAR-10, as configured."""
    return classification(setting, EXPERIMENT, target=at_least(94))


def compiled(setting: Setting) -> list[Figure]:
    """94 % on CIFAR-10, compiled and with the fastest algorithms of cuDNN, which are not deterministic."""
    fastest = ("trainer.compile=true", "trainer.deterministic=false", "trainer.benchmark=true")
    return classification(setting, EXPERIMENT, *fastest, target=at_least(94), label=f"{EXPERIMENT}, compiled")


def accurate(setting: Setting) -> list[Figure]:
    """96 % on CIFAR-10: a wider network, more epochs, cutout."""
    wide = ("model.network.width=160", "trainer.max_epochs=40", "data.loader.cutout=12")
    one = replace(setting, rounds=1)
    return classification(one, EXPERIMENT, *wide, target=at_least(96), label=f"{EXPERIMENT}, wide")


def texts(setting: Setting) -> list[Figure]:
    """IMDB, as configured for the CPU."""
    return classification(replace(setting, rounds=1), "imdb_lstm", "trainer=gpu", target=at_least(91.4))


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(setting: Setting, experiment: str = EXPERIMENT) -> list[Figure]:
    """Of `STEPS` steps in the middle of an epoch: waits for the device, launches, the device's share of the time."""
    import torch
    from pytorch_lightning import Callback
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    readings: dict[str, float] = {}
    messages: list[warnings.WarningMessage] = []
    catcher = warnings.catch_warnings(record=True)
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 0 and batch_idx == FIRST_STEPS:
                torch.cuda.synchronize()
                profiler.start()
                messages.append(catcher.__enter__())  # type: ignore[arg-type]
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                readings["started"] = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 0 and batch_idx == FIRST_STEPS + STEPS - 1:
                torch.cuda.set_sync_debug_mode("default")
                catcher.__exit__(None, None, None)
                torch.cuda.synchronize()
                readings["seconds"] = time.perf_counter() - readings["started"]
                profiler.stop()
                kernels = [
                    event
                    for event in profiler.events()
                    if event.device_type == DeviceType.CUDA and not event.is_user_annotation
                ]
                readings["launches"] = len(kernels)
                readings["device"] = sum(event.self_device_time_total for event in kernels) / 1e6

    limit = f"trainer.limit_train_batches={FIRST_STEPS + STEPS + 1}"
    train(setting, experiment, "trainer.max_epochs=1", limit, "trainer.log_every=1000", callbacks=[Watch()])
    synchronising = [w for w in messages[0] if "synchronizing" in str(w.message)]  # type: ignore[attr-defined]
    for warning in synchronising[:3]:
        print(f"{experiment} waits at {warning.filename}:{warning.lineno}", file=sys.stderr)
    return [
        Figure.single(experiment, f"waits for the device in {STEPS} steps", len(synchronising), "", at_most(0)),
        Figure.single(experiment, "kernels a step", readings["launches"] / STEPS),
        Figure.single(experiment, "time of a step, profiled", 1e3 * readings["seconds"] / STEPS, "ms"),
        Figure.single(experiment, "of which the device computes", 1e3 * readings["device"] / STEPS, "ms"),
    ]


def pix2pix(setting: Setting) -> list[Figure]:
    """Pictures of 256x256 a second, as `python -m benchmarks training` measures them."""
    from benchmarks import training

    return training.measure_one(
        "facades_pix2pix", replace(setting, rounds=3, overrides=("trainer=gpu", *setting.overrides))
    )


# --- bits -------------------------------------------------------------------------------------------------------------


def interrupt(setting: Setting, experiment: str, *overrides: str, epoch: int) -> None:
    """A training that gets SIGTERM in the middle of an epoch, and saves."""
    from pytorch_lightning import Callback

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == epoch and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(setting, experiment, *overrides, callbacks=[Interrupt()])
    except SystemExit:
        return
    raise Failure(f"{experiment}: not interrupted")


def bits(setting: Setting, experiment: str = EXPERIMENT, *overrides: str) -> list[Figure]:
    """Whether two trainings, and one that was interrupted and resumed, each in a new process, have the same bits."""
    short = ("trainer.max_epochs=3", "trainer.limit_train_batches=20", "trainer.limit_val_batches=2", *overrides)

    def digests(setting: Setting) -> tuple[str, str]:
        result: Result = in_process(train, setting, experiment, *short, limit_s=200)
        return result.digests

    first, second, third = (replace(setting, folder=setting.folder / name) for name in ("first", "second", "third"))
    expected, repeated = digests(first), digests(second)
    # In the last epoch, which has pictures of another size than the first.
    in_process(partial(interrupt, epoch=2), third, experiment, *short, limit_s=200)
    resumed = digests(third)
    return [
        Figure.single(experiment, "trained twice: same bits", float(expected == repeated), "", at_least(1)),
        Figure.single(experiment, "interrupted and resumed: same bits", float(expected == resumed), "", at_least(1)),
    ]


PARTS: dict[str, Part] = {
    "94 %": Part(eager, 90),
    "bits": Part(bits, 90),
    "texts": Part(texts, 90),
    "steps": Part(steps, 40),
    "pix2pix": Part(pix2pix, 75),
    "96 %": Part(accurate, 75),
    "compiled": Part(compiled, 90),
    "record": Part(record, 200),
}

"""Optimizers and learning-rate schedules: rates over a run, parameter groups, classes named by `_target_`."""

from __future__ import annotations

import math
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from src.common.errors import ConfigError, Failure
from src.common.paths import ROOT
from src.configuration.composing import check, compose
from src.configuration.schema import SGD, Adam, AdamW, Constant, Cosine, Linear, Muon, Step
from src.models import muon
from src.models.muon import orthogonalize
from src.models.optimization import build_optimizer, build_schedule, rate_factor

LINEAR = Linear(name="linear", warmup=0.2, hold=0.3, final=0.1)
COSINE = Cosine(name="cosine", warmup=0.2, final=0.1)
STEP = Step(name="step", milestones=[0.5, 0.75], factor=0.1)


@pytest.mark.parametrize(
    ("config", "progress", "factor"),
    [
        (Constant(name="constant"), 0.0, 1.0),
        (Constant(name="constant"), 1.0, 1.0),
        (LINEAR, 0.0, 0.0),
        (LINEAR, 0.1, 0.5),
        (LINEAR, 0.2, 1.0),
        (LINEAR, 0.5, 1.0),
        (LINEAR, 0.75, 0.55),
        (LINEAR, 1.0, 0.1),
        (Linear(name="linear"), 0.0, 1.0),
        (Linear(name="linear"), 0.25, 0.75),
        (Linear(name="linear"), 1.0, 0.0),
        (Linear(name="linear", warmup=0.5, hold=0.5), 1.0, 1.0),
        (Linear(name="linear", warmup=1.0), 1.0, 1.0),
        (COSINE, 0.1, 0.5),
        (COSINE, 0.2, 1.0),
        (COSINE, 0.4, 1 - 0.9 * (1 - math.sqrt(0.5)) / 2),
        (COSINE, 0.6, 0.55),
        (COSINE, 1.0, 0.1),
        (STEP, 0.0, 1.0),
        (STEP, 0.499, 1.0),
        (STEP, 0.5, 0.1),
        (STEP, 0.75, 0.01),
        (STEP, 1.0, 0.01),
    ],
)
def test_the_factor_of_the_rate_at_points_of_a_run(
    config: Constant | Linear | Cosine | Step, progress: float, factor: float
) -> None:
    assert rate_factor(config, progress) == pytest.approx(factor)


def learning_rates(config: Constant | Linear | Cosine | Step, steps: int, *, lr: float = 1.0) -> list[float]:
    """The rate of each step of a run."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = build_schedule(optimizer, config, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_a_warm_up_starts_above_zero_and_rises_linearly() -> None:
    rates = learning_rates(Linear(name="linear", warmup=0.5), 8, lr=0.8)
    assert rates == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.7, 0.5, 0.3, 0.1])


def test_short_warm_ups_and_runs_of_one_step_have_a_positive_rate() -> None:
    assert learning_rates(Linear(name="linear", warmup=0.01), 4)[0] > 0.8
    assert learning_rates(Cosine(name="cosine", warmup=0.9), 1)[0] > 0


def test_a_step_schedule_decays_at_its_milestones() -> None:
    assert learning_rates(STEP, 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_schedule_can_be_stepped_beyond_its_end() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, LINEAR, 3)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    layers[1].weight.requires_grad_(False)
    nn.init.ones_(layers[1].bias)  # type: ignore[arg-type]
    return layers


def test_only_norm_biases_learn_faster_by_the_factor() -> None:
    model = network()
    config = SGD(name="sgd", lr=0.01, momentum=0.0, norm_bias_lr_factor=64)
    optimizer = build_optimizer([model], config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {name: float((before[name] - p.detach()).mean()) for name, p in model.named_parameters()}
    usual = dict.fromkeys(("0.weight", "0.bias", "3.weight", "3.bias"), 0.01)
    assert moved == pytest.approx(usual | {"1.weight": 0.0, "1.bias": 0.64}, abs=1e-6)


def test_norm_biases_decay_like_other_weights() -> None:
    model = network()
    config = SGD(name="sgd", lr=0.01, momentum=0.0, weight_decay=0.5, norm_bias_lr_factor=64)
    optimizer = build_optimizer([model], config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, old in before.items():
        torch.testing.assert_close(model.get_parameter(name).data, old * (1 - 0.01 * 0.5))


def test_a_schedule_scales_the_rates_of_all_groups() -> None:
    optimizer = build_optimizer([network()], SGD(name="sgd", lr=0.01, norm_bias_lr_factor=64))
    build_schedule(optimizer, Linear(name="linear", warmup=0.5), 4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 / 4, 0.64 / 4])


def test_sgd_adam_and_adamw_are_built_as_configured() -> None:
    sgd = build_optimizer([network()], SGD(name="sgd", lr=0.1, momentum=0.8, weight_decay=0.2))
    assert type(sgd) is torch.optim.SGD
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.1, 0.8, True, 0.2)

    plain = build_optimizer([network()], SGD(name="sgd", lr=0.1, momentum=0.0))  # Nesterov needs a momentum
    assert plain.param_groups[0]["nesterov"] is False

    for config, kind in (
        (Adam(name="adam", lr=0.1, beta1=0.5, beta2=0.9, weight_decay=0.2), torch.optim.Adam),
        (AdamW(name="adamw", lr=0.1, beta1=0.5, beta2=0.9, weight_decay=0.2), torch.optim.AdamW),
    ):
        built = build_optimizer([network()], config)
        assert type(built) is kind
        group = built.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.5, 0.9), 0.2)


MUON = Muon(name="muon", lr=0.1, momentum=0.6, rest=SGD(name="sgd", lr=0.01, norm_bias_lr_factor=64))


@pytest.mark.parametrize(
    "config", [SGD(name="sgd", lr=0.1), MUON, Adam(name="adam", lr=0.1), AdamW(name="adamw", lr=0.1)]
)
def test_every_trainable_parameter_is_in_exactly_one_group(
    config: SGD | Muon | Adam | AdamW,
) -> None:
    model, more = network(), nn.Linear(2, 2)
    optimizer = build_optimizer([model, more], config)
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for m in (model, more) for p in m.parameters() if p.requires_grad)


def test_biases_of_frozen_layers_learn_faster_like_norm_biases() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer([model], SGD(name="sgd", lr=0.01, norm_bias_lr_factor=64))
    fast = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert fast == {id(model[0].bias), id(model[1].bias)}


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_orthogonalize_keeps_singular_vectors_with_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    (matrix,) = orthogonalize([u @ torch.diag(s.clamp(min=0.2 * float(s.max()))) @ v])
    matrix = matrix.float()
    in_singular_basis = u.T @ matrix @ v.T
    lengths = in_singular_basis.diag()
    assert lengths.min() > 0.3 and lengths.max() < 1.6
    assert (in_singular_basis - torch.diag(lengths)).abs().max() < 0.05


def test_muon_steps_are_independent_of_the_gradients_scale() -> None:
    moved = []
    for scale in (1e-3, 1e3):
        model = network()
        filters = model.get_parameter("0.weight")
        optimizer = build_optimizer([model], MUON)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * scale
        before = filters.detach() * len(filters) ** 0.5 / filters.detach().norm()
        optimizer.step()
        moved.append((filters.detach() - before).flatten(1))
        lengths = torch.linalg.svdvals(moved[-1])
        assert lengths.min() > 0.3 * 0.1 and lengths.max() < 1.6 * 0.1
    torch.testing.assert_close(*moved, atol=1e-3, rtol=0)


def test_muon_is_sgd_for_parameters_other_than_filters() -> None:
    steps = []
    for config in (MUON, MUON.rest):
        model = network()
        optimizer = build_optimizer([model], config)
        for seed in range(3):  # momentum builds up
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        steps.append({name: p.detach() for name, p in model.named_parameters() if p.ndim < 4})
    torch.testing.assert_close(*steps)


def test_muon_resumes_from_its_state_to_the_same_bits() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    model = network()
    optimizer = build_optimizer([model], MUON)
    step(model, optimizer, 0)
    copy = network()
    copy.load_state_dict(model.state_dict())
    resumed = build_optimizer([copy], MUON)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    step(model, optimizer, 1)
    step(copy, resumed, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


# --- classes named by _target_ ----------------------------------------------------------------------------------------


def model_section(*overrides: str) -> Any:
    """The section `model` of a configuration with these overrides."""
    return compose(["experiment=mnist_mlp", "output=out", *overrides]).model


def test_training_uses_the_optimizer_and_schedule_of_the_targets(tmp_path: Path) -> None:
    config = model_section(
        "model.optimizer={_target_: torch.optim.RMSprop, lr: 0.001, alpha: 0.9, momentum: 0.5}",
        "model.schedule={_target_: torch.optim.lr_scheduler.OneCycleLR, max_lr: 0.01, total_steps: steps, "
        "cycle_momentum: false}",
    )
    model = config({"shape": [1, 4, 4], "classes": ["a", "b"], "mean": [0.5], "std": [0.2]})
    before = model.network.layers[1].weight.detach().clone()
    images = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    examples: Any = [(images, torch.tensor([0, 1] * 4))] * 3
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model, DataLoader(examples, batch_size=None))
    (optimizer,) = trainer.optimizers
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.RMSprop
    assert (group["alpha"], group["momentum"], group["eps"]) == (0.9, 0.5, 1e-8)
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert type(schedule) is torch.optim.lr_scheduler.OneCycleLR
    assert schedule.total_steps == 6
    assert schedule.last_epoch == 6  # stepped after every batch
    assert not torch.equal(model.network.layers[1].weight, before)


def test_sequences_reach_a_target_as_its_tuples_and_lists() -> None:
    optimizer = build_optimizer(
        [network()], model_section("model.optimizer={_target_: torch.optim.NAdam, betas: [0.8, 0.9]}").optimizer
    )
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    schedule = model_section(
        "model.schedule={_target_: torch.optim.lr_scheduler.MultiStepLR, milestones: [2, 4], gamma: 0.5}"
    ).schedule
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    built = build_schedule(sgd, schedule, 5)
    rates = []
    for _ in range(5):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        built.step()
    assert rates == [1, 1, 0.5, 0.5, 0.25]


def test_a_resolved_configuration_with_targets_is_stable() -> None:
    config = compose(["experiment=mnist_mlp", "output=out", "model.optimizer={_target_: torch.optim.Adagrad, lr: 0.1}"])
    assert check(config.plain()).plain() == config.plain()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer={_target_: torch.optim.RMSprop, alpa: 0.9}", "optimizer.alpa: unknown key; .*Did you mean 'alpha'"),
        ("optimizer={_target_: torch.optim.RMSProp}", "does not exist: torch.optim has .*Did you mean 'RMSprop'"),
        ("optimizer={_target_: torch.optim.RMSprop, lr: -1}", "optimizer.lr: -1 is not allowed"),
        ("optimizer={_target_: torch.optim.RMSprop, centered: 3}", "optimizer.centered: 3 is not allowed"),
        ("optimizer={_target_: torch.optim.NAdam, betas: [0.9]}", "optimizer.betas.1: not given"),
        ("optimizer={_target_: torch.nn.Linear}", "is not allowed: only torch.optim.* and src.models.* are"),
        ("optimizer={_target_: torch.optim.Optimizer}", "does not exist"),
        ("optimizer={_target_: torch.optim.lr_scheduler.StepLR}", "does not exist: torch.optim has"),
        ("optimizer._target_=torch.optim.SGD", "optimizer.name: unknown key; allowed: _target_"),
        ("optimizer={_target_: src.models.muonn.Muon}", "no file src/models/muonn.py"),
        ("schedule={_target_: torch.optim.SGD}", "is not allowed: only torch.optim.lr_scheduler.* and src.models.*"),
        ("schedule={_target_: torch.optim.lr_scheduler.CosineAnnealingLR}", "schedule.T_max: not given"),
        (
            "schedule={_target_: torch.optim.lr_scheduler.CosineAnnealingLR, T_max: step}",
            "T_max: 'step' is unknown; allowed: steps. Did you mean 'steps'",
        ),
        ("schedule={_target_: torch.optim.lr_scheduler.LambdaLR}", "no configuration can hold its 'lr_lambda'"),
        ("schedule={_target_: torch.optim.lr_scheduler.ReduceLROnPlateau}", "does not exist"),
    ],
)
def test_a_target_that_does_not_fit_is_refused_at_composition(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_section(f"model.{override}")


def test_arguments_that_the_class_refuses_are_named_in_one_line() -> None:
    config = model_section("model.optimizer={_target_: torch.optim.SGD, lr: 0.1, nesterov: true}").optimizer
    with pytest.raises(Failure, match=r"model\.optimizer: torch\.optim\.SGD refuses its arguments: Nesterov"):
        build_optimizer([network()], config)


def test_checking_a_target_does_not_import_torch() -> None:
    program = (
        "import sys; from src.configuration.composing import compose\n"
        "compose(['experiment=mnist_mlp', 'output=out', 'model.optimizer={_target_: torch.optim.RMSprop}'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_muon_descends_on_a_filter_s_loss() -> None:
    """Towards filters of the norm that each keeps, sqrt(out)."""
    torch.manual_seed(0)
    target = torch.randn(8, 4, 3, 3)
    target *= 8**0.5 / target.norm()
    weight = nn.Parameter(torch.randn(8, 4, 3, 3) * 5)
    optimizer = muon.Muon([weight], [], lr=0.02, momentum=0.6)
    losses = []
    for _ in range(60):
        loss = (weight - target).square().sum()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[1] < losses[0]
    assert float(weight.detach().norm()) == pytest.approx(8**0.5, rel=0.1)

"""Rates over a run, and which parameters they act on."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from src.configuration.schema import SGD, Adam, AdamW, Constant, Cosine, Linear, Muon, Step
from src.models.optimization import build_optimizer, build_schedule, orthogonalised, rate_factor

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
def test_the_rate_at_known_points(config: Constant | Linear | Cosine | Step, progress: float, factor: float) -> None:
    assert rate_factor(config, progress) == pytest.approx(factor)


def rates(config: Constant | Linear | Cosine | Step, steps: int, *, lr: float = 1.0) -> list[float]:
    """The rate of each step of a run."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = build_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_a_warm_up_begins_above_zero_and_rises_evenly_to_the_full_rate() -> None:
    found = rates(Linear(name="linear", warmup=0.5), 8, lr=0.8)
    assert found == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.7, 0.5, 0.3, 0.1])


def test_a_warm_up_shorter_than_a_step_and_a_run_of_one_step_still_learn() -> None:
    assert rates(Linear(name="linear", warmup=0.01), 4)[0] > 0.8
    assert rates(Cosine(name="cosine", warmup=0.9), 1)[0] > 0


def test_steps_fall_at_their_milestones() -> None:
    assert rates(STEP, 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_schedule_can_be_stepped_beyond_its_end() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, LINEAR, 3)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    made[1].weight.requires_grad_(False)
    nn.init.ones_(made[1].bias)  # type: ignore[arg-type]
    return made


def test_biases_of_norms_learn_faster_by_the_factor_and_nothing_else_does() -> None:
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


def test_biases_of_norms_decay_like_all_other_weights() -> None:
    model = network()
    config = SGD(name="sgd", lr=0.01, momentum=0.0, weight_decay=0.5, norm_bias_lr_factor=64)
    optimizer = build_optimizer([model], config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, old in before.items():
        torch.testing.assert_close(model.get_parameter(name).data, old * (1 - 0.01 * 0.5))


def test_a_schedule_acts_on_both_rates() -> None:
    optimizer = build_optimizer([network()], SGD(name="sgd", lr=0.01, norm_bias_lr_factor=64))
    build_schedule(optimizer, Linear(name="linear", warmup=0.5), 4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 / 4, 0.64 / 4])


def test_sgd_adam_and_adamw_are_built_as_configured() -> None:
    sgd = build_optimizer([network()], SGD(name="sgd", lr=0.1, momentum=0.8, weight_decay=0.2))
    assert type(sgd) is torch.optim.SGD
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.1, 0.8, True, 0.2)

    plain = build_optimizer([network()], SGD(name="sgd", lr=0.1, momentum=0.0))  # Nesterov's needs a momentum
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
def test_frozen_parameters_are_left_out_and_all_others_stand_in_one_group_only(
    config: SGD | Muon | Adam | AdamW,
) -> None:
    model, more = network(), nn.Linear(2, 2)
    optimizer = build_optimizer([model, more], config)
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for m in (model, more) for p in m.parameters() if p.requires_grad)


def test_biases_of_frozen_layers_learn_faster_as_those_of_norms_do() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer([model], SGD(name="sgd", lr=0.01, norm_bias_lr_factor=64))
    fast = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert fast == {id(model[0].bias), id(model[1].bias)}


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_orthogonalised_keeps_directions_and_brings_their_lengths_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    found = orthogonalised(u @ torch.diag(s.clamp(min=0.2 * float(s.max()))) @ v).float()
    in_its_own_axes = u.T @ found @ v.T
    lengths = in_its_own_axes.diag()
    assert lengths.min() > 0.3 and lengths.max() < 1.6
    assert (in_its_own_axes - torch.diag(lengths)).abs().max() < 0.05


def test_muon_steps_filters_by_the_rate_whatever_the_gradients_scale_and_keeps_their_norm() -> None:
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


def test_muon_is_plain_sgd_for_all_that_are_no_filters() -> None:
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


def test_muon_goes_on_from_its_saved_state_to_the_same_bits() -> None:
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

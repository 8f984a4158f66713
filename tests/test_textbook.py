"""The table from textbook networks to commands: each composes, and takes a training step."""

from __future__ import annotations

import contextlib
import re
import shlex

import pytest
import torch

from src.common.paths import ROOT
from tests.test_launches import LaunchesOfSteps, train_on_meta


def networks() -> dict[str, list[str]]:
    """The words after `python -m src.train` by the network's name."""
    page = (ROOT / "docs" / "experiments" / "README.md").read_text()
    _, _, table = page.partition("<!-- networks:")
    rows = re.findall(r"(?m)^\| ([^|]+) \| [^|]+ \| `python -m src\.train ([^`]+)` \|$", table.partition("\n## ")[0])
    return {name: shlex.split(words) for name, words in rows}


def test_the_table_holds_the_sources_networks() -> None:
    named = " ".join(networks())
    for name in ("MLP", "CNN", "RNN", "LSTM", "GRU", "autoencoder", "GAN", "DCGAN", "ResNet", "pix2pix", "CycleGAN"):
        assert name in named
    assert len(networks()) >= 19


# The paper's size takes long, also without computing: the sample's has the same layers.
@pytest.mark.parametrize("name", networks())
def test_a_textbook_network_takes_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "WGAN-GP":  # its penalty leaves autocast, which the meta device has not
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    experiment, *overrides = networks()[name]
    overrides = [word for word in overrides if word != "profile=full"]
    launches = LaunchesOfSteps()
    train_on_meta(
        experiment.removeprefix("+experiment="), *overrides, callbacks=[launches], limit_val_batches=0, max_steps=1
    )
    assert launches.steps[0].count > 10

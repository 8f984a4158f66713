"""Ordinary code for the tasks: fp32, the default memory layout, one example at a time through a `Dataset`.

The sizes of networks and batches and the number of steps are the experiment's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset

from benchmarks.stock_cyclegan import cyclegan
from benchmarks.timing import StepClock
from src.configuration.schema import Config
from src.data.kinds.pairs import PairLoader
from src.data.kinds.text import TextLoader
from src.data.packed import PADDING
from src.models.adversarial import initialise
from src.models.pix2pix import PatchGAN, UNet

Split = dict[str, Tensor]
WORKERS = 2  # processes that decode and crop pictures


# --- CIFAR-10: a Lightning module, torchvision's data set and transforms ----------------------------------------------


class Cifar10(Dataset[tuple[Tensor, int]]):
    """`torchvision.datasets.CIFAR10` in memory: an array of pictures, each turned into a PIL image when read.

    The original accepts the official files only, so it can't read generated data.
    """

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.data = np.ascontiguousarray(split["images"].numpy().transpose(0, 2, 3, 1))
        self.targets = split["labels"].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


class LitClassifier(pl.LightningModule):
    """Cross-entropy, SGD and a cosine, a `self.log` at each step."""

    def __init__(self, network: nn.Module, steps: int) -> None:
        super().__init__()
        self.network = network
        self.steps = steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict({"train_loss": loss, "train_accuracy": accuracy})
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cifar10(config: Config, meta: Mapping[str, Any], split: Split, device: torch.device, clock: StepClock) -> None:
    """The experiment's own network in an ordinary LightningModule."""
    from torchvision import transforms

    size = meta["shape"][-1]
    transform = transforms.Compose(
        [
            transforms.RandomCrop(size, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(meta["mean"], meta["std"]),
        ]
    )
    callback = LambdaCallback(on_train_batch_end=lambda *_: clock.tick())
    classify(config, meta, Cifar10(split, transform), device, callback, clock.steps)


def classify(
    config: Config,
    meta: Mapping[str, Any],
    images: Dataset[tuple[Tensor, int]],
    device: torch.device,
    callback: pl.Callback,
    steps: int,
) -> None:
    """Trains the experiment's network for `steps` steps on images as a `DataLoader` gives them."""
    loader = DataLoader(
        images,
        batch_size=config.loader.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        pin_memory=device.type == "cuda",
    )
    network = cast(Any, config.model).network(shape=meta["shape"], classes=len(meta["classes"]))
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=-1,
        max_steps=steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitClassifier(network, steps), loader)


# --- IMDB: packed sequences, the last hidden states -------------------------------------------------------------------


class Reviews(Dataset[tuple[Tensor, int]]):
    """A review's tokens, cut to `max_tokens`, and its label."""

    def __init__(self, split: Split, max_tokens: int | None) -> None:
        self.split = split
        self.max_tokens = max_tokens

    def __len__(self) -> int:
        return len(self.split["labels"])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        start, end = self.split["offsets"][index : index + 2].tolist()
        return self.split["tokens"][start:end][: self.max_tokens].long(), int(self.split["labels"][index])


class PackedBiLSTM(nn.Module):
    """Embedding, bidirectional LSTM over packed sequences, both last hidden states, a linear layer."""

    def __init__(self, words: int, classes: int, *, embedding: int, hidden: int, layers: int, padding: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding, padding_idx=padding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.5)
        self.classify = nn.Linear(2 * hidden, classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        embedded = self.dropout(self.embedding(tokens))
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.lstm(packed)
        return self.classify(self.dropout(torch.cat([hidden[-2], hidden[-1]], dim=1)))


def imdb(config: Config, meta: Mapping[str, Any], split: Split, device: torch.device, clock: StepClock) -> None:
    """Batches in random order, each padded to its longest review and packed."""
    padding = meta["vocabulary"].index(PADDING)
    sizes = {key: config.plain()["model"][key] for key in ("embedding", "hidden", "layers")}
    model = PackedBiLSTM(len(meta["vocabulary"]), len(meta["classes"]), padding=padding, **sizes).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def collate(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = [example for example, _ in examples]
        lengths = torch.tensor([len(example) for example in tokens])
        labels = torch.tensor([label for _, label in examples])
        return pad_sequence(tokens, batch_first=True, padding_value=padding), lengths, labels

    reviews = Reviews(split, cast(TextLoader, config.loader).max_tokens)
    loader = DataLoader(reviews, batch_size=config.loader.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    for tokens, lengths, labels in loader:
        loss = F.cross_entropy(model(tokens.to(device), lengths), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.tick()
        if clock.ticks == clock.steps:
            return


# --- facades: the plain pix2pix loop ----------------------------------------------------------------------------------


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A pair of PIL images, enlarged, cropped and mirrored alike; float [3, S, S] in -1..1 each."""

    def __init__(self, split: Split, enlarge: float) -> None:
        self.sides = [split[side].numpy().transpose(0, 2, 3, 1) for side in ("input", "target")]
        self.enlarge = enlarge

    def __len__(self) -> int:
        return len(self.sides[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision.transforms import functional as TF

        pair = [Image.fromarray(np.ascontiguousarray(side[index])) for side in self.sides]
        size = pair[0].width
        large = round(size * self.enlarge)
        top, left = torch.randint(0, large - size + 1, (2,)).tolist()
        is_mirrored = bool(torch.rand(()) < 0.5)
        tensors = []
        for picture in pair:
            picture = picture.resize((large, large), Image.Resampling.BICUBIC)
            picture = picture.crop((left, top, left + size, top + size))
            picture = TF.hflip(picture) if is_mirrored else picture
            tensors.append(TF.normalize(TF.to_tensor(picture), [0.5] * 3, [0.5] * 3))
        return tensors[0], tensors[1]


def facades(config: Config, meta: Mapping[str, Any], split: Split, device: torch.device, clock: StepClock) -> None:
    """The authors' order: generate, discriminator step, generator step; batch normalisation."""
    width = config.plain()["model"]["width"]
    generator = UNet(meta["shape"][-1], width, "batch").apply(initialise).to(device)
    discriminator = PatchGAN(width, "batch").apply(initialise).to(device)
    generator_optimizer, discriminator_optimizer = (
        torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in (generator, discriminator)
    )
    loader = DataLoader(
        Pairs(split, cast(PairLoader, config.loader).enlarge),
        batch_size=config.loader.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
    )

    def adversarial_loss(logits: Tensor, real: bool) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    for batch in loader:
        source, target = (side.to(device) for side in batch)
        fake = generator(source)

        discriminator.requires_grad_(True)
        discriminator_optimizer.zero_grad()
        real_loss = adversarial_loss(discriminator(source, target), True)
        fake_loss = adversarial_loss(discriminator(source, fake.detach()), False)
        ((real_loss + fake_loss) / 2).backward()
        discriminator_optimizer.step()

        discriminator.requires_grad_(False)
        generator_optimizer.zero_grad()
        loss = adversarial_loss(discriminator(source, fake), True) + 100 * F.l1_loss(fake, target)
        loss.backward()
        generator_optimizer.step()
        clock.tick()
        if clock.ticks == clock.steps:
            return


LOOPS: dict[str, Callable[[Config, Mapping[str, Any], Split, torch.device, StepClock], None]] = {
    "images": cifar10,
    "text": imdb,
    "pairs": facades,
    "unpaired": cyclegan,
}

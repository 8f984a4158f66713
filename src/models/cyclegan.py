"""CycleGAN (Zhu et al., 2017): two generators that translate between domains without pairs, and their discriminators.

The networks are the authors': residual generators with reflection padding and instance normalisation, 70x70 PatchGANs.
Biases are left out where the normalisation subtracts them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import Failure
from src.common.pictures import to_bytes
from src.configuration.schema import NonNegative, NonNegativeInt, Optimizer, Schedule, Width
from src.models import winograd
from src.models.adversarial import Adversarial, initialise, scaled
from src.models.feature_distances import TranslationDistances
from src.models.pix2pix import PatchGAN

EPSILON = 1e-5


class InstanceNorm(nn.Module):
    """Instance normalisation without parameters and a leaky ReLU: float [B, C, H, W] -> [B, C, H, W].

    `slope` is the ReLU's for negative values: 0 is a plain ReLU, 1 is none.
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            result: Tensor = _Normalisation.apply(x, self.slope)
            return result
        return F.leaky_relu(F.instance_norm(x, eps=EPSILON), self.slope)


class _Normalisation(torch.autograd.Function):
    """The same on a CPU in the layout of channels last, in which PyTorch's own copies its inputs back and forth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2).float()  # [B, H * W, C]
        centred = pixels - pixels.mean(1, keepdim=True)
        scale = (centred.square().mean(1, keepdim=True) + EPSILON).rsqrt()
        normalised = centred.mul_(scale).to(x.dtype)
        ctx.save_for_backward(normalised, scale)
        ctx.slope = slope
        answer = normalised if slope == 1 else F.leaky_relu(normalised, slope)
        return answer.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        normalised, scale = ctx.saved_tensors
        g = gradient.permute(0, 2, 3, 1).flatten(1, 2)
        if ctx.slope != 1:
            g = torch.ops.aten.leaky_relu_backward(g, normalised, ctx.slope, False)
        g, x = g.float(), normalised.float()
        along = (g * x).mean(1, keepdim=True)
        result = (g - g.mean(1, keepdim=True)).addcmul_(x, along, value=-1).mul_(scale).to(gradient.dtype)
        return result.unflatten(1, gradient.shape[2:]).permute(0, 3, 1, 2), None


def reflect(x: Tensor, border: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H + 2 border, W + 2 border], mirrored at the edges; deterministic on a GPU, too."""
    if x.device.type == "cpu":
        return F.pad(x, (border,) * 4, mode="reflect")
    for dimension in (2, 3):
        before = x.narrow(dimension, 1, border).flip(dimension)
        after = x.narrow(dimension, x.shape[dimension] - 1 - border, border).flip(dimension)
        x = torch.cat([before, x, after], dimension)
    return x


class ReflectedConv(nn.Conv2d):
    """A convolution that keeps the size, with reflected borders: [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, kernel, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = reflect(x, self.kernel_size[0] // 2)
        if self.kernel_size == (3, 3) and winograd.is_worthwhile(x, self.weight):
            return winograd.convolve(x, self.weight)
        return super().forward(x)


class ResidualBlock(nn.Module):
    """Two convolutions beside the identity: float [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ReflectedConv(width, width, 3, bias=False),
            InstanceNorm(0),
            ReflectedConv(width, width, 3, bias=False),
            InstanceNorm(1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ResNetGenerator(nn.Sequential):
    """float [B, 3, H, W] in -1..1 -> [B, 3, H, W] in -1..1 (Johnson et al., 2016); H and W multiples of four."""

    def __init__(self, width: int, blocks: int) -> None:
        layers: list[nn.Module] = [ReflectedConv(3, width, 7, bias=False), InstanceNorm(0)]
        for inputs in (width, 2 * width):
            layers += [nn.Conv2d(inputs, 2 * inputs, 3, stride=2, padding=1, bias=False), InstanceNorm(0)]
        layers += [ResidualBlock(4 * width) for _ in range(blocks)]
        for inputs in (4 * width, 2 * width):
            up = nn.ConvTranspose2d(inputs, inputs // 2, 3, stride=2, padding=1, output_padding=1, bias=False)
            layers += [up, InstanceNorm(0)]
        super().__init__(*layers, ReflectedConv(width, 3, 7, bias=True), nn.Tanh())


def patch_discriminator(width: int) -> nn.Sequential:
    """pix2pix's PatchGAN for a picture alone: float [B, 3, S, S] -> logits [B, 1, S/8 - 2, S/8 - 2]."""
    layers = PatchGAN(width, "batch").layers
    layers[0] = nn.Conv2d(3, width, 4, stride=2, padding=1)
    for number, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            layers[number] = InstanceNorm(1)
    return layers


class CycleGAN(Adversarial):
    """Trains both generators and then both discriminators, one step each per batch.

    The generators' loss is the GAN's, plus `cycle` times the L1 distance of an image to its way there and back, plus
    `cycle` times `identity` times that of an image to its translation into its own domain; `identity=0` saves the two
    passes. Half of the translations that a discriminator sees come from a pool of `pool` earlier ones (Shrivastava et
    al., 2017).

    After each epoch `val_kid` compares the translated validation images with real ones.
    """

    task = "unpaired_translation"
    generator: nn.ModuleDict  # `to_a`, `to_b`
    discriminator: nn.ModuleDict  # `a`, `b`

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        optimizer: Optimizer,
        schedule: Schedule,
        blocks: Literal[6, 9] = 9,
        width: Width = 64,
        discriminator_width: Width = 64,
        gan: Literal["lsgan", "vanilla"] = "lsgan",
        cycle: NonNegative = 10.0,
        identity: NonNegative = 0.5,
        pool: NonNegativeInt = 50,
    ) -> None:
        means = ("cycle_l1", "identity_l1") if identity else ("cycle_l1",)
        super().__init__(
            optimizer=optimizer,
            schedule=schedule,
            gan=gan,
            train=("generator_loss", "discriminator_loss", *means),
            val=("cycle_l1", "identity_l1"),
        )
        size = meta["shape"][-1]
        if size % 4 or size < 32:
            raise Failure(
                f"CycleGAN takes pictures whose side is a multiple of 4 from 32 on, not {size}: set data.size"
            )
        self.cycle = cycle
        self.identity = identity
        self.generator = nn.ModuleDict({name: ResNetGenerator(width, blocks) for name in ("to_a", "to_b")})
        self.discriminator = nn.ModuleDict({name: patch_discriminator(discriminator_width) for name in ("a", "b")})
        self.apply(initialise)
        self.distances = TranslationDistances()
        self.register_buffer("pooled", torch.zeros(2 * pool, *meta["shape"]), persistent=False)
        self.register_buffer("pool_count", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.pooled: Tensor
        self.pool_count: Tensor
        # Each process's own.
        self._ddp_params_and_buffers_to_ignore += ["pooled", "pool_count"]

    def forward(self, image: Tensor, to: str) -> Tensor:
        """uint8 [B, 3, S, S] -> float [B, 3, S, S] in 0..1; `to` names the generator."""
        return (self.generator[to](scaled(image, cast(torch.dtype, self.dtype))) + 1) / 2

    def answer(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The image translated into A and into B, each fp32 [B, 3, S, S] in 0..1."""
        return self(image, "to_a").float(), self(image, "to_b").float()

    def step(self, batch: tuple[Tensor, ...], optimizers: Sequence[Any], variant: int) -> dict[str, Tensor]:
        a, b = (
            scaled(side, cast(torch.dtype, self.dtype)).contiguous(memory_format=torch.channels_last) for side in batch
        )
        count = len(a)
        to_a, to_b = self.generator["to_a"], self.generator["to_b"]
        for_generators, for_discriminators = optimizers

        with self.learning(for_generators):
            with winograd.unchanged_weights():
                # One pass for the translation and the identity, which are the same network on other images.
                drawn_b, *same_b = to_b(torch.cat([a, b]) if self.identity else a).split(count)
                drawn_a, *same_a = to_a(torch.cat([b, a]) if self.identity else b).split(count)
                cycle = _distance(to_a(drawn_b), a) + _distance(to_b(drawn_a), b)
            loss = self.judged(self.discriminator["b"](drawn_b), True)
            loss = loss + self.judged(self.discriminator["a"](drawn_a), True) + self.cycle * cycle
            distances = {"cycle_l1": cycle}
            if self.identity:
                distances["identity_l1"] = _distance(same_a[0], a) + _distance(same_b[0], b)
                loss = loss + self.cycle * self.identity * distances["identity_l1"]
            self.descend(for_generators, loss)

        with self.learning(for_discriminators):
            against_a, against_b = (
                self.distinction(index, real, drawn.detach())
                for index, (real, drawn) in enumerate(((a, drawn_a), (b, drawn_b)))
            )
            against = against_a + against_b
            self.descend(for_discriminators, against)

        # L1 in 0..1, the mean of both directions: the networks work on -1..1.
        self.add(
            "train",
            count,
            generator_loss=loss * count,
            discriminator_loss=against * count,
            **{name: distance / 4 * count for name, distance in distances.items()},
        )
        return {"loss_generator": loss, "loss_discriminator": against}

    def distinction(self, index: int, real: Tensor, drawn: Tensor) -> Tensor:
        """The halved loss of the discriminator of A (0) or B (1) on real images and translations into its domain."""
        shown = self.draw_from_pool(index, drawn)
        logits = self.discriminator["ab"[index]](torch.cat([real, shown]))
        seen_real, seen_drawn = logits.split(len(real))
        return (self.judged(seen_real, True) + self.judged(seen_drawn, False)) / 2

    def draw_from_pool(self, index: int, drawn: Tensor) -> Tensor:
        """Images to show to a discriminator: each the new one or, half of the time, an earlier one that it replaces.

        The pool of each direction fills first. It holds whole batches; where less than one fits there is none. Draws
        depend on the global random state, which is set for each batch.
        """
        pool, filled = self.pooled.tensor_split(2)[index], self.pool_count[index]
        count = len(drawn)
        places = len(pool) // count * count
        if not places:
            return drawn
        fills = filled < places
        position = torch.rand(places, device=drawn.device).argsort()[:count]  # all different
        position = torch.where(fills, filled + torch.arange(count, device=drawn.device), position)
        replaces = ((torch.rand(count, device=drawn.device) < 0.5) | fills)[:, None, None, None]
        earlier = pool[position]
        new = drawn.to(pool.dtype)
        pool.index_copy_(0, position, torch.where(replaces, new, earlier))
        filled.add_(torch.where(fills, count, 0))
        return torch.where(replaces & ~fills, earlier, new).to(drawn.dtype)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for name, other, real in (("a", "b", batch[0]), ("b", "a", batch[1])):
            if not len(real):  # the shorter domain has no further image
                continue
            drawn = to_bytes(self(real, f"to_{other}").float())
            self.distances.update(name, real)
            self.distances.update(f"to_{other}", drawn)
            pictures = self(drawn, f"to_{name}"), self(real, f"to_{name}")
            cycle, identity = ((picture.float() - real.float() / 255).abs().mean() for picture in pictures)
            self.add("val", len(real), cycle_l1=cycle * len(real), identity_l1=identity * len(real))

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        distances = self.distances.compute()
        self.distances.reset()
        self.log_dict({f"val_{name}": value for name, value in distances.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["pools"] = self._of_all_processes((self.pooled.cpu().clone(), self.pool_count.cpu().clone()))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        pooled, count = checkpoint["pools"][self.trainer.global_rank]
        self.pooled.copy_(pooled)
        self.pool_count.copy_(count)


def _distance(picture: Tensor, original: Tensor) -> Tensor:
    return F.l1_loss(picture.float(), original.float())

"""Batches: reproducible order and augmentation, every example once, resumption at the next batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain, islice, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from src.common.errors import Failure
from src.data import batching, reading_ahead
from src.data.augmentation import crop_and_flip, jitter_pair
from src.data.batching import Batches, batches, spread
from src.data.datamodule import PackedData
from src.data.kinds import images as image_kind
from src.data.kinds.boxes import BoxBatches, BoxLoader
from src.data.kinds.images import ImageBatches, ImageLoader, LowResolution
from src.data.kinds.pairs import PairBatches, PairLoader
from src.data.kinds.text import TextBatches, TextLoader
from src.data.kinds.unpaired import UnpairedBatches, UnpairedLoader
from src.data.packed import Packed
from src.data.reading_ahead import DEPTH, read_ahead
from src.data.writing import write_packed

VOCABULARY = ["<unk>", "<pad>", *(f"word{i}" for i in range(98))]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def image_split(count: int = 60) -> dict[str, Tensor]:
    """Images of noise; the label is the example's index."""
    return {"images": noise(count, 3, 8, 8), "labels": torch.arange(count)}


def text_split(lengths: list[int]) -> dict[str, Tensor]:
    """Texts of the tokens 2, 3, 4, ... (0 is <unk>, 1 is <pad>); the label is the example's index."""
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()])
    tokens = torch.cat([torch.arange(length) % 98 + 2 for length in lengths]).int()
    return {"tokens": tokens, "offsets": offsets, "labels": torch.arange(len(lengths))}


def images(
    train: bool = True, count: int = 60, seed: int = 0, epochs: int = 0, rank: int = 0, world: int = 1, **loader: Any
) -> Batches:
    options = ImageLoader(**{"batch_size": 8, "eval_batch_size": 16} | loader)
    return ImageBatches(
        image_split(count), {"kind": "images"}, options, train=train, seed=seed, epochs=epochs, rank=rank, world=world
    )


def augmented_images(**loader: Any) -> Batches:
    """Training images whose meta has their mean, as cutout takes it."""
    options = ImageLoader(**{"batch_size": 8, "eval_batch_size": 16} | loader)
    return ImageBatches(image_split(), {"kind": "images", "mean": [0.5] * 3}, options, train=True)


def texts(lengths: list[int], train: bool = True, seed: int = 0, **loader: Any) -> Batches:
    options = TextLoader(**{"batch_size": 8, "eval_batch_size": 8} | loader)
    return TextBatches(text_split(lengths), {"kind": "text", "vocabulary": VOCABULARY}, options, train=train, seed=seed)


def pairs(train: bool = True, **loader: Any) -> Batches:
    split = {"input": noise(12, 3, 16, 16), "target": noise(12, 3, 16, 16, seed=1)}
    return PairBatches(
        split, {"kind": "pairs"}, PairLoader(**{"batch_size": 4, "eval_batch_size": 4} | loader), train=train
    )


AUGMENTED: dict[str, Callable[..., Batches]] = {
    "images": lambda **options: images(flip="random", crop_padding=2, **options),
    "text": lambda **options: texts([1 + i % 13 for i in range(60)], word_dropout=0.3, **options),
    "pairs": lambda **options: pairs(flip="random", enlarge=1.25, train=options.get("train", True)),
}


def epoch_of(dataloader: Batches, epoch: int) -> list[tuple[Tensor, ...]]:
    dataloader.set_epoch(epoch)
    return list(dataloader)


def equal(first: list[tuple[Tensor, ...]], second: list[tuple[Tensor, ...]]) -> bool:
    """Whether two sequences of batches are equal to the bit."""
    return len(first) == len(second) and all(
        torch.equal(a, b) for batches in zip(first, second, strict=True) for a, b in zip(*batches, strict=True)
    )


def examples(batches: list[tuple[Tensor, ...]]) -> list[int]:
    """The indices of the examples in batches of images or texts, in order."""
    return [int(label) for batch in batches for label in batch[-1]]


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["images", "text"])
def test_an_epoch_has_full_batches_and_no_example_twice(kind: str) -> None:
    dataloader = AUGMENTED[kind]()
    epoch = epoch_of(dataloader, 0)
    assert len(epoch) == len(dataloader) == 7
    assert {len(batch[-1]) for batch in epoch} == {8}
    assert len(set(examples(epoch))) == 56
    assert examples(epoch) != sorted(examples(epoch))


@pytest.mark.parametrize("kind", AUGMENTED)
def test_batches_depend_only_on_seed_and_epoch(kind: str) -> None:
    build = AUGMENTED[kind]
    torch.manual_seed(1)
    first = epoch_of(build(), 3)
    torch.manual_seed(2)  # the global random state has no effect
    dataloader = build()
    for epoch in range(3):
        epoch_of(dataloader, epoch)
    assert equal(epoch_of(dataloader, 3), first)
    assert not equal(epoch_of(dataloader, 4), first)
    assert equal(epoch_of(dataloader, 3), first)


@pytest.mark.parametrize("kind", ["images", "text"])
def test_another_seed_gives_another_order(kind: str) -> None:
    assert examples(epoch_of(AUGMENTED[kind](seed=1), 0)) != examples(epoch_of(AUGMENTED[kind](seed=0), 0))


@pytest.mark.parametrize("dataloader", [images(), texts([1 + i % 13 for i in range(60)])], ids=["images", "texts"])
def test_every_epoch_has_an_order_of_its_own(dataloader: Batches) -> None:
    """Without augmentation, which would hide that the order is the same."""
    orders = [examples(epoch_of(dataloader, epoch)) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4


def test_every_seed_has_an_order_of_its_own() -> None:
    assert len({tuple(examples(epoch_of(images(seed=seed), 0))) for seed in range(30)}) == 30


@pytest.mark.parametrize("kind", AUGMENTED)
@pytest.mark.parametrize("consumed", [0, 1, 2])
def test_a_resumed_epoch_continues_with_the_next_batch(kind: str, consumed: int) -> None:
    uninterrupted = epoch_of(AUGMENTED[kind](), 2)
    resumed = AUGMENTED[kind]()
    resumed.epoch, resumed.skip = 2, consumed
    resumed.set_epoch(2)  # as Lightning does before it iterates
    assert equal(list(resumed), uninterrupted[consumed:])
    assert equal(epoch_of(resumed, 3), epoch_of(AUGMENTED[kind](), 3))  # the next epoch is complete


@pytest.mark.parametrize(
    "dataloader",
    [
        images(crop_padding=2),
        images(flip="random"),
        images(rotation=30.0),
        augmented_images(cutout=3),
        texts([20] * 60, word_dropout=0.3),
        pairs(flip="random"),
        pairs(enlarge=1.25),
    ],
    ids=["crop", "flip", "rotation", "cutout", "words", "mirror", "enlarge"],
)
def test_augmentation_differs_between_epochs_and_batches(dataloader: Batches) -> None:
    indices = torch.arange(12)

    def augmented(epoch: int, batch_index: int) -> list[tuple[Tensor, ...]]:
        dataloader.set_epoch(epoch)
        return [dataloader.collate(indices, batch_index)]

    first = augmented(0, 0)
    assert equal(augmented(0, 0), first)
    assert not equal(augmented(1, 0), first)
    assert not equal(augmented(0, 1), first)


def test_a_frozen_dataloader_repeats_its_first_epoch() -> None:
    dataloader = AUGMENTED["images"]()
    dataloader.frozen = True
    dataloader.skip = 2  # a resumed run: the remainder of the epoch, then complete epochs
    assert equal(epoch_of(dataloader, 0), epoch_of(AUGMENTED["images"](), 0)[2:])
    assert equal(epoch_of(dataloader, 5), epoch_of(AUGMENTED["images"](), 0))


def test_fewer_examples_than_a_batch_are_one_batch() -> None:
    dataloader = images(count=5)
    assert len(dataloader) == 1
    assert sorted(examples(epoch_of(dataloader, 0))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_share_every_batch_without_overlap(world: int) -> None:
    single = [examples([batch]) for batch in epoch_of(images(), 1)]
    shares = [[examples([batch]) for batch in epoch_of(images(rank=rank, world=world), 1)] for rank in range(world)]
    for index, batch in enumerate(single):
        parts = [share[index] for share in shares]
        assert [len(part) for part in parts] == [8 // world] * world
        assert sorted(chain(*parts)) == sorted(batch)


def test_the_ranks_draw_augmentations_of_their_own() -> None:
    """Of one image for all ranks."""
    flips = []
    for rank in range(2):
        dataloader = images(count=16, rank=rank, world=2, flip="random", crop_padding=3)
        dataloader.split["images"] = dataloader.split["images"][:1].repeat(16, 1, 1, 1)
        flips.append([batch[0] for batch in epoch_of(dataloader, 0)])
    assert not any(torch.equal(first, second) for first, second in zip(*flips, strict=True))


def test_evaluation_shows_every_image_once_in_order_unaugmented() -> None:
    dataloader = images(train=False, flip="random", crop_padding=2)
    first, second = epoch_of(dataloader, 0), epoch_of(dataloader, 1)
    assert examples(first) == list(range(60))
    assert [len(batch[-1]) for batch in first] == [16, 16, 16, 12]
    assert len(dataloader) == 4
    assert torch.equal(torch.cat([batch[0] for batch in first]), image_split()["images"])
    assert equal(first, second)


def test_evaluation_shows_every_text_once_without_dropout() -> None:
    lengths = [1 + (7 * i) % 13 for i in range(30)]
    dataloader = texts(lengths, train=False, word_dropout=0.9)
    first = epoch_of(dataloader, 0)
    assert sorted(examples(first)) == list(range(30))
    assert equal(first, epoch_of(dataloader, 1))
    assert not any((tokens == 0).any() for tokens, _, _ in first)  # no <unk>: no word is dropped
    assert len(dataloader) == len(first) == 4


# --- splits that are not resident ------------------------------------------------------------------------------------


def domains(train: bool = True, **loader: Any) -> Batches:
    split = {"a": noise(30, 3, 12, 12), "b": noise(17, 3, 12, 12, seed=1)}
    options = UnpairedLoader.model_validate({"batch_size": 4, "eval_batch_size": 4, "flip": "random"} | loader)
    return UnpairedBatches(split, {"kind": "unpaired", "shape": [3, 8, 8]}, options, train=train)


def boxed(train: bool = True, **loader: Any) -> Batches:
    counts = [index % 3 for index in range(30)]
    total = sum(counts)
    corners = 20 * torch.rand(total, 2, generator=torch.Generator().manual_seed(0))
    split = {
        "images": noise(30, 3, 32, 32),
        "offsets": torch.tensor([0, *np.cumsum(counts).tolist()]),
        "boxes": torch.cat([corners, corners + 10], 1),
        "labels": torch.arange(total) % 4,
        "crowd": torch.zeros(total, dtype=torch.uint8),
        "difficult": torch.zeros(total, dtype=torch.uint8),
    }
    options = BoxLoader.model_validate(
        {"batch_size": 4, "eval_batch_size": 4, "flip": "random", "iou_crop": 0.5, "photometric": 0.5} | loader
    )
    return BoxBatches(split, {"kind": "boxes"}, options, train=train)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda **o: images(flip="alternating", crop_padding=2, rotation=20.0, **o),
        lambda **o: images(low_resolution=LowResolution(size=5, until=0.5), epochs=4, **o),
        lambda **o: texts([1 + i % 13 for i in range(60)], word_dropout=0.3, **o),
        lambda **o: pairs(flip="random", enlarge=1.25, **o),
        domains,
        boxed,
    ],
    ids=["images", "small images", "texts", "pairs", "unpaired", "boxes"],
)
def test_rows_that_are_read_ahead_give_the_bits_of_a_resident_split(build: Callable[..., Batches], train: bool) -> None:
    resident, gathered = (build(train=train, resident=value).to(torch.device("cpu")) for value in ("yes", "no"))
    torch.manual_seed(0)
    for epoch in (0, 1):
        assert equal(epoch_of(gathered, epoch), epoch_of(resident, epoch))
    gathered.skip = 2
    assert equal(list(gathered), epoch_of(resident, 1)[2:])
    assert gathered.is_resident is False


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["images", "pairs", "unpaired", "boxes"])
def test_batches_made_of_their_own_rows_alone_have_the_same_bits(kind: str, train: bool) -> None:
    """As on a GPU, to which only these rows are copied; here without one."""
    build: Callable[..., Any] = {"unpaired": domains, "boxes": boxed}.get(kind) or AUGMENTED[kind]
    dataloader = build(train=train)
    for index, indices in enumerate(dataloader.order()):
        rows = dataloader.gather(indices)
        batch = dataloader.assemble(rows, dataloader.positions(indices), indices, index)
        assert equal([batch], [dataloader.collate(indices, index)])
        assert max(len(part) for part in rows.values()) <= dataloader.size


def test_a_cutout_has_the_mean_colour_also_where_rows_are_read_ahead() -> None:
    resident, gathered = (augmented_images(cutout=3, resident=value).to(torch.device("cpu")) for value in ("yes", "no"))
    assert equal(epoch_of(gathered, 0), epoch_of(resident, 0))


def test_a_large_split_is_read_ahead_on_a_cpu_and_a_small_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert images().to(torch.device("cpu")).is_resident
    monkeypatch.setattr(batching, "MAPPED_DIRECTLY", 60 * 3 * 8 * 8)  # the images without their labels
    assert not images().to(torch.device("cpu")).is_resident
    assert images(resident="yes").to(torch.device("cpu")).is_resident


def test_rows_are_read_before_they_are_needed_and_the_thread_ends_with_the_iterator() -> None:
    made: list[int] = []
    third = threading.Event()

    def make(item: int) -> int:
        made.append(item)
        if item == 2:
            third.set()
        return 10 * item

    items = read_ahead(make, range(100))
    assert next(items) == 0
    assert third.wait(10)  # while the caller still computes on the first
    assert [next(items), next(items)] == [10, 20]
    items.close()  # type: ignore[attr-defined]  # as the trainer drops it after `limit_train_batches`
    assert len(made) <= 3 + DEPTH
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_an_exception_while_rows_are_read_reaches_the_trainer_at_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    dataloader = images(resident="no").to(torch.device("cpu"))
    unreadable = examples(epoch_of(images(), 0))[3 * 8]  # the first one of the fourth batch

    def failing(array: Tensor, indices: Tensor) -> None:
        if unreadable in indices:
            raise OSError("Input/output error")

    monkeypatch.setattr(reading_ahead, "fetch", failing)
    iterator = iter(dataloader)
    assert len([next(iterator) for _ in range(3)]) == 3
    with pytest.raises(OSError, match="Input/output error"):
        next(iterator)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize(
    ("shape", "size"),
    [([1, 28, 28], 500), ([3, 32, 32], 500), ([3, 64, 64], 500), ([3, 224, 224], 40), ([3, 4000, 4000], 1)],
)
def test_evaluation_batches_shrink_with_the_size_of_the_images(shape: list[int], size: int) -> None:
    meta = {"kind": "images", "shape": shape}
    split = {"images": torch.zeros(1, *shape, dtype=torch.uint8), "labels": torch.zeros(1)}
    assert ImageBatches(split, meta, ImageLoader(batch_size=8), train=False).size == size
    assert ImageBatches(split, meta, ImageLoader(batch_size=8, eval_batch_size=7), train=False).size == 7


def test_of_spread_batches_only_those_that_are_needed_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    dataloader = images(train=False, count=60, eval_batch_size=6)
    made: list[int] = []
    collate = type(dataloader).collate

    def noting(self: Any, indices: Tensor, index: int) -> Any:
        made.append(index)
        return collate(self, indices, index)

    monkeypatch.setattr(type(dataloader), "collate", noting)
    assert [examples([batch])[0] for batch in islice(spread(dataloader, 3), 3)] == [0, 18, 36]
    assert made == [0, 3, 6]


# --- images -----------------------------------------------------------------------------------------------------------


def crops(image: np.ndarray, padding: int, mirrored: bool) -> dict[tuple[int, int], np.ndarray]:
    """All crops of an image, uint8 [C, H, W], padded by reflection, by (top, left); mirrored if so."""
    padded = np.pad(image, [(0, 0), (padding, padding), (padding, padding)], mode="reflect")
    height, width = image.shape[1:]
    crops = {}
    for top, left in product(range(2 * padding + 1), repeat=2):
        crop = padded[:, top : top + height, left : left + width]
        crops[top, left] = crop[:, :, ::-1] if mirrored else crop
    return crops


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 9)])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_crops_and_flips_equal_those_of_a_loop_over_images(padding: int, shape: tuple[int, int, int]) -> None:
    data = noise(50, *shape)
    indices = torch.randperm(50)[:40]
    mirrored = torch.arange(40) % 2 == 0
    augmented = crop_and_flip(data, indices, padding, mirrored, torch.Generator().manual_seed(0))
    assert augmented.dtype == torch.uint8
    shifts = []
    for image, index, flip in zip(augmented.numpy(), indices.tolist(), mirrored.tolist(), strict=True):
        possible = crops(data[index].numpy(), padding, flip)
        shifts += [shift for shift, crop in possible.items() if np.array_equal(crop, image)]
    assert len(shifts) == 40  # exactly one crop for every image
    # Both ends of the range occur, in both directions, and the two are drawn independently.
    assert {top for top, _ in shifts} == {left for _, left in shifts} == set(range(2 * padding + 1))
    assert padding == 0 or any(top != left for top, left in shifts)


def test_without_augmentation_images_are_unchanged() -> None:
    data, indices = noise(9, 3, 8, 8), torch.tensor([4, 4, 0])
    assert torch.equal(crop_and_flip(data, indices, 0, None, torch.Generator()), data[indices])


def mirrored_in(dataloader: Batches, epoch: int) -> dict[int, bool]:
    """Whether an epoch shows an image mirrored, by the image's index."""
    originals = image_split()["images"]
    is_mirrored = {}
    for batch, labels in epoch_of(dataloader, epoch):
        for image, index in zip(batch, labels.tolist(), strict=True):
            is_mirrored[index] = torch.equal(image, originals[index].flip(-1))
            assert is_mirrored[index] or torch.equal(image, originals[index])
    return is_mirrored


def test_alternating_flips_change_every_image_in_the_next_epoch() -> None:
    dataloader = images(flip="alternating", batch_size=60)
    epochs = [mirrored_in(dataloader, epoch) for epoch in range(4)]
    assert 15 < sum(epochs[0].values()) < 45  # about half of the images
    for before, after in pairwise(epochs):
        assert all(before[index] != after[index] for index in range(60))


def test_random_flips_mirror_about_half_of_the_images_of_an_epoch() -> None:
    dataloader = images(flip="random", batch_size=60)
    first, second = mirrored_in(dataloader, 0), mirrored_in(dataloader, 1)
    assert 15 < sum(first.values()) < 45
    assert first != second
    assert any(first[index] == second[index] for index in range(60))


def test_images_are_small_early_in_the_run_and_full_size_in_evaluation() -> None:
    dataloader = images(low_resolution=LowResolution(size=5, until=0.5), epochs=5)
    sizes = []
    for epoch in range(5):
        dataloader.set_epoch(epoch)
        sizes.append(next(iter(dataloader))[0].shape[-1])
    assert sizes == [5, 5, 8, 8, 8]
    evaluated = images(train=False, low_resolution=LowResolution(size=5, until=1.0), epochs=5)
    assert next(iter(evaluated))[0].shape[-1] == 8


def test_memory_is_released_once_when_images_become_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    dataloader = images(low_resolution=LowResolution(size=5, until=0.5), epochs=5)
    released_at: list[int] = []
    monkeypatch.setattr(image_kind, "release_freed_memory", lambda: released_at.append(dataloader.epoch))
    for epoch in range(5):
        dataloader.set_epoch(epoch)
    assert released_at == [2]


def test_more_crop_padding_than_reflection_allows_is_refused() -> None:
    with pytest.raises(Failure, match=r"data\.loader\.crop_padding: 8, but the images are 8x8; give at most 7"):
        images(crop_padding=8)


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_jitter_is_the_same_for_both_images_of_a_pair() -> None:
    data = noise(16, 3, 16, 16)
    source, target = jitter_pair(data, data, enlarge=1.5, flip=True, random=torch.Generator().manual_seed(0))
    assert torch.equal(source, target)
    assert source.shape == data.shape
    assert source.dtype == torch.uint8
    assert not any(torch.equal(a, b) for a, b in zip(source, data, strict=True))


def test_without_enlarging_pairs_are_only_mirrored_about_half_of_them() -> None:
    data, other = noise(40, 3, 8, 8), noise(40, 3, 8, 8, seed=1)
    unchanged = jitter_pair(data, other, enlarge=1.0, flip=False, random=torch.Generator())
    assert torch.equal(unchanged[0], data)
    assert torch.equal(unchanged[1], other)
    flipped = jitter_pair(data, other, enlarge=1.0, flip=True, random=torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped[0], data, strict=True)]
    assert mirrored == [torch.equal(a, b.flip(-1)) for a, b in zip(flipped[1], other, strict=True)]
    assert 10 < sum(mirrored) < 30


def test_an_enlarged_crop_is_part_of_the_enlarged_image() -> None:
    ramp = torch.arange(16, dtype=torch.uint8).mul(10).expand(8, 3, 16, 16).clone()  # brighter to the right
    crops, _ = jitter_pair(ramp, ramp, enlarge=2.0, flip=False, random=torch.Generator().manual_seed(0))
    steps = crops.int().diff(dim=-1)[..., 2:-2]
    assert steps.min() >= 4  # half of the original slope
    assert steps.max() <= 6
    assert len({int(image[0, 0, 0]) for image in crops}) > 3  # at different offsets


def test_evaluation_shows_pairs_unaugmented() -> None:
    dataloader = pairs(train=False, flip="random", enlarge=1.5)
    epoch = epoch_of(dataloader, 0)
    assert torch.equal(torch.cat([source for source, _ in epoch]), dataloader.split["input"])
    assert torch.equal(torch.cat([target for _, target in epoch]), dataloader.split["target"])


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_padded_to_the_longest_of_their_batch() -> None:
    text_lengths = [5, 1, 9, 3]
    ((tokens, lengths, labels),) = epoch_of(texts(text_lengths, batch_size=4), 0)
    assert tokens.shape == (4, 9)
    assert (tokens.dtype, lengths.dtype, labels.dtype) == (torch.int64,) * 3
    for row, length, index in zip(tokens.tolist(), lengths.tolist(), labels.tolist(), strict=True):
        assert length == text_lengths[index]
        assert row[:length] == list(range(2, 2 + length))
        assert row[length:] == [1] * (9 - length)


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(5, [2, 3, 4, 12, 13]), (4, [2, 3, 12, 13]), (1, [2]), (11, [2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13])],
)
def test_a_text_that_is_too_long_keeps_its_head_and_tail(limit: int, kept: list[int]) -> None:
    ((tokens, lengths, _),) = epoch_of(texts([12], train=False, max_tokens=limit), 0)
    assert tokens.tolist() == [kept]
    assert lengths.tolist() == [limit]


def test_a_short_text_beside_a_long_one_is_not_cut() -> None:
    ((tokens, lengths, labels),) = epoch_of(texts([3, 12, 4], train=False, max_tokens=4), 0)
    rows = dict(zip(labels.tolist(), tokens.tolist(), strict=True))
    assert rows == {0: [2, 3, 4, 1], 1: [2, 3, 12, 13], 2: [2, 3, 4, 5]}
    assert sorted(lengths.tolist()) == [3, 4, 4]


def test_word_dropout_drops_its_share_of_words_and_no_padding() -> None:
    lengths = [20 + i % 20 for i in range(64)]
    plain = epoch_of(texts(lengths, batch_size=64), 0)[0]
    dropped = epoch_of(texts(lengths, batch_size=64, word_dropout=0.25), 0)[0]
    assert torch.equal(plain[1], dropped[1])
    assert torch.equal(plain[0] == 1, dropped[0] == 1)
    share = (dropped[0] == 0).sum() / plain[1].sum()
    assert 0.2 < float(share) < 0.3
    is_kept = dropped[0] != 0
    assert torch.equal(dropped[0][is_kept], plain[0][is_kept])


def test_batches_hold_texts_of_similar_length_in_random_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 1200).tolist()
    batch_lengths = [batch.tolist() for _, batch, _ in epoch_of(texts(lengths, batch_size=10), 0)]
    spread = np.mean([max(batch) - min(batch) for batch in batch_lengths])
    assert spread < 20  # of 400; batches drawn at random have 327
    means = [np.mean(batch) for batch in batch_lengths]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


# --- from packed files, for a Trainer ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Packed images; the label is the example's index."""
    splits = {
        name: {key: value.numpy() for key, value in image_split(count).items()}
        for name, count in (("train", 60), ("val", 20))
    }
    write_packed(Packed(splits, {"kind": "images"}), tmp_path, config={}, source={})
    return tmp_path


def test_a_packed_split_gives_the_batches_of_its_kind(folder: Path) -> None:
    dataloader = batches(folder, "val", ImageLoader(batch_size=8, eval_batch_size=16), train=False)
    assert isinstance(dataloader, ImageBatches)
    assert examples(epoch_of(dataloader, 0)) == list(range(20))


def datamodule(folder: Path, **options: Any) -> PackedData:
    import pytorch_lightning as pl

    loader = ImageLoader(batch_size=8, flip="random", crop_padding=2)
    data = PackedData(folder, loader, seed=3, **options)
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return data


def test_the_datamodule_resumes_at_the_batch_of_its_checkpoint(folder: Path) -> None:
    fresh = datamodule(folder).train_dataloader()
    assert fresh.seed == 3
    resumed = datamodule(folder)
    resumed.load_state_dict({"epoch": 2, "consumed": 4})
    dataloader = resumed.train_dataloader()
    dataloader.set_epoch(2)
    assert equal(list(dataloader), epoch_of(fresh, 2)[4:])
    assert examples(epoch_of(resumed.val_dataloader(), 0)) == list(range(20))


def test_same_batches_repeats_the_first_epoch(folder: Path) -> None:
    dataloader = datamodule(folder, same_batches=True).train_dataloader()
    assert equal(epoch_of(dataloader, 0), epoch_of(dataloader, 1))

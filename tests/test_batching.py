"""Batches: the same every time, each example once, augmented as told, resumed at exactly the next one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from src.common.errors import Failure
from src.data import packed
from src.data.augmentation import crop_and_flip, jitter_pair
from src.data.batching import Batches, batches
from src.data.datamodule import PackedData
from src.data.kinds import images as kind_of_images
from src.data.kinds.images import ImageBatches, ImageLoader, LowResolution
from src.data.kinds.pairs import PairBatches, PairLoader
from src.data.kinds.text import TextBatches, TextLoader
from src.data.packed import Packed

VOCABULARY = ["<unk>", "<pad>", *(f"word{i}" for i in range(98))]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def image_split(count: int = 60) -> dict[str, Tensor]:
    """Images of noise; the label is the example's number."""
    return {"images": noise(count, 3, 8, 8), "labels": torch.arange(count)}


def text_split(lengths: list[int]) -> dict[str, Tensor]:
    """Texts whose words count on from 2 on, without the two special ones; the label is the example's number."""
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()])
    tokens = torch.cat([torch.arange(length) % 98 + 2 for length in lengths]).int()
    return {"tokens": tokens, "offsets": offsets, "labels": torch.arange(len(lengths))}


def images(
    train: bool = True, count: int = 60, seed: int = 0, epochs: int = 0, rank: int = 0, world: int = 1, **loader: Any
) -> Batches:
    given = ImageLoader(**{"batch_size": 8, "eval_batch_size": 16} | loader)
    return ImageBatches(
        image_split(count), {"kind": "images"}, given, train=train, seed=seed, epochs=epochs, rank=rank, world=world
    )


def texts(lengths: list[int], train: bool = True, seed: int = 0, **loader: Any) -> Batches:
    given = TextLoader(**{"batch_size": 8, "eval_batch_size": 8} | loader)
    return TextBatches(text_split(lengths), {"kind": "text", "vocabulary": VOCABULARY}, given, train=train, seed=seed)


def pairs(train: bool = True, **loader: Any) -> Batches:
    split = {"input": noise(12, 3, 16, 16), "target": noise(12, 3, 16, 16, seed=1)}
    return PairBatches(
        split, {"kind": "pairs"}, PairLoader(**{"batch_size": 4, "eval_batch_size": 4} | loader), train=train
    )


AUGMENTED: dict[str, Callable[..., Batches]] = {
    "images": lambda **how: images(flip="random", crop_padding=2, **how),
    "text": lambda **how: texts([1 + i % 13 for i in range(60)], word_dropout=0.3, **how),
    "pairs": lambda **_: pairs(flip="random", enlarge=1.25),
}


def epoch_of(made: Batches, epoch: int) -> list[tuple[Tensor, ...]]:
    made.set_epoch(epoch)
    return list(made)


def equal(first: list[tuple[Tensor, ...]], second: list[tuple[Tensor, ...]]) -> bool:
    """Whether two sequences of batches are the same to the bit."""
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def examples(made: list[tuple[Tensor, ...]]) -> list[int]:
    """Which examples stand in batches of images or texts, in order."""
    return [int(label) for batch in made for label in batch[-1]]


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["images", "text"])
def test_an_epoch_takes_each_example_at_most_once_in_full_batches(kind: str) -> None:
    made = AUGMENTED[kind]()
    taken = epoch_of(made, 0)
    assert len(taken) == len(made) == 7
    assert {len(batch[-1]) for batch in taken} == {8}
    assert len(set(examples(taken))) == 56
    assert examples(taken) != sorted(examples(taken))


@pytest.mark.parametrize("kind", AUGMENTED)
def test_batches_depend_on_seed_and_epoch_alone(kind: str) -> None:
    make = AUGMENTED[kind]
    torch.manual_seed(1)
    first = epoch_of(make(), 3)
    torch.manual_seed(2)  # what else runs in the process does not matter
    walked = make()
    for epoch in range(3):
        epoch_of(walked, epoch)
    assert equal(epoch_of(walked, 3), first)
    assert not equal(epoch_of(walked, 4), first)
    assert equal(epoch_of(walked, 3), first)


@pytest.mark.parametrize("kind", ["images", "text"])
def test_another_seed_gives_another_order(kind: str) -> None:
    assert examples(epoch_of(AUGMENTED[kind](seed=1), 0)) != examples(epoch_of(AUGMENTED[kind](seed=0), 0))


@pytest.mark.parametrize("kind", AUGMENTED)
@pytest.mark.parametrize("consumed", [0, 1, 2])
def test_a_resumed_epoch_goes_on_with_the_batch_that_was_next(kind: str, consumed: int) -> None:
    whole = epoch_of(AUGMENTED[kind](), 2)
    resumed = AUGMENTED[kind]()
    resumed.epoch, resumed.skip = 2, consumed
    resumed.set_epoch(2)  # as Lightning says before it asks for batches
    assert equal(list(resumed), whole[consumed:])
    assert equal(epoch_of(resumed, 3), epoch_of(AUGMENTED[kind](), 3))  # the next one is whole


@pytest.mark.parametrize(
    "made",
    [
        images(crop_padding=2),
        images(flip="random"),
        texts([20] * 60, word_dropout=0.3),
        pairs(flip="random"),
        pairs(enlarge=1.25),
    ],
    ids=["crop", "flip", "words", "mirror", "enlarge"],
)
def test_the_same_examples_are_augmented_anew_in_each_epoch_and_batch(made: Batches) -> None:
    chosen = torch.arange(12)

    def augmented(epoch: int, index: int) -> list[tuple[Tensor, ...]]:
        made.set_epoch(epoch)
        return [made.collate(chosen, index)]

    first = augmented(0, 0)
    assert equal(augmented(0, 0), first)
    assert not equal(augmented(1, 0), first)
    assert not equal(augmented(0, 1), first)


def test_the_same_batches_come_again_where_they_are_asked_for() -> None:
    made = AUGMENTED["images"]()
    made.frozen = True
    made.skip = 2  # a resumed run: only what is left of the epoch, then all of it again
    assert equal(epoch_of(made, 0), epoch_of(AUGMENTED["images"](), 0)[2:])
    assert equal(epoch_of(made, 5), epoch_of(AUGMENTED["images"](), 0))


def test_fewer_examples_than_a_batch_make_one_batch() -> None:
    made = images(count=5)
    assert len(made) == 1
    assert sorted(examples(epoch_of(made, 0))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_of_all_ranks_are_the_whole_batch_and_nothing_twice(world: int) -> None:
    whole = [examples([batch]) for batch in epoch_of(images(), 1)]
    shares = [[examples([batch]) for batch in epoch_of(images(rank=rank, world=world), 1)] for rank in range(world)]
    for index, batch in enumerate(whole):
        parts = [share[index] for share in shares]
        assert [len(part) for part in parts] == [8 // world] * world
        assert sorted(chain(*parts)) == sorted(batch)


def test_evaluation_covers_each_example_once_in_their_order_and_plain() -> None:
    made = images(train=False, flip="random", crop_padding=2)
    first, second = epoch_of(made, 0), epoch_of(made, 1)
    assert examples(first) == list(range(60))
    assert [len(batch[-1]) for batch in first] == [16, 16, 16, 12]
    assert len(made) == 4
    assert torch.equal(torch.cat([batch[0] for batch in first]), image_split()["images"])
    assert equal(first, second)


def test_evaluation_of_texts_covers_each_once_and_plain() -> None:
    lengths = [1 + (7 * i) % 13 for i in range(30)]
    made = texts(lengths, train=False, word_dropout=0.9)
    first = epoch_of(made, 0)
    assert sorted(examples(first)) == list(range(30))
    assert equal(first, epoch_of(made, 1))
    assert not any((tokens == 0).any() for tokens, _, _ in first)  # no <unk>: nothing is dropped
    assert len(made) == len(first) == 4


# --- images -----------------------------------------------------------------------------------------------------------


def crops(image: np.ndarray, padding: int, mirrored: bool) -> dict[tuple[int, int], np.ndarray]:
    """All crops of the old size out of one image, uint8 [C, H, W], padded by reflection; then mirrored."""
    padded = np.pad(image, [(0, 0), (padding, padding), (padding, padding)], mode="reflect")
    height, width = image.shape[1:]
    found = {}
    for top, left in product(range(2 * padding + 1), repeat=2):
        crop = padded[:, top : top + height, left : left + width]
        found[top, left] = crop[:, :, ::-1] if mirrored else crop
    return found


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 9)])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_crops_and_mirrors_are_those_that_a_loop_over_images_makes(padding: int, shape: tuple[int, int, int]) -> None:
    data = noise(50, *shape)
    chosen = torch.randperm(50)[:40]
    mirrored = torch.arange(40) % 2 == 0
    made = crop_and_flip(data, chosen, padding, mirrored, torch.Generator().manual_seed(0))
    assert made.dtype == torch.uint8
    shifts = []
    for image, number, flip in zip(made.numpy(), chosen.tolist(), mirrored.tolist(), strict=True):
        possible = crops(data[number].numpy(), padding, flip)
        shifts += [shift for shift, crop in possible.items() if np.array_equal(crop, image)]
    assert len(shifts) == 40  # each image is one crop of its own
    # Both edges of the range are reached, in both directions, and the two are drawn apart.
    assert {top for top, _ in shifts} == {left for _, left in shifts} == set(range(2 * padding + 1))
    assert padding == 0 or any(top != left for top, left in shifts)


def test_without_augmentation_the_images_are_as_they_are() -> None:
    data, chosen = noise(9, 3, 8, 8), torch.tensor([4, 4, 0])
    assert torch.equal(crop_and_flip(data, chosen, 0, None, torch.Generator()), data[chosen])


def mirrored_in(made: Batches, epoch: int) -> dict[int, bool]:
    """Which images an epoch shows mirrored."""
    plain = image_split()["images"]
    shown = {}
    for batch, labels in epoch_of(made, epoch):
        for image, number in zip(batch, labels.tolist(), strict=True):
            shown[number] = torch.equal(image, plain[number].flip(-1))
            assert shown[number] or torch.equal(image, plain[number])
    return shown


def test_alternating_flips_show_each_image_both_ways_in_two_successive_epochs() -> None:
    made = images(flip="alternating", batch_size=60)
    epochs = [mirrored_in(made, epoch) for epoch in range(4)]
    assert 15 < sum(epochs[0].values()) < 45  # about half of them, at first
    for before, after in pairwise(epochs):
        assert all(before[number] != after[number] for number in range(60))


def test_random_flips_show_about_half_of_the_images_mirrored_and_others_each_epoch() -> None:
    made = images(flip="random", batch_size=60)
    first, second = mirrored_in(made, 0), mirrored_in(made, 1)
    assert 15 < sum(first.values()) < 45
    assert first != second
    assert any(first[number] == second[number] for number in range(60))


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_images_are_small_until_the_given_part_of_the_run_and_whole_in_evaluation() -> None:
    made = images(low_resolution=LowResolution(size=5, until=0.5), epochs=5)
    sizes = []
    for epoch in range(5):
        made.set_epoch(epoch)
        sizes.append(next(iter(made))[0].shape[-1])
    assert sizes == [5, 5, 8, 8, 8]
    evaluated = images(train=False, low_resolution=LowResolution(size=5, until=1.0), epochs=5)
    assert next(iter(evaluated))[0].shape[-1] == 8


def test_memory_is_handed_back_once_where_images_become_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made = images(low_resolution=LowResolution(size=5, until=0.5), epochs=5)
    handed_back: list[int] = []
    monkeypatch.setattr(kind_of_images, "release_freed_memory", lambda: handed_back.append(made.epoch))
    for epoch in range(5):
        made.set_epoch(epoch)
    assert handed_back == [2]


def test_more_padding_than_images_have_pixels_to_reflect_is_refused() -> None:
    with pytest.raises(Failure, match=r"data\.loader\.crop_padding: 8, but the images are 8x8; give at most 7"):
        images(crop_padding=8)


def test_the_jitter_is_the_same_for_both_of_a_pair() -> None:
    data = noise(16, 3, 16, 16)
    source, target = jitter_pair(data, data, enlarge=1.5, flip=True, random=torch.Generator().manual_seed(0))
    assert torch.equal(source, target)
    assert source.shape == data.shape
    assert source.dtype == torch.uint8
    changed = [not torch.equal(a, b) for a, b in zip(source, data, strict=True)]
    assert all(changed)


def test_without_jitter_pairs_stay_and_a_flip_alone_mirrors_about_half() -> None:
    data, other = noise(40, 3, 8, 8), noise(40, 3, 8, 8, seed=1)
    plain = jitter_pair(data, other, enlarge=1.0, flip=False, random=torch.Generator())
    assert torch.equal(plain[0], data)
    assert torch.equal(plain[1], other)
    made = jitter_pair(data, other, enlarge=1.0, flip=True, random=torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(made[0], data, strict=True)]
    assert mirrored == [torch.equal(a, b.flip(-1)) for a, b in zip(made[1], other, strict=True)]
    assert 10 < sum(mirrored) < 30


def test_an_enlarged_crop_is_a_part_of_the_enlarged_image() -> None:
    ramp = torch.arange(16, dtype=torch.uint8).mul(10).expand(8, 3, 16, 16).clone()  # brighter to the right
    made, _ = jitter_pair(ramp, ramp, enlarge=2.0, flip=False, random=torch.Generator().manual_seed(0))
    steps = made.int().diff(dim=-1)[..., 2:-2]
    assert steps.min() >= 4  # half as steep as it was
    assert steps.max() <= 6
    assert len({int(image[0, 0, 0]) for image in made}) > 3  # the crops lie at different places


def test_evaluation_shows_pairs_as_they_are() -> None:
    made = pairs(train=False, flip="random", enlarge=1.5)
    shown = epoch_of(made, 0)
    assert torch.equal(torch.cat([source for source, _ in shown]), made.split["input"])
    assert torch.equal(torch.cat([target for _, target in shown]), made.split["target"])


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_padded_to_the_longest_of_their_batch_and_keep_their_lengths() -> None:
    lengths = [5, 1, 9, 3]
    ((tokens, given, labels),) = epoch_of(texts(lengths, batch_size=4), 0)
    assert tokens.shape == (4, 9)
    assert (tokens.dtype, given.dtype, labels.dtype) == (torch.int64,) * 3
    for row, length, number in zip(tokens.tolist(), given.tolist(), labels.tolist(), strict=True):
        assert length == lengths[number]
        assert row[:length] == list(range(2, 2 + length))
        assert row[length:] == [1] * (9 - length)


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(5, [2, 3, 4, 12, 13]), (4, [2, 3, 12, 13]), (1, [2]), (11, [2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13])],
)
def test_of_a_text_that_is_too_long_head_and_tail_stay(limit: int, kept: list[int]) -> None:
    ((tokens, lengths, _),) = epoch_of(texts([12], train=False, max_tokens=limit), 0)
    assert tokens.tolist() == [kept]
    assert lengths.tolist() == [limit]


def test_a_short_text_is_whole_beside_a_long_one() -> None:
    ((tokens, lengths, labels),) = epoch_of(texts([3, 12, 4], train=False, max_tokens=4), 0)
    rows = dict(zip(labels.tolist(), tokens.tolist(), strict=True))
    assert rows == {0: [2, 3, 4, 1], 1: [2, 3, 12, 13], 2: [2, 3, 4, 5]}
    assert sorted(lengths.tolist()) == [3, 4, 4]


def test_words_are_dropped_in_training_only_and_never_padding() -> None:
    lengths = [20 + i % 20 for i in range(64)]
    plain = epoch_of(texts(lengths, batch_size=64), 0)[0]
    dropped = epoch_of(texts(lengths, batch_size=64, word_dropout=0.25), 0)[0]
    assert torch.equal(plain[1], dropped[1])
    assert torch.equal(plain[0] == 1, dropped[0] == 1)
    share = (dropped[0] == 0).sum() / plain[1].sum()
    assert 0.2 < float(share) < 0.3
    stayed = dropped[0] != 0
    assert torch.equal(dropped[0][stayed], plain[0][stayed])


def test_batches_hold_texts_of_like_length_and_come_in_no_order_of_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 1200).tolist()
    taken = [given.tolist() for _, given, _ in epoch_of(texts(lengths, batch_size=10), 0)]
    spread = np.mean([max(batch) - min(batch) for batch in taken])
    assert spread < 20  # of 400: random batches of ten have 327
    means = [np.mean(batch) for batch in taken]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


# --- from packed files, for a trainer ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Packed images, the label is the example's number."""
    splits = {
        name: {key: value.numpy() for key, value in image_split(count).items()}
        for name, count in (("train", 60), ("val", 20))
    }
    packed.write(Packed(splits, {"kind": "images"}), tmp_path, config={}, source={})
    return tmp_path


def test_batches_of_a_packed_split_are_those_of_its_kind(folder: Path) -> None:
    made = batches(folder, "val", ImageLoader(batch_size=8, eval_batch_size=16), train=False)
    assert isinstance(made, ImageBatches)
    assert examples(epoch_of(made, 0)) == list(range(20))


def data_for_a_trainer(folder: Path, **how: Any) -> PackedData:
    import pytorch_lightning as pl

    loader = ImageLoader(batch_size=8, flip="random", crop_padding=2)
    data = PackedData(folder, loader, seed=3, **how)
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return data


def test_a_trainers_data_resume_where_the_checkpoint_says(folder: Path) -> None:
    fresh = data_for_a_trainer(folder).train_dataloader()
    assert fresh.seed == 3
    resumed = data_for_a_trainer(folder)
    resumed.load_state_dict({"epoch": 2, "consumed": 4})
    made = resumed.train_dataloader()
    made.set_epoch(2)
    assert equal(list(made), epoch_of(fresh, 2)[4:])
    assert examples(epoch_of(resumed.val_dataloader(), 0)) == list(range(20))


def test_a_trainers_data_can_be_the_same_batches_every_epoch(folder: Path) -> None:
    made = data_for_a_trainer(folder, same_batches=True).train_dataloader()
    assert equal(epoch_of(made, 0), epoch_of(made, 1))

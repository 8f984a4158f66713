"""The sampled reviews: official format, distinct texts, true labels, no film in both splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from src.data.fetching.archives import read_archive
from src.data.samples.reviews import draw


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    archive = tmp_path_factory.mktemp("samples") / "aclImdb_v1.tar.gz"
    draw(archive, train=400, test=100)
    return dict(read_archive(archive))


def test_reviews_have_the_official_names_and_are_balanced(reviews: dict[str, bytes]) -> None:
    folders = Counter(tuple(name.split("/")[:3]) for name in reviews)
    assert folders == {
        ("aclImdb", "train", "pos"): 200,
        ("aclImdb", "train", "neg"): 200,
        ("aclImdb", "test", "pos"): 50,
        ("aclImdb", "test", "neg"): 50,
    }
    for name in reviews:
        number, rating = Path(name).stem.split("_")
        assert number.isdigit()
        assert rating == ("10" if "/pos/" in name else "1")


def test_reviews_are_distinct_texts_with_their_markup(reviews: dict[str, bytes]) -> None:
    texts = [content.decode("utf-8") for content in reviews.values()]
    assert len(set(texts)) == len(texts)
    assert min(len(text.split()) for text in texts) >= 5
    assert 0.4 < np.mean(["<br />" in text for text in texts]) < 0.8  # 59 % of the 25,000


def test_the_labels_of_the_reviews_match_their_texts(reviews: dict[str, bytes]) -> None:
    """`worst` and `waste` are more frequent in negative reviews, unless labels are swapped or shuffled."""
    counts = {
        side: sum(b"worst" in text or b"waste" in text for name, text in reviews.items() if f"/{side}/" in name)
        for side in ("pos", "neg")
    }
    assert counts["neg"] > 2 * counts["pos"]


def test_test_reviews_follow_all_training_reviews(reviews: dict[str, bytes]) -> None:
    """Adjacent reviews are of the same film, which must not be in both splits."""
    for side in ("pos", "neg"):
        rows = {
            split: [
                int(Path(name).stem.split("_")[0]) for name in reviews if name.startswith(f"aclImdb/{split}/{side}/")
            ]
            for split in ("train", "test")
        }
        assert max(rows["train"]) < min(rows["test"])


@pytest.mark.parametrize(("train", "test", "message"), [(3, 2, "even counts"), (24000, 6000, "ask for fewer")])
def test_impossible_counts_of_reviews_are_refused(train: int, test: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "reviews.tar.gz", train=train, test=test)
    assert not list(tmp_path.iterdir())

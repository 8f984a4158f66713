"""Writes the configuration of your own data: looks at a folder, an archive or a table, and says what it found.

    python -m src.new data birds ~/data/birds                    -> conf/data/birds.yaml, and an experiment of that name
    python -m src.new data birds ~/data/birds size=128           another value of a key of the data
    python -m src.new data mine reviews.csv layout=text_table    where the guess is wrong

The experiment (conf/experiment/NAME.yaml) trains a model that fits the data, and conf/sweep/NAME.yaml searches its
learning rate. Change the three files as you like; existing ones are never overwritten.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from src.common.errors import ConfigError, Failure
from src.common.files import write_text_atomically
from src.common.paths import CONF, ROOT
from src.common.yaml_files import parse_yaml
from src.configuration.composing import check, compose
from src.configuration.refusing import refusal
from src.configuration.schema import DataConfig
from src.data.layouts import Files, Layout, Name, ordered, recognise

TARGETS: dict[Name, str] = {
    "boxes": "src.data.sets.detection.DetectionFolders",
    "domains": "src.data.sets.domains.UnpairedDomains",
    "pairs": "src.data.sets.facades.PairedImages",
    "images": "src.data.sets.image_folder.ImageFolders",
    "entities": "src.data.sets.conll.ConllFiles",
    "texts": "src.data.sets.imdb.ReviewFolders",
    "text_table": "src.data.sets.text_tables.TextTables",
    "numbers": "src.data.sets.tables.Tables",
}
COMMENTS = {
    "archive": "your data: a folder, an archive or a file",
    "sha256": "of data.archive; null: any content",
    "size": "pixels a side, or [height, width]",
    "channels": "3: colour; 1: grey",
    "fit": "crop: the middle of the image; pad: the whole image with margins; stretch: other proportions",
    "on_bad": "skip: leave out and count what can't be read",
    "manifest": "the table that names each image's file and class",
    "columns": "of the table: which holds what; split and group (rows that stay together) are optional",
    "tokenizer": "null: words; bpe: subwords learned from the training part",
    "vocabulary": "most frequent words of the training part, or pieces; all other words are <unk>",
    "val_fraction": "of the training examples, where the data has no validation split",
    "test_fraction": "of all examples, where the data has no test split",
    "split_seed": "selects these examples; independent of the run's seed",
    "direction": "A is the left half, or the folder A/; AtoB generates B from A",
    "palette": "colours of label maps, for a segmentation score; null: no such score",
    "paired_test": "true: test images of the same name show the same scene in both domains",
    "duplicates": "drop: leave out training images that are byte for byte another image; keep",
    "scheme": "tags that the network learns: iobes or iob2",
    "enlarge": "side of the packed training images over size; batches are random crops of them",
    "loader.batch_size": "examples of a training step; halve it where memory does not suffice",
    "loader.eval_batch_size": "examples of a batch in validation and evaluation",
    "loader.flip": "random: half of the training images are mirrored; none: for digits, letters, maps",
    "loader.crop_padding": "pixels of reflected border, from which a random crop is taken",
    "loader.enlarge": "factor of enlargement before a random crop of the original size",
    "loader.low_resolution": "{size: 24, until: 0.65}: the first 65 % of the epochs at 24x24; null: always full size",
    "loader.rotation": "degrees; the largest random turn, either way",
    "loader.max_tokens": "a longer text loses its middle",
    "loader.word_dropout": "probability that a word becomes <unk> in training",
}


@dataclass(frozen=True)
class Proposal:
    """What the files in conf/ say: the data section, the model, and keys of the experiment."""

    data: dict[str, Any]
    model: str
    monitor: str
    epochs: int
    experiment: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)  # of the search, besides the learning rate


def propose(layout: Layout) -> Proposal:
    """Sensible values for a layout."""
    return {
        "boxes": _boxes,
        "domains": _domains,
        "pairs": _pairs,
        "images": _images,
        "entities": _entities,
        "texts": _texts,
        "text_table": _texts,
        "numbers": _numbers,
    }[layout.name](layout)


def _batch(layout: Layout, largest: int) -> int:
    """A power of two, `largest` at most, of which an epoch has at least eight."""
    train = layout.examples("train") or layout.total * 0.7
    return max(2, min(largest, 2 ** (int(train / 8) or 1).bit_length() // 2))


def _fractions(layout: Layout) -> dict[str, Any]:
    fractions: dict[str, Any] = {} if layout.examples("val") else {"val_fraction": 0.1}
    if not layout.examples("test"):
        fractions["test_fraction"] = 0.2
    return fractions | ({"split_seed": 0} if fractions else {})


def _images(layout: Layout) -> Proposal:
    assert layout.sizes is not None
    width, height, _, largest, channels, _ = layout.sizes
    side = min(width, height)
    if largest > 64:
        side = max((size for size in (64, 96, 128, 160, 192, 224) if size <= side), default=64)
    is_square = max(width, height) <= 1.1 * min(width, height)
    is_small = channels == 1 and side <= 32
    batch = _batch(layout, 128 if side <= 64 else 64 if side <= 128 else 32)
    loader = {
        "batch_size": batch,
        "eval_batch_size": 500 if side <= 64 else 128 if side <= 128 else 64,
        "flip": "none" if is_small else "random",
        "crop_padding": side // 8,
    }
    data = {"size": side, "channels": channels, "fit": "stretch" if is_square else "crop", "on_bad": "refuse"}
    return Proposal(
        {**layout.keys, **data, **_fractions(layout), "loader": loader},
        "cnn" if is_small else "resnet18",
        "val_accuracy",
        20,
        {} if is_small else {"model": {"optimizer": {"lr": round(0.2 * batch / 500, 4)}}},
        {"model.label_smoothing": {"float": [0.0, 0.2]}},
    )


def _texts(layout: Layout) -> Proposal:
    longest = statistics.quantiles(layout.words, n=20)[-1] if len(layout.words) > 1 else 100
    loader = {
        "batch_size": _batch(layout, 64),
        "eval_batch_size": 256,
        "max_tokens": int(min(400, max(50, -(-1.25 * longest // 50) * 50))),
        "word_dropout": 0.1,
    }
    data = {"tokenizer": None, "vocabulary": 25000, "on_bad": "refuse", **_fractions(layout), "loader": loader}
    return Proposal(
        {**layout.keys, **data},
        "lstm",
        "val_accuracy",
        5,
        {"trainer": {"gradient_clip": 1.0}},
        {"model.dropout": {"float": [0.2, 0.7]}, "model.hidden": {"int": [32, 128], "step": 32}},
    )


def _boxes(layout: Layout) -> Proposal:
    assert layout.sizes is not None
    width, height, *_ = layout.sizes
    scale = min(1.0, 320 / max(width, height))
    size = [max(96, round(scale * side / 32) * 32) for side in (height, width)]
    loader = {"batch_size": _batch(layout, 16), "eval_batch_size": 32, "flip": "random", "iou_crop": 0.5}
    data = {
        "size": size,
        "fit": "letterbox",
        "val_fraction": 0.1,
        "split_seed": 0,
        "loader": loader,
    }
    return Proposal(data, "ssd", "val_ap50", 30)


def _pairs(layout: Layout) -> Proposal:
    assert layout.sizes is not None
    size = max((size for size in (64, 128, 256) if size <= layout.sizes.height), default=64)
    loader = {"batch_size": 1 if size == 256 else 4, "eval_batch_size": 16, "flip": "random", "enlarge": 1.117}
    data = {
        "direction": "AtoB",
        "size": size,
        "palette": None,
        "on_bad": "refuse",
        **_fractions(layout),
        "loader": loader,
    }
    return Proposal(data, "pix2pix", "val_l1", 100)


def _domains(layout: Layout) -> Proposal:
    assert layout.sizes is not None
    side = min(layout.sizes.width, layout.sizes.height)
    size = max((size for size in (64, 128, 256) if size <= side), default=64)
    loader = {"batch_size": 1, "eval_batch_size": 16, "flip": "random"}
    data = {
        "size": size,
        "enlarge": 1.117,
        "paired_test": False,
        "duplicates": "keep",
        "val_fraction": 0.05,
        "split_seed": 0,
        "loader": loader,
    }
    return Proposal(data, "cyclegan", "val_kid", 100, {"model": {"blocks": 9 if size == 256 else 6}})


def _entities(layout: Layout) -> Proposal:
    loader = {"batch_size": _batch(layout, 32), "eval_batch_size": 128, "max_words": 128, "max_characters": 20}
    data = {"scheme": "iobes", "vocabulary": 50000, "val_fraction": 0.1, "split_seed": 0, "loader": loader}
    return Proposal(data, "tagger", "val_f1", 8, {"trainer": {"gradient_clip": 5.0}})


def _numbers(layout: Layout) -> Proposal:
    data = {**_fractions(layout), "loader": {"batch_size": _batch(layout, 64), "eval_batch_size": 1000}}
    return Proposal(data, "table_gan", "val_frechet", 40)


def describe(layout: Layout, others: list[Layout], files: Files) -> Iterator[str]:
    """What was found, line by line."""
    yield f"{files.path}: {layout.title}"
    for split in ordered(layout.counts):
        classes = layout.counts[split]
        names = [f"{name} {count:,}" for name, count in sorted(classes.items(), key=lambda item: -item[1]) if name]
        more = f", … {len(names)} classes" if len(names) > 10 else ""
        yield f"  {split or 'all':8} {sum(classes.values()):>9,}   {', '.join(names[:10])}{more}".rstrip()
    if sizes := layout.sizes:
        colour = "grey" if sizes.channels == 1 else "colour"
        yield (
            f"  sides    {sizes.smallest} to {sizes.largest} pixels, median {sizes.width}x{sizes.height}, {colour} "
            f"({sizes.looked_at} of {len(files.images):,} images)"
        )
    if layout.words:
        median = statistics.median(layout.words)
        yield f"  words    median {median:.0f}, longest {max(layout.words)} ({len(layout.words):,} texts)"
    for column, values in layout.columns.items():
        used = [key for key, name in layout.keys.get("columns", {}).items() if str(name) == column]
        yield f"  column   {column}{' = ' + used[0] if used else ''}: {values}"
    if others:
        yield f"  fits too: {', '.join(f'layout={other.name} ({other.title})' for other in others)}"


def new_data(name: str, path: str, overrides: list[str]) -> None:
    """Looks at the data and writes the three files.

    Raises:
        ConfigError: a file of that name exists, or a key is refused; nothing is written.
        Failure: there is no data at the path, or none of a known layout.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"{name!r}: give a name of letters, digits, _ and -")
    paths = {group: CONF / group / f"{name}.yaml" for group in ("data", "experiment", "sweep")}
    if existing := [path for path in paths.values() if path.exists()]:
        raise ConfigError(f"{existing[0].relative_to(ROOT)} exists: give another name, or remove it")
    values = dict(_assignment(override) for override in overrides)
    layout_name = values.pop("layout", None)
    where = Path(os.path.abspath(Path(path).expanduser()))
    files = Files(where)
    layouts = recognise(files)
    layout = next((candidate for candidate in layouts if layout_name in (None, candidate.name)), None)
    if layout is None:
        fits = f"; what fits: {', '.join(candidate.name for candidate in layouts)}" if layouts else ""
        fault = f"layout={layout_name} does not fit" if layout_name in get_args(Name) else "no known layout"
        raise Failure(f"{where}: {fault}{fits}; the layouts are in docs/your-data.md")
    others = [candidate for candidate in layouts if candidate is not layout]
    print("\n".join(describe(layout, others, files)), flush=True)
    proposal = propose(layout)
    archive = where.relative_to(ROOT) if where.is_relative_to(ROOT) else where
    head = {"_target_": TARGETS[layout.name], "name": name, "archive": str(archive), "sha256": None}
    data = _updated(head | proposal.data, values)
    check({"profile": {"name": "full", "note": "the official data"}, "data": data}, DataConfig)
    title = f"{layout.title[0].upper()}{layout.title[1:]}"
    contents = {
        "data": f"# {title}.   python -m src.train +experiment={name}\n{yaml_with_comments(data)}",
        "experiment": _experiment(name, title, proposal),
    }
    try:
        for group, content in contents.items():
            write_text_atomically(paths[group], content)
        lr = compose([f"experiment={name}", "output=."]).plain()["model"]["optimizer"]["lr"]
        write_text_atomically(paths["sweep"], _sweep(name, lr, proposal.space))
    except BaseException:
        for one in paths.values():
            one.unlink(missing_ok=True)
        raise
    print(f"\nwrote {', '.join(str(one.relative_to(ROOT)) for one in paths.values())}\n")
    print(_next_steps(name))


def _assignment(override: str) -> tuple[str, Any]:
    key, is_given, value = override.partition("=")
    if not is_given:
        raise ConfigError(f"{override}: give key=value, e.g. size=64")
    return key, parse_yaml(value, key)


def _updated(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The section with other values; a key may name one within a section, `loader.batch_size`."""
    updated = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    for key, value in values.items():
        section, _, inner = key.partition(".")
        if inner and isinstance(updated.setdefault(section, {}), dict):
            updated[section][inner] = value
        else:
            updated[key] = value
    return updated


def yaml_with_comments(data: Mapping[str, Any], prefix: str = "", indent: str = "") -> str:
    """A section as YAML, its keys explained."""
    lines = []
    for key, value in data.items():
        if key == "loader":
            lines.append(f"{key}:\n{yaml_with_comments(value, 'loader.', '  ')}".rstrip("\n"))
            continue
        line = f"{indent}{key}: {_flow(value)}"
        comment = COMMENTS.get(prefix + key)
        lines.append(f"{line:20}  # {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)[1:-2]


def _experiment(name: str, title: str, proposal: Proposal) -> str:
    content = dict(proposal.experiment)
    trainer = {"max_epochs": proposal.epochs, **content.pop("trainer", {}), "monitor": proposal.monitor}
    keys = yaml.safe_dump({"trainer": trainer, **content}, sort_keys=False)
    return f"""\
# @package _global_
# {title}.   python -m src.train +experiment={name} [model=NAME]
defaults:
  - override /data: {name}
  - override /model: {proposal.model}
  - override /profile: full   # your data has no embedded sample
name: {name}
description: {proposal.model} on {name} ({title[0].lower()}{title[1:]}).
{keys}"""


def _sweep(name: str, lr: float, space: Mapping[str, Any]) -> str:
    low, high = float(f"{lr / 10:.1g}"), float(f"{lr * 5:.1g}")
    ranges = {"model.optimizer.lr": {"float": [low, high], "log": True}, **space}
    lines = [f"  {key}: {_flow(value)}" for key, value in ranges.items()]
    usage = f"# python -m src.sweep +experiment={name} [sweep.trials=50] [sweep.workers=2]"
    return "\n".join([usage, "space:", *lines]) + "\n"


def _next_steps(name: str) -> str:
    return f"""\
next:
  python -m src.describe {name} profile=full             # what it holds: duplicates, classes, sizes
  python -m src.train +experiment={name} debug=fast      # two batches of everything: does it run?
  python -m src.train +experiment={name}
  python -m src.sweep +experiment={name} sweep.trials=20
with DVC, which writes these lines into params.yaml (profile: full, run: {{{name}: {name}}}, data: {{{name}: {{}}}}):
  dvc exp run -S profile=full -S +run.{name}={name} -S '+data.{name}={{}}' export@{name}"""


def main() -> None:
    """The command; exit codes: 0 written, 1 the data is not understood, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m src.new", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["data"], help="what is new")
    parser.add_argument("name", metavar="NAME", help="of the data set and of its experiment")
    parser.add_argument("path", metavar="PATH", help="a folder, an archive or a table")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"of the data, or layout={'|'.join(get_args(Name))}"
    )
    arguments = parser.parse_args()
    try:
        new_data(arguments.name, arguments.path, arguments.overrides)
    except ConfigError as error:
        sys.exit(refusal(str(error)))
    except Failure as error:
        print(f"new failed: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

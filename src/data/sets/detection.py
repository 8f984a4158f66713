"""Pictures with boxes in the layouts of COCO (JSON), Pascal VOC (XML) and YOLO (text files)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal
from xml.etree import ElementTree

import numpy as np

from src.common.errors import ConfigError
from src.common.yaml_files import parse_yaml
from src.configuration.schema import Colour, PositiveInt, SplitSeed, ValFraction
from src.data.fetching.archives import Archive
from src.data.fetching.files import SourceError
from src.data.folders import SPLIT_OF
from src.data.image_files import SUFFIXES, WHITE, ImageError, image_size, open_image
from src.data.image_rows import Facts, ImageRows
from src.data.kinds.boxes import Placement
from src.data.packed import SPLITS, Arrays, Packed, Split

SMALLEST = 1e-3  # pixels; a box with a smaller side has no area


@dataclass(frozen=True)
class PlacedImage:
    """Decodes a file to an image of `shape`, [H, W], as its placement says: uint8 [1, 3, H, W]."""

    shape: tuple[int, int]
    fit: Literal["stretch", "letterbox"]
    background: str

    def __call__(self, files: Sequence[tuple[bytes, str]]) -> tuple[np.ndarray, Facts]:
        ((content, name),) = files
        picture, mode = open_image(content, name, background=self.background)
        facts = Facts(*picture.size, mode, len(content))
        placement = Placement.of(facts.width, facts.height, self.shape, self.fit)
        return placement.apply(np.asarray(picture), self.shape)[None], facts


@dataclass
class Annotation:
    """What one image shows: a row of `boxes` (xyxy, pixels of the original), `labels` and so on for each object."""

    boxes: list[Sequence[float]] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)  # a class's name, or a number of the file's own
    areas: list[float | None] = field(default_factory=list)  # None: the box's
    crowd: list[bool] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)

    def add(
        self,
        box: Sequence[float],
        label: Any,
        *,
        area: float | None = None,
        crowd: bool = False,
        difficult: bool = False,
    ) -> None:
        """Adds an object."""
        self.boxes.append(box)
        self.labels.append(label)
        self.areas.append(area)
        self.crowd.append(crowd)
        self.difficult.append(difficult)


Annotated = dict[str, dict[str, Annotation]]  # by split, then by the name of the image's file in the archive


class DetectionFolders:
    """Reads a folder or an archive in COCO's, Pascal VOC's or YOLO's layout, which its annotations tell.

    Each image is brought to `size`, [height, width]. Names of folders or files tell the splits: `train`, `train2017`,
    `instances_val2017.json`, `ImageSets/Main/test.txt`. Without a test split the val split is the test split, and val
    is drawn from train, as it is where there is none.
    """

    kind = "boxes"
    archive_name = "detection.tar"
    sample: ClassVar[str] = "src.data.samples.scenes"

    def __init__(
        self,
        *,
        size: list[PositiveInt],
        fit: Literal["stretch", "letterbox"] = "letterbox",
        background: Colour = "white",
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.size = size
        self.fit = fit
        self.background = background
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses the annotations, decodes and places the images.

        Raises:
            SourceError: there are no annotations of a known layout, an image that they name is missing or can't be
                decoded, a class is unknown, a box is no box, or a split has no image.
        """
        if len(self.size) != 2:
            raise SourceError(f"data.size: {self.size}: give [height, width], in pixels")
        return self._packed(Archive(archive, nested=True), frozenset())

    def _packed(self, archive: Archive, skipped: frozenset[str]) -> Packed:
        shape = (self.size[0], self.size[1])
        pictures: dict[str, Placement] = {}
        texts: dict[str, bytes] = {}
        unused: Counter[str] = Counter()
        for name, place in archive.places.items():
            suffix = PurePosixPath(name).suffix.lower()
            if place is None or name in skipped:
                continue
            if any(part.startswith(".") for part in PurePosixPath(name).parts[1:]):
                unused["hidden"] += 1
            elif suffix in SUFFIXES:
                try:
                    width, height = image_size(archive.read(name), name)
                except ImageError as error:
                    raise SourceError(f"{archive.path}: {error}") from None
                pictures[name] = Placement.of(width, height, shape, self.fit)
            elif suffix in (".json", ".xml", ".txt", ".yaml", ".yml"):
                texts[name] = archive.read(name)
            else:
                unused["of another kind"] += 1
        reader = _layout(archive.path, texts)(archive.path, pictures, texts, unused)
        annotated = self._with_val(archive.path, reader.read())
        named = {name for images in annotated.values() for name in images}
        if idle := len(pictures.keys() - named):
            unused["images in no split"] += idle
        decode = PlacedImage(shape, self.fit, self.background)
        splits: dict[str, Split] = {}
        for split, images in annotated.items():
            names = sorted(images)
            rows = ImageRows(archive, names, decode, (1, 3, *shape), counted=split == "train")
            placements = {name: pictures[name] for name in names}
            splits[split] = {
                "images": rows.part(),
                **self._arrays(archive.path, placements, images, reader.classes, unused),
            }
        meta = {"kind": self.kind, "classes": reader.classes, "shape": [3, *shape], "fit": self.fit}
        if self.background != WHITE:  # what a signature without a background means
            meta["background"] = self.background
        return Packed(splits, meta, unused)

    def _with_val(self, archive: Path, annotated: Annotated) -> Annotated:
        """The three splits: test is val where there is no test, and val is drawn from train where there is none."""
        if not annotated.get("train"):
            raise SourceError(f"{archive}: no images of a train split; see docs/your-data.md")
        train, val, test = (annotated.get(split) or {} for split in SPLITS)
        if not test:
            val, test = {}, val
        if not test:
            raise SourceError(f"{archive}: no images of a test or val split; see docs/your-data.md")
        if not val:
            if len(train) < 2:
                raise SourceError(f"{archive}: train has one image, and val none: give at least two, val takes one")
            names = sorted(train)
            order = np.random.default_rng(self.split_seed).permutation(len(names))
            held_out = {names[i] for i in order[: min(max(1, round(self.val_fraction * len(order))), len(order) - 1)]}
            val = {name: train[name] for name in held_out}
            train = {name: annotation for name, annotation in train.items() if name not in held_out}
        return dict(zip(SPLITS, (train, val, test), strict=True))

    def _arrays(
        self,
        archive: Path,
        placements: Mapping[str, Placement],
        annotations: Mapping[str, Annotation],
        classes: Sequence[str],
        unused: Counter[str],
    ) -> Arrays:
        """The packed arrays of a split, boxes checked and clipped; what is left out is counted."""
        number = {label: index for index, label in enumerate(classes)}
        rows: dict[str, list[Any]] = {key: [] for key in ("boxes", "labels", "areas", "crowd", "difficult")}
        offsets = [0]
        for name, placement in placements.items():
            annotation = annotations[name]
            limits = np.array([placement.width, placement.height, placement.width, placement.height], np.float64)
            for box, label, area, crowd, difficult in zip(
                annotation.boxes,
                annotation.labels,
                annotation.areas,
                annotation.crowd,
                annotation.difficult,
                strict=True,
            ):
                corners = np.array(box, np.float64)
                if not np.isfinite(corners).all():
                    raise SourceError(f"{archive}: {name}: the box {list(box)} is not four finite numbers")
                if (corners[2:] - corners[:2] < SMALLEST).any():
                    unused["boxes of no area"] += 1
                    continue
                inside = corners.clip(0, limits)
                if (inside[2:] - inside[:2] < SMALLEST).any():
                    unused["boxes outside their picture"] += 1
                    continue
                if (np.abs(inside - corners) > 1).any():  # a rounding of up to a pixel is usual
                    unused["boxes cut off at the edge of their picture"] += 1
                rows["boxes"].append(placement.to_packed(inside))
                rows["labels"].append(number[label])
                sides = inside[2:] - inside[:2]
                rows["areas"].append(float(sides[0] * sides[1]) if area is None else area)
                rows["crowd"].append(crowd)
                rows["difficult"].append(difficult)
            offsets.append(len(rows["boxes"]))
        return {
            "sizes": np.array([(place.height, place.width) for place in placements.values()], np.int32),
            "offsets": np.array(offsets, np.int64),
            "boxes": np.array(rows["boxes"], np.float32).reshape(-1, 4),
            "labels": np.array(rows["labels"], np.int64),
            "areas": np.array(rows["areas"], np.float32),
            "crowd": np.array(rows["crowd"], np.uint8),
            "difficult": np.array(rows["difficult"], np.uint8),
        }


def _split_named(name: str) -> str | None:
    """The split that a name of a folder or file tells: train, train2017, instances_val2017, bccd_test."""
    splits = {SPLIT_OF[word] for word in re.findall(r"[a-z]+", name.lower()) if word in SPLIT_OF}
    return splits.pop() if len(splits) == 1 else None


def _split_of(path: PurePosixPath) -> str | None:
    """The split of a file by the nearest folder above it that names one."""
    return next((split for part in reversed(path.parts[:-1]) if (split := _split_named(part))), None)


class _Reader:
    """One layout: `read` gives the annotations by split and image, and sets `classes`."""

    classes: list[str]

    def __init__(
        self, archive: Path, pictures: Mapping[str, Placement], texts: Mapping[str, bytes], unused: Counter[str]
    ) -> None:
        self.archive = archive
        self.pictures = pictures
        self.texts = texts
        self.unused = unused
        self.by_name: dict[str, list[str]] = defaultdict(list)
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        for name in pictures:
            self.by_name[PurePosixPath(name).name].append(name)
            self.by_stem[PurePosixPath(name).stem].append(name)

    def read(self) -> Annotated:
        """The annotations, whose labels are names of classes."""
        raise NotImplementedError

    def image(self, file_name: str, split: str | None, where: str) -> str:
        """The archive's name of the image that an annotation calls `file_name`.

        Raises:
            SourceError: there is none, or there are several.
        """
        path = PurePosixPath(file_name.replace("\\", "/"))
        names = self.by_name.get(path.name, [])
        if len(names) > 1:
            names = [n for n in names if PurePosixPath(n).parts[-len(path.parts) :] == path.parts] or names
        if len(names) > 1 and split:
            names = [n for n in names if _split_of(PurePosixPath(n)) == split] or names
        if len(names) != 1:
            fault = "is not in the archive" if not names else f"stands {len(names)} times in the archive"
            raise self.refusal(where, f"its image {file_name!r} {fault}")
        return names[0]

    def refusal(self, where: str, fault: str) -> SourceError:
        return SourceError(f"{self.archive}: {where}: {fault}: mend the annotations; see docs/your-data.md")

    def collect(self, names: Iterable[str]) -> list[str]:
        """Sorted names of classes.

        Raises:
            SourceError: there is none, or one can't be printed.
        """
        classes = sorted(set(names))
        self.check_classes(classes)
        return classes

    def check_classes(self, classes: Sequence[str]) -> None:
        """Refuses names that are missing, empty, twice there, or can't be printed."""
        if not classes:
            raise SourceError(f"{self.archive}: no annotation names a class; see docs/your-data.md")
        for name in classes:
            if not (isinstance(name, str) and name and name.isprintable()):
                raise SourceError(f"{self.archive}: the class {name!r}: a class must have a printable name")
        if len(set(classes)) < len(classes):
            raise SourceError(f"{self.archive}: a class stands twice among {', '.join(classes)}: rename one")


class _Coco(_Reader):
    """One JSON file for each split: `instances_train2017.json`, `train/_annotations.coco.json`, `bccd_test.json`."""

    def read(self) -> Annotated:
        annotated: Annotated = {}
        categories: dict[int, str] | None = None
        for split, name in self._files().items():
            content = self._parsed(name)
            own = self._categories(content["categories"], name)
            if categories is not None and own != categories:
                raise self.refusal(name, "its categories are others than those of another split")
            categories = own
            annotated[split] = self._annotations(content, own, split, name)
        assert categories is not None
        # Only those that occur somewhere: COCO files of other tools list a super-category without any box.
        occurring = {label for images in annotated.values() for one in images.values() for label in one.labels}
        self.classes = [name for _, name in sorted(categories.items()) if name in occurring]
        self.check_classes(self.classes)
        return annotated

    def _files(self) -> dict[str, str]:
        """The annotation file of each split."""
        files: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.texts):
            path = PurePosixPath(name)
            if path.suffix != ".json":
                continue
            split = _split_named(path.stem) or _split_of(path)
            if split is None:
                self.unused["JSON files of no split"] += 1
            else:
                files[split].append(name)
        for split, names in files.items():
            if len(names) > 1:  # COCO's own archive has keypoints and captions beside them
                chosen = [name for name in names if PurePosixPath(name).name.startswith("instances_")]
                if len(chosen) != 1:
                    raise SourceError(
                        f"{self.archive}: {' and '.join(names)} are both for the {split} split: keep one, "
                        "or call it instances_*.json"
                    )
                self.unused["other JSON files"] += len(names) - 1
                files[split] = chosen
        return {split: files[split][0] for split in SPLITS if files.get(split)}

    def _parsed(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads(self.texts[name])
        except (ValueError, RecursionError) as error:
            raise self.refusal(name, f"is no JSON ({error})") from None
        keys = ("images", "annotations", "categories")
        if not isinstance(content, dict) or not all(
            isinstance(content.get(key), list) and all(isinstance(row, dict) for row in content[key]) for key in keys
        ):
            raise self.refusal(name, f"COCO's JSON is a mapping with the lists {', '.join(keys)}")
        return content

    def _categories(self, rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, str]:
        try:
            categories = {int(row["id"]): row["name"] for row in rows}
        except (KeyError, TypeError, ValueError):
            raise self.refusal(name, "a category has no id or no name") from None
        self.check_classes(list(categories.values()))
        return categories

    def _annotations(
        self, content: Mapping[str, Any], categories: Mapping[int, str], split: str, name: str
    ) -> dict[str, Annotation]:
        images: dict[Any, Annotation] = {}
        by_image: dict[str, Annotation] = {}
        for row in content["images"]:
            if not isinstance(row.get("id"), int | str) or not isinstance(row.get("file_name"), str):
                raise self.refusal(name, "an image has no id or no file_name")
            image = self.image(row["file_name"], split, name)
            if row["id"] in images or image in by_image:
                raise self.refusal(name, f"the image {row['file_name']!r} stands twice in it")
            images[row["id"]] = by_image[image] = Annotation()
            placement = self.pictures[image]
            width, height = row.get("width", placement.width), row.get("height", placement.height)
            if (width, height) != (placement.width, placement.height):
                raise self.refusal(
                    name,
                    f"{row['file_name']!r} is {placement.width}x{placement.height}, but {width}x{height} is written",
                )
        for row in content["annotations"]:
            where = f"{name}, annotation {row.get('id', '?')}"
            keys = [row.get(key) for key in ("image_id", "category_id")]
            if not all(isinstance(key, int | str) for key in keys):
                raise self.refusal(where, f"image_id and category_id are {keys[0]!r} and {keys[1]!r}, not numbers")
            annotation, category = images.get(keys[0]), categories.get(keys[1])
            if annotation is None:
                raise self.refusal(where, f"there is no image with the id {row.get('image_id')}")
            if category is None:
                raise self.refusal(where, f"there is no category with the id {row.get('category_id')}")
            x, y, width, height = _numbers(row.get("bbox"), 4, partial(self.refusal, f"{where}, bbox"))
            area = row.get("area")
            if area is not None:
                (area,) = _numbers([area], 1, partial(self.refusal, f"{where}, area"))
            annotation.add(
                (x, y, x + width, y + height),
                category,
                area=area,
                crowd=bool(row.get("iscrowd", 0)),
                difficult=bool(row.get("difficult", 0) or row.get("ignore", 0)),
            )
        return by_image


class _Voc(_Reader):
    """An XML file for each image; splits by `ImageSets/Main/{train,val,test}.txt`, or by folders."""

    def read(self) -> Annotated:
        files = {PurePosixPath(name).stem: name for name in sorted(self.texts) if name.lower().endswith(".xml")}
        annotated: Annotated = {split: {} for split in SPLITS}
        names: set[str] = set()
        listed = self._listed()
        if not listed:
            by_split = [(_split_of(PurePosixPath(name)), name) for name in files.values()]
            for name in sorted(self.texts):  # of several folders, a stem may stand in each
                if name.lower().endswith(".xml") and name not in files.values():
                    by_split.append((_split_of(PurePosixPath(name)), name))
        else:
            by_split = []
            for split, stems in listed.items():
                for stem in stems:
                    if stem not in files:
                        raise self.refusal(f"ImageSets/Main/{split}.txt", f"{stem}.xml is not in the archive")
                    by_split.append((split, files[stem]))
        for known, name in by_split:
            if known is None:
                self.unused["annotations in no split"] += 1
                continue
            image, annotation = self._annotation(name, known)
            if image in annotated[known]:
                raise self.refusal(name, f"a second annotation of the image {image}")
            annotated[known][image] = annotation
            names |= set(annotation.labels)
        self.classes = self.collect(names)
        return annotated

    def _listed(self) -> dict[str, list[str]]:
        """The stems of each split by ImageSets/Main."""
        listed = {}
        for name, content in self.texts.items():
            path = PurePosixPath(name)
            if path.parts[-3:-1] == ("ImageSets", "Main") and path.stem in SPLIT_OF:
                lines = content.decode("utf-8", "replace").split("\n")
                listed[SPLIT_OF[path.stem]] = [line.split()[0] for line in lines if line.strip()]
        return listed

    def _annotation(self, name: str, split: str) -> tuple[str, Annotation]:
        try:
            root = ElementTree.fromstring(self.texts[name])
        except (ElementTree.ParseError, ValueError) as error:
            raise self.refusal(name, f"is no XML ({error})") from None
        path = PurePosixPath(name)
        # `filename` is often that of another tool: the stem of the XML file counts.
        candidates = self.by_stem.get(path.stem, [])
        near = [image for image in candidates if _split_of(PurePosixPath(image)) == split]
        candidates = near if len(candidates) > 1 and near else candidates
        if len(candidates) != 1:
            raise self.refusal(name, f"there are {len(candidates)} images of its name, not one")
        annotation = Annotation()
        for part in root.iter("object"):
            label, frame = part.findtext("name", "").strip(), part.find("bndbox")
            corners = [None if frame is None else frame.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")]
            x1, y1, x2, y2 = _numbers(corners, 4, partial(self.refusal, f"{name}, bndbox"))
            # VOC counts pixels from 1, and the last one belongs to the box.
            annotation.add((x1 - 1, y1 - 1, x2, y2), label, difficult=part.findtext("difficult", "0").strip() == "1")
        return candidates[0], annotation


class _Yolo(_Reader):
    """A text file for each image, `class x y width height` a line as fractions; names in data.yaml or classes.txt.

    An image without a text file has no object.
    """

    def read(self) -> Annotated:
        self.classes = self._names()
        annotated: Annotated = {split: {} for split in SPLITS}
        labels = {name: content for name, content in self.texts.items() if name.lower().endswith(".txt")}
        used = set()
        for image in self.pictures:
            split = _split_of(PurePosixPath(image))
            if split is None:
                continue
            path = PurePosixPath(image).with_suffix(".txt")
            parts = list(path.parts)
            beside = next((i for i in reversed(range(len(parts))) if parts[i] == "images"), None)
            options = [str(path)]
            if beside is not None:
                options.insert(0, "/".join([*parts[:beside], "labels", *parts[beside + 1 :]]))
            label_file = next((name for name in options if name in labels), None)
            if label_file is None:
                self.unused["images without a label file, which count as empty"] += 1
                annotated[split][image] = Annotation()
            else:
                used.add(label_file)
                annotated[split][image] = self._annotation(label_file, image)
        if idle := sum(_split_of(PurePosixPath(name)) is not None for name in labels.keys() - used):
            raise SourceError(f"{self.archive}: {idle} label files have no image of their name")
        return annotated

    def _names(self) -> list[str]:
        for name in sorted(self.texts):
            if name.lower().endswith((".yaml", ".yml")):
                try:
                    content = parse_yaml(self.texts[name].decode(), name)
                except (ConfigError, ValueError, RecursionError) as error:
                    raise self.refusal(name, f"is no YAML ({' '.join(str(error).split())})") from None
                names = content.get("names") if isinstance(content, dict) else None
                if isinstance(names, dict) and set(names) == set(range(len(names))):
                    names = [names[index] for index in range(len(names))]
                if isinstance(names, list):
                    classes = [str(one) for one in names]
                    self.check_classes(classes)
                    return classes
        for name in sorted(self.texts):
            if PurePosixPath(name).name in ("classes.txt", "obj.names"):
                lines = self.texts[name].decode("utf-8", "replace").splitlines()
                classes = [line.strip() for line in lines if line.strip()]
                self.check_classes(classes)
                return classes
        raise SourceError(
            f"{self.archive}: YOLO's text files number the classes: add data.yaml with names: [...], or classes.txt"
        )

    def _annotation(self, name: str, image: str) -> Annotation:
        annotation, placement = Annotation(), self.pictures[image]
        for number, line in enumerate(self.texts[name].decode("utf-8", "replace").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{name}, line {number}"
            label, x, y, width, height = _numbers(line.split(), 5, partial(self.refusal, where))
            if label != int(label) or not 0 <= label < len(self.classes):
                raise self.refusal(where, f"class {label:g}, but there are the {len(self.classes)} from 0 on")
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            scales = (placement.width, placement.height, placement.width, placement.height)
            box = [corner * scale for corner, scale in zip(corners, scales, strict=True)]
            annotation.add(box, self.classes[int(label)])
        return annotation


def _numbers(values: Any, count: int, refusal: Callable[[str], SourceError]) -> list[float]:
    """`count` finite numbers.

    Raises:
        SourceError: made by `refusal` from what is wrong.
    """
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise refusal(f"{values!r} should be {count} numbers") from None
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise refusal(f"{values!r} should be {count} finite numbers")
    return numbers


def _layout(archive: Path, texts: Mapping[str, bytes]) -> type[_Reader]:
    """The layout that the annotation files tell.

    Raises:
        SourceError: there are none, or those of two layouts.
    """
    suffixes = Counter(PurePosixPath(name).suffix.lower() for name in texts)
    layouts = [
        reader
        for reader, is_there in (
            (_Coco, any(name.endswith(".json") and _has_split(name) for name in texts)),
            (_Voc, suffixes[".xml"] > 0),
        )
        if is_there
    ]
    if len(layouts) == 2:
        raise SourceError(f"{archive}: both COCO's JSON and VOC's XML annotations: keep one of them")
    if layouts:
        return layouts[0]
    if suffixes[".txt"]:
        return _Yolo
    raise SourceError(
        f"{archive}: no annotations: COCO's *train*.json, VOC's *.xml or YOLO's *.txt; see docs/your-data.md"
    )


def _has_split(name: str) -> bool:
    path = PurePosixPath(name)
    return (_split_named(path.stem) or _split_of(path)) is not None

"""Images with boxes: three layouts read alike, what is refused or counted, batches, and boxes that follow images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from src.data.box_augmentation import augment
from src.data.fetching.files import SourceError
from src.data.kinds.boxes import KIND, MARGIN, BoxBatches, BoxLoader, Placement
from src.data.packed import Packed
from src.data.samples import scenes
from src.data.sets.detection import DetectionFolders
from tests.tiny_data import packed_data, plain_png, png, write_tar

WIDE, HIGH = plain_png((200, 0, 0), (40, 20)), plain_png((0, 0, 200), (10, 20))
# By image: (class, x1, y1, x2, y2) in pixels.
OBJECTS: dict[str, list[tuple[str, float, float, float, float]]] = {
    "train/a.png": [("cat", 4, 2, 24, 12), ("dog", 0, 0, 40, 20)],
    "train/b.png": [],
    "val/c.png": [("dog", 1, 2, 9, 18)],
    "test/d.png": [("cat", 10, 10, 30, 20)],
}
PICTURES = {"train/a.png": WIDE, "train/b.png": HIGH, "val/c.png": HIGH, "test/d.png": WIDE}
SIZES = {name: (40, 20) if content is WIDE else (10, 20) for name, content in PICTURES.items()}
CLASSES = ["cat", "dog"]


def coco_rows(split: str) -> dict[str, Any]:
    """COCO's JSON of a split; ids start from 7 and the categories' have gaps."""
    names = [name for name in OBJECTS if name.startswith(split)]
    return {
        "images": [
            {"id": i, "file_name": name.split("/")[1], "width": SIZES[name][0], "height": SIZES[name][1]}
            for i, name in enumerate(names, 7)
        ],
        "annotations": [
            {"id": 1, "image_id": i, "category_id": {"cat": 3, "dog": 5}[c], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for i, name in enumerate(names, 7)
            for c, x1, y1, x2, y2 in OBJECTS[name]
        ],
        "categories": [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def coco(**splits: Any) -> dict[str, bytes]:
    rows = {split: coco_rows(split) for split in ("train", "val", "test")} | splits
    images = {f"mine/{name}": content for name, content in PICTURES.items()}
    return images | {f"mine/annotations/mine_{k}.json": json.dumps(v).encode() for k, v in rows.items() if v}


def voc_xml(name: str) -> bytes:
    objects = "".join(
        f"<object><name>{c}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for c, x1, y1, x2, y2 in OBJECTS[name]
    )
    return f"<annotation><filename>of another tool.jpg</filename>{objects}</annotation>".encode()


def voc() -> dict[str, bytes]:
    members = {}
    for split in ("train", "val", "test"):
        stems = [Path(name).stem for name in OBJECTS if name.startswith(split)]
        members[f"VOC/ImageSets/Main/{split}.txt"] = "\n".join(stems).encode() + b"\n"
    members["VOC/ImageSets/Main/cat_train.txt"] = b"a  1\nb -1\n"
    for name, content in PICTURES.items():
        members[f"VOC/JPEGImages/{Path(name).name}"] = content
        members[f"VOC/Annotations/{Path(name).stem}.xml"] = voc_xml(name)
    return members


def yolo_lines(name: str) -> bytes:
    width, height = SIZES[name]
    lines = [
        (CLASSES.index(c), (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        for c, x1, y1, x2, y2 in OBJECTS[name]
    ]
    return "".join(" ".join(map(str, line)) + "\n" for line in lines).encode()


def yolo() -> dict[str, bytes]:
    members = {"mine/data.yaml": b"names: {0: cat, 1: dog}\n"}
    for name, content in PICTURES.items():
        members[f"mine/images/{name}"] = content
        members[f"mine/labels/{Path(name).with_suffix('.txt')}"] = yolo_lines(name)
    return members


def pack(members: Mapping[str, bytes], folder: Path, **options: Any) -> Packed:
    return packed_data(DetectionFolders(**{"size": [20, 20], **options}), write_tar(folder / "mine.tar", members))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [coco, voc, yolo])
def test_every_layout_gives_the_same_images_and_boxes(layout: Any, tmp_path: Path) -> None:
    packed = pack(layout(), tmp_path)
    assert packed.meta["classes"] == CLASSES
    train = packed.splits["train"]
    # The wide picture is halved, and lies 5 pixels below the upper edge; the high one 5 pixels from the left.
    np.testing.assert_allclose(train["boxes"], [[2, 6, 12, 11], [0, 5, 20, 15]], atol=1e-5)
    assert train["labels"].tolist() == [0, 1]
    assert train["offsets"].tolist() == [0, 2, 2]
    assert train["sizes"].tolist() == [[20, 40], [20, 10]]
    np.testing.assert_allclose(train["areas"], [200, 800], rtol=1e-5)
    np.testing.assert_allclose(packed.splits["val"]["boxes"], [[6, 2, 14, 18]], atol=1e-5)
    np.testing.assert_allclose(packed.splits["test"]["boxes"], [[5, 10, 15, 15]], atol=1e-5)
    image = train["images"][0]
    assert (image[:, 4] == MARGIN).all()
    assert image[:, 5].T.tolist() == [[200, 0, 0]] * 20


def test_a_stretched_picture_fills_the_image(tmp_path: Path) -> None:
    train = pack(coco(), tmp_path, fit="stretch", size=[10, 80]).splits["train"]
    assert (train["images"][0] == np.array([200, 0, 0])[:, None, None]).all()
    np.testing.assert_allclose(train["boxes"][0], [8, 1, 48, 6], atol=1e-5)


def test_flags_and_areas_of_annotations_are_kept(tmp_path: Path) -> None:
    rows = coco_rows("train")
    rows["annotations"][0] |= {"iscrowd": 1, "area": 12.5}
    rows["annotations"][1] |= {"difficult": 1}
    train = pack(coco(train=rows), tmp_path).splits["train"]
    assert (train["crowd"].tolist(), train["difficult"].tolist()) == ([1, 0], [0, 1])
    assert train["areas"].tolist() == [12.5, 800]


def test_difficult_objects_of_voc_are_marked(tmp_path: Path) -> None:
    members = voc()
    xml = members["VOC/Annotations/a.xml"].replace(b"<difficult>0", b"<difficult>1", 1)
    assert pack(members | {"VOC/Annotations/a.xml": xml}, tmp_path).splits["train"]["difficult"].tolist() == [1, 0]


def test_a_val_split_alone_is_the_one_to_test_on(tmp_path: Path) -> None:
    members = {name: content for name, content in coco(test=None).items() if "/test/" not in name}
    packed = pack(members, tmp_path)
    assert packed.splits["test"]["labels"].tolist() == [1]
    assert len(packed.splits["train"]["images"]) == len(packed.splits["val"]["images"]) == 1


def test_of_cocos_own_archive_the_instances_are_read(tmp_path: Path) -> None:
    captions = {"mine/annotations/captions_train2017.json": b"[]"}
    members = coco(train=None) | captions
    members["mine/annotations/instances_train2017.json"] = json.dumps(coco_rows("train")).encode()
    packed = pack(members, tmp_path)
    assert packed.splits["train"]["labels"].tolist() == [0, 1]
    assert packed.unused == {"other JSON files": 1}


@pytest.mark.parametrize(
    ("box", "reason", "kept"),
    [
        ([4, 2, 0, 10], "boxes of no area", None),
        ([4, 2, 10, -3], "boxes of no area", None),
        ([50, 2, 10, 10], "boxes outside their picture", None),
        ([30, 2, 30, 10], "boxes cut off at the edge of their picture", [30, 2, 40, 12]),
        ([30, 2, 10.5, 10], None, [30, 2, 40, 12]),
    ],
)
def test_a_box_that_is_none_is_counted_and_one_beyond_the_edge_is_cut(
    box: list[float], reason: str | None, kept: list[float] | None, tmp_path: Path
) -> None:
    rows = coco_rows("train")
    rows["annotations"] = [rows["annotations"][1], rows["annotations"][0] | {"bbox": box}]
    packed = pack(coco(train=rows), tmp_path, fit="stretch", size=[20, 40])
    assert packed.unused == ({reason: 1} if reason else {})
    np.testing.assert_allclose(packed.splits["train"]["boxes"][1:], [kept] if kept else np.zeros((0, 4)))


def changed(split: str, key: str, **values: Any) -> dict[str, bytes]:
    """COCO's layout with values of the first row of a list replaced."""
    rows = coco_rows(split)
    rows[key][0] |= values
    return coco(**{split: rows})


REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "no annotations": ({"mine/train/a.png": WIDE}, "no annotations: COCO's"),
    "no train split": (coco(train=None), "no images of a train split"),
    "no json": (coco() | {"mine/annotations/mine_train.json": b"{"}, "mine_train.json: is no JSON"),
    "another json": (coco() | {"mine/annotations/mine_train.json": b"[1]"}, "a mapping with the lists images"),
    "category": (changed("train", "annotations", category_id=4), "annotation 1: there is no category with the id 4"),
    "image id": (changed("train", "annotations", image_id=99), "annotation 1: there is no image with the id 99"),
    "list as id": (changed("train", "images", id=[7]), "an image has no id or no file_name"),
    "list as category": (changed("train", "annotations", category_id=[3]), "are 7 and \\[3\\], not numbers"),
    "no image id": (changed("train", "annotations", image_id=None), "are None and 3, not numbers"),
    "huge number": (changed("val", "annotations", bbox=[1, 2, 10**400, 4]), "should be 4 numbers"),
    "yolo keys": (yolo() | {"mine/data.yaml": b"names: {0: cat, x: dog}\n"}, "YOLO's text files number the classes"),
    "three numbers": (changed("val", "annotations", bbox=[1, 2, 3]), "annotation 1, bbox: \\[1, 2, 3\\] should be 4"),
    "nan": (changed("val", "annotations", bbox=[1, 2, float("nan"), 4]), "should be 4 finite numbers"),
    "words": (changed("val", "annotations", bbox="oops"), "'oops' should be 4 numbers"),
    "missing image": (changed("train", "images", file_name="z.png"), "its image 'z.png' is not in the archive"),
    "other size": (changed("train", "images", width=41), "'a.png' is 40x20, but 41x20 is written"),
    "other categories": (changed("val", "categories", name="cow"), "its categories are others"),
    "two files": (
        coco() | {"mine/annotations/more_train.json": json.dumps(coco_rows("train")).encode()},
        "are both for the train split",
    ),
    "two layouts": (coco() | {"mine/a.xml": b"<a/>"}, "both COCO's JSON and VOC's XML"),
    "no xml": (voc() | {"VOC/Annotations/a.xml": b"<a>"}, "a.xml: is no XML"),
    "xml without image": (
        {name: content for name, content in voc().items() if not name.endswith("a.png")},
        "a.xml: there are 0 images of its name",
    ),
    "no bndbox": (voc() | {"VOC/Annotations/a.xml": b"<a><object/></a>"}, "a.xml, bndbox: .* should be 4 numbers"),
    "yolo class": (yolo() | {"mine/labels/val/c.txt": b"2 .5 .5 .1 .1"}, "c.txt, line 1: class 2, but there are the 2"),
    "yolo words": (yolo() | {"mine/labels/val/c.txt": b"\n1 .5 .5 .1"}, "c.txt, line 2: .* should be 5 finite"),
    "yolo names": (yolo() | {"mine/data.yaml": b"nc: 2\n"}, "YOLO's text files number the classes"),
    "label without image": (yolo() | {"mine/labels/val/x.txt": b""}, "1 label files have no image of their name"),
    "broken image": (coco() | {"mine/train/a.png": WIDE[:30]}, "a.png can't be read as an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_annotations_are_refused_by_name(name: str, tmp_path: Path) -> None:
    members, message = REFUSED[name]
    with pytest.raises(SourceError, match=message):
        pack(members, tmp_path)


def test_a_hundred_pictures_of_one_name_in_three_folders_are_told_apart(tmp_path: Path) -> None:
    """Each split numbers its images from 1."""
    members = {}
    for split, colour in (("train", 10), ("val", 20), ("test", 30)):
        members[f"mine/{split}/1.png"] = plain_png((colour, 0, 0), (20, 20))
        rows = {"images": [{"id": 1, "file_name": "1.png"}], "categories": [{"id": 1, "name": "cat"}]}
        rows["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}]
        members[f"mine/{split}/_annotations.coco.json"] = json.dumps(rows).encode()
    packed = pack(members, tmp_path)
    assert [packed.splits[split]["images"][0, 0, 0, 0] for split in ("train", "val", "test")] == [10, 20, 30]


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(640, 427), (33, 500), (1, 1), (7, 3)])
def test_a_box_comes_back_from_the_packed_image(fit: Literal["stretch", "letterbox"], size: tuple[int, int]) -> None:
    width, height = size
    placement = Placement.of(width, height, (240, 320), fit)
    boxes = np.array([[0, 0, width, height], [width / 4, height / 3, width / 2, height]], np.float64)
    packed = placement.to_packed(boxes)
    assert (packed >= 0).all()
    assert (packed <= [320, 240, 320, 240]).all()
    np.testing.assert_allclose(placement.to_original(packed), boxes, atol=1e-3)


# --- the sample -------------------------------------------------------------------------------------------------------


def test_the_sample_s_boxes_hold_shapes_of_their_class_s_colour(tmp_path: Path) -> None:
    scenes.draw(tmp_path / "scenes.tar", train=12, val=3, test=3)
    packed = packed_data(DetectionFolders(size=[112, 112]), tmp_path / "scenes.tar")
    assert packed.meta["classes"] == list(scenes.CLASSES)
    train = packed.splits["train"]
    assert 0 in np.diff(train["offsets"]) and np.diff(train["offsets"]).max() >= 4
    strongest = []
    for index in range(12):
        for row in range(*train["offsets"][index : index + 2]):
            x1, y1, x2, y2 = train["boxes"][row].round().astype(int)
            middle = train["images"][index][:, (y1 + y2) // 2, (x1 + x2) // 2]
            strongest.append(int(middle.argmax()) == [0, 2, 1][train["labels"][row]])
    assert np.mean(strongest) > 0.8  # in the others something lies before the middle


def test_the_sample_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scenes.draw(tmp_path / name, train=2, val=1, test=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- batches ----------------------------------------------------------------------------------------------------------

SIZE = 64


def split_of(boxes: list[list[list[float]]], **flags: list[int]) -> dict[str, Tensor]:
    """A split whose images are grey with a white rectangle for each box."""
    images = torch.full((len(boxes), 3, SIZE, SIZE), MARGIN, dtype=torch.uint8)
    for image, rows in zip(images, boxes, strict=True):
        for x1, y1, x2, y2 in rows:
            image[:, int(y1) : int(y2), int(x1) : int(x2)] = 255
    flat = torch.tensor([row for rows in boxes for row in rows]).view(-1, 4)
    counts = torch.tensor([0, *map(len, boxes)])
    return {
        "images": images,
        "sizes": torch.full((len(boxes), 2), SIZE, dtype=torch.int32),
        "offsets": counts.cumsum(0),
        "boxes": flat,
        "labels": torch.arange(len(flat)) % 3,
        "areas": (flat[:, 2:] - flat[:, :2]).prod(-1),
        **{k: torch.tensor(flags.get(k, [0] * len(flat)), dtype=torch.uint8) for k in ("crowd", "difficult")},
    }


def batches(split: dict[str, Tensor], *, train: bool = True, seed: int = 0, **options: Any) -> BoxBatches:
    loader = BoxLoader(batch_size=4, eval_batch_size=4, **options)
    return BoxBatches(split, {"kind": "boxes"}, loader, train=train, seed=seed)


BOXES = [[[8.0, 8, 24, 40]], [], [[4.0, 30, 20, 50], [30.0, 4, 60, 20]], [[0.0, 0, 64, 64]]]


def test_a_batch_has_a_row_for_each_box_and_the_label_minus_one_beyond() -> None:
    images, boxes, labels, ignored = next(iter(batches(split_of(BOXES), train=False)))
    assert images.shape == (4, 3, SIZE, SIZE)
    assert labels.tolist() == [[0, -1], [-1, -1], [1, 2], [0, -1]]
    assert boxes[2].tolist() == BOXES[2]
    assert not boxes[1].any()
    assert not ignored.any()


def test_crowds_are_ignored_always_and_difficult_objects_in_evaluation() -> None:
    split = split_of(BOXES, crowd=[1, 0, 0, 0], difficult=[0, 1, 0, 0])
    assert batches(split, train=False).collate(torch.arange(4), 0)[3].sum(1).tolist() == [1, 0, 1, 0]
    assert batches(split).collate(torch.arange(4), 0)[3].sum(1).tolist() == [1, 0, 0, 0]


def test_a_split_without_any_box_has_batches() -> None:
    images, boxes, labels, _ = next(iter(batches(split_of([[], []]), train=False)))
    assert (len(images), boxes.shape, labels.tolist()) == (2, (2, 1, 4), [[-1], [-1]])


ALL: dict[str, Any] = {"flip": "random", "zoom_out": 0.5, "iou_crop": 0.7, "photometric": 0.5}


def test_a_batch_depends_on_seed_epoch_and_number_alone() -> None:
    def make(seed: int = 0, epoch: int = 0, index: int = 0) -> tuple[Tensor, ...]:
        source = batches(split_of(BOXES), seed=seed, **ALL)
        source.set_epoch(epoch)
        return source.collate(torch.arange(4), index)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, make(), strict=True))
    for other in (make(seed=1), make(epoch=1), make(index=1)):
        assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("options", [{"flip": "random"}, {"zoom_out": 1.0}, {"iou_crop": 1.0}, ALL], ids=str)
def test_boxes_follow_their_objects(options: dict[str, Any]) -> None:
    """In each augmented image the light pixels span the box."""
    rows: list[list[list[float]]] = [[[8.0, 12, 40, 52]]] * 4
    source = batches(split_of(rows), **(options | {"photometric": 0.0}), crop_smallest=0.5, zoom_largest=2.0)
    seen, moved = 0, 0
    for index in range(20):
        images, boxes, labels, _ = source.collate(torch.arange(4), index)
        assert images.shape == (4, 3, SIZE, SIZE) and images.dtype == torch.uint8
        for image, box, label in zip(images, boxes[:, 0], labels[:, 0], strict=True):
            if label < 0:
                continue
            y, x = torch.nonzero(image[0] > (MARGIN + 255) // 2, as_tuple=True)
            spanned = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (spanned - box).abs().max() <= 1.5, (spanned, box)
            seen += 1
            moved += not torch.equal(box, torch.tensor(rows[0][0]))
    assert seen > 60
    assert moved > 10


def test_a_crop_drops_the_boxes_whose_centre_it_cuts_off_and_the_others_come_first() -> None:
    source = batches(split_of([[[0.0, 0, 6, 6], [40.0, 40, 60, 60]]] * 4), iou_crop=1.0)
    counts = set()
    for index in range(20):
        _, _, labels, _ = source.collate(torch.arange(4), index)
        assert all(row.tolist() in ([0, 1], [1, 2], [2, 0], [0, -1], [1, -1], [2, -1]) for row in labels)
        counts |= set((labels >= 0).sum(1).tolist())
    assert counts == {1, 2}


def test_colours_change_and_boxes_stay() -> None:
    split = split_of(BOXES)
    split["images"] = torch.randint(256, split["images"].shape, dtype=torch.uint8)
    still, _, _, _ = batches(split).collate(torch.arange(4), 0)
    images, boxes, labels, _ = batches(split, photometric=1.0).collate(torch.arange(4), 0)
    assert torch.equal(still, split["images"])
    assert (images != still).any(dim=(1, 2, 3)).all()
    assert torch.equal(boxes[2], torch.tensor(BOXES[2]))
    assert labels.tolist() == [[0, -1], [-1, -1], [1, 2], [0, -1]]


def test_hue_and_saturation_leave_grey_as_it_is() -> None:
    """With all else at rest, a change of colours turns grey into grey."""
    grey = torch.full((64, 3, 8, 8), 100, dtype=torch.uint8)
    none = torch.zeros(64, 1, 4), torch.full((64, 1), -1), torch.zeros(64, 1, dtype=torch.bool)
    loader = BoxLoader(batch_size=4, photometric=1.0)
    images, *_ = augment(grey, *none, loader, margin=MARGIN, random=torch.Generator().manual_seed(0))
    spread = images.amax((1, 2, 3)).int() - images.amin((1, 2, 3)).int()
    assert int(spread.max()) <= 2
    assert 86 <= int(images.min()) < 95 and 105 < int(images.max()) <= 114  # brightness alone changes it, by an eighth


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_predict_reads_a_photo_as_packing_does(fit: str, tmp_path: Path) -> None:
    members = coco()
    members["mine/train/a.png"] = png(np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8))
    packed = pack(members, tmp_path, fit=fit, size=[13, 17])
    (tmp_path / "a.png").write_bytes(members["mine/train/a.png"])
    signature = KIND.signature(packed.meta, BoxLoader(batch_size=1)) | {"name": "cats"}
    image = KIND.read(str(tmp_path / "a.png"), signature)["image"]
    np.testing.assert_array_equal(image[0], packed.splits["train"]["images"][0])

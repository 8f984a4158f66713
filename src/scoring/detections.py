"""Detections against the objects that are there: errors by their kind, and how far two sets of detections differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Kinds of errors, as TIDE (Bolya et al., 2020) tells them apart, each counted once.
MISSED, INVENTED, DOUBLED, MISPLACED, MISNAMED = KINDS = ("missed", "invented", "doubled", "misplaced", "misnamed")
NEAR = 0.1  # overlap from which a detection with too little of it counts as misplaced, not as invented


@dataclass(frozen=True)
class Objects:
    """The objects of one image: boxes float [N, 4] xyxy, labels int [N], and scores float [N].

    Detections come in the order of their scores, the best first.
    `ignored`, bool [N]: crowds and difficult objects, which need not be found.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    ignored: np.ndarray

    @classmethod
    def found(cls, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Objects:
        """Detections."""
        return cls(boxes, labels, scores, np.zeros(len(boxes), bool))

    @classmethod
    def annotated(cls, boxes: np.ndarray, labels: np.ndarray, ignored: np.ndarray) -> Objects:
        """The objects that are there."""
        return cls(boxes, labels, np.ones(len(boxes), np.float32), ignored)

    def above(self, score: float) -> Objects:
        """Those with at least this score."""
        rows = self.scores >= score
        return Objects(self.boxes[rows], self.labels[rows], self.scores[rows], self.ignored[rows])


@dataclass(frozen=True)
class Verdict:
    """What becomes of a detection or of an object that no detection found.

    `kind`: one of KINDS, or "found". `actual` and `predicted` are labels, None where there is no object or no
    detection.
    """

    kind: str
    box: np.ndarray  # of the detection; of a missed object its own
    score: float  # of a missed object 1
    actual: int | None
    predicted: int | None


def intersection_over_union(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of xyxy boxes [N, 4] and others [M, 4]: intersection over union, and over the area of the first; [N, M] each."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (opposite - corner).clip(0).prod(-1)
    area, other_area = ((part[:, 2:] - part[:, :2]).prod(-1) for part in (boxes, others))
    union = area[:, None] + other_area[None] - shared
    return shared / np.maximum(union, 1e-9), shared / np.maximum(area[:, None], 1e-9)


def verdicts(found: Objects, annotated: Objects, overlap: float = 0.5) -> list[Verdict]:
    """Judges the detections of one image, the best first, and names the objects that none of them found.

    A detection finds the object of its class that it overlaps most, from `overlap` on, unless a better one has found
    it. Else it is `doubled` where that object has been found; `misnamed` where it overlaps an object of another class
    as much; `misplaced` where it overlaps an object of its class from NEAR on; and `invented`. An object is `missed`
    where no detection found, misnamed or misplaced it. A detection that lies mostly in an ignored object of its class,
    or finds it, has no verdict.
    """
    iou, inside = intersection_over_union(found.boxes, annotated.boxes)
    is_free = np.ones(len(annotated.boxes), bool)
    is_seen = annotated.ignored.copy()
    result = []
    for row, (box, label, score) in enumerate(zip(found.boxes, found.labels, found.scores, strict=True)):
        same = (annotated.labels == label) & ~annotated.ignored
        other = (annotated.labels != label) & ~annotated.ignored
        candidates = {
            "found": (iou[row] >= overlap) & same & is_free,
            DOUBLED: (iou[row] >= overlap) & same,
            MISNAMED: (iou[row] >= overlap) & other,
            MISPLACED: (iou[row] >= NEAR) & same,
        }
        excused = annotated.ignored & (annotated.labels == label)
        is_excused = (np.maximum(iou[row], inside[row])[excused] >= overlap).any()
        kind = next((kind for kind, rows in candidates.items() if rows.any()), INVENTED)
        if kind != "found" and is_excused:
            continue
        actual = None
        if kind != INVENTED:
            chosen = int(np.where(candidates[kind], iou[row], -1).argmax())
            actual = int(annotated.labels[chosen])
            is_seen[chosen] = True
            if kind == "found":
                is_free[chosen] = False
        result.append(Verdict(kind, box, float(score), actual, int(label)))
    for column in np.flatnonzero(~is_seen):
        result.append(Verdict(MISSED, annotated.boxes[column], 1.0, int(annotated.labels[column]), None))
    return result


def difference(expected: Objects, actual: Objects, *, size: float, suppression: float, tolerance: float) -> float:
    """How far two sets of detections of one image differ: the largest difference of a score, or of a corner in sizes.

    Each detection is compared with the one of its class that it overlaps most. Two engines whose numbers differ in the
    last digits may rank equal scores the other way round, and so keep the other of two boxes that overlap by just the
    threshold of suppression, or another one as the last of those that are kept. What is explained by that, within the
    tolerance, is no difference; any other detection that only one of them has is: its score.
    """
    largest = 0.0
    for some, others in ((expected, actual), (actual, expected)):
        iou, _ = intersection_over_union(some.boxes, others.boxes)
        iou = np.where(some.labels[:, None] == others.labels[None], iou, -1.0)
        last = float(others.scores.min(initial=1.0))
        for row, overlaps in enumerate(iou):
            best = int(overlaps.argmax()) if len(overlaps) else -1
            if best >= 0 and overlaps[best] > 0.95:
                corners = np.abs(some.boxes[row] - others.boxes[best]).max() / size
                largest = max(largest, float(corners), float(abs(some.scores[row] - others.scores[best])))
                continue
            is_last = some.scores[row] <= last + tolerance
            is_borderline = (overlaps >= suppression - 10 * tolerance).any()
            if not (is_last or is_borderline):
                largest = max(largest, float(some.scores[row]))
    return largest


def confusion(judged: Sequence[Verdict], classes: Sequence[str]) -> list[tuple[str, str]]:
    """(actual, predicted) of each verdict, "nothing" where there is no object or no detection."""

    def name(label: int | None) -> str:
        return "nothing" if label is None else classes[label]

    return [(name(verdict.actual), name(verdict.predicted)) for verdict in judged]

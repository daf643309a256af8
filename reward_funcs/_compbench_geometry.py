"""T2I-CompBench's rules on boxes: where two objects stand, and which boxes are one object. Pure, in plain floats.

    2D-spatial = s1/4 + s2/4 + place/2, then 0 where below 1/2      (UniDet_eval/2D_spatial_eval.py)
    place      = 1 along the right axis if IoU < 0.1, else 0.1 / IoU

Boxes are (x0, y0, x1, y1), y downwards, in the evaluator's frame: before it detects, it brings every picture to a short
side of 479 and a long side of at most 480 (experts/model_bank.py), so its 150 pixels are 0.31 of a square picture's
side. `in_frame` brings boxes there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reward_funcs._compbench_words import PUBLISHED_RELATIONS, RELATIONS

Box = Sequence[float]
SHORT_SIDE, LONG_SIDE = 479, 480
NEAR = 150.0  # determine_position, distance_threshold
OVERLAP = 0.1  # determine_position, iou_threshold
CUT = 0.5  # a score below is 0
SAME = 0.9  # numeracy_eval.py, calculate_iou


def in_frame(detections: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The detections, most confident first, with boxes scaled from a picture of (width, height) to the frame."""
    scale = min(SHORT_SIDE / min(size), LONG_SIDE / max(size))
    ordered = sorted(detections, key=lambda found: -found["score"])
    return [{**found, "box": tuple(scale * edge for edge in found["box"])} for found in ordered]


def intersection(first: Box, second: Box, pixel: float = 0.0) -> float:
    """Area common to both. pixel: added to every side, for code that counts the last pixel in."""
    width = min(first[2], second[2]) - max(first[0], second[0]) + pixel
    height = min(first[3], second[3]) - max(first[1], second[1]) + pixel
    return max(width, 0.0) * max(height, 0.0)


def area(box: Box, pixel: float = 0.0) -> float:
    """Area of a box."""
    return (box[2] - box[0] + pixel) * (box[3] - box[1] + pixel)


def iou(first: Box, second: Box) -> float:
    """Intersection over union; 0 where both boxes are empty."""
    common = intersection(first, second)
    union = area(first) + area(second) - common
    return common / union if union > 0 else 0.0


def offset(first: Box, second: Box) -> tuple[float, float]:
    """From the first centre to the second, (right, down)."""
    return (second[0] + second[2] - first[0] - first[2]) / 2, (second[1] + second[3] - first[1] - first[3]) / 2


def along_axis(side: str, first: Box, second: Box) -> float:
    """How well the first box stands "left", "right", "above" or "below" the second, in [0, 1].

    The offset must point that way and be longer on that axis than on the other; a tie counts as no.
    """
    right, down = offset(first, second)
    along = {"left": right, "right": -right, "above": down, "below": -down}[side]
    across = down if side in ("left", "right") else right
    if along <= abs(across):
        return 0.0
    overlap = iou(first, second)
    return 1.0 if overlap < OVERLAP else OVERLAP / overlap


def published_place(words: str, first: Box, second: Box) -> float:
    """determine_position as released: near if ONE of the axes is closer than 150, "on top of" and all else 0."""
    if words not in PUBLISHED_RELATIONS or words == "on top of":
        return 0.0
    if RELATIONS[words] != "near":
        return along_axis(RELATIONS[words], first, second)
    right, down = (abs(part) for part in offset(first, second))
    return 1.0 if min(right, down) < NEAR else NEAR / max(right, down)


def corrected_place(words: str, first: Box, second: Box) -> float:
    """The same with a branch for every relation, and near by the distance of the centres, as the paper words it.

    As released, two objects in one row are near at any distance.
    """
    if RELATIONS[words] != "near":
        return along_axis(RELATIONS[words], first, second)
    distance = math.hypot(*offset(first, second))
    return 1.0 if distance < NEAR else NEAR / distance


def pair_score(
    place: Callable[[str, Box, Box], float],
    words: str,
    first: Mapping[str, Any] | None,
    second: Mapping[str, Any] | None,
) -> float:
    """s1/4 + s2/4 + place/2 of two detections in the frame; without the one that is missing, s/4."""
    score = sum(found["score"] for found in (first, second) if found is not None) / 4
    if first is not None and second is not None:
        score += place(words, first["box"], second["box"]) / 2
    return score


def cut(score: float) -> float:
    """The score, or 0 below a half."""
    return score if score >= CUT else 0.0


def without_duplicates(detections: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Detections in order, less those of an earlier one's class that share over 0.9 of the union or of either area.

    The last pixel counts in, as in numeracy_eval.py.
    """
    kept: list[Mapping[str, Any]] = []
    for found in detections:
        if not any(found["class"] == other["class"] and same_object(found["box"], other["box"]) for other in kept):
            kept.append(found)
    return kept


def same_object(first: Box, second: Box) -> bool:
    """Whether two boxes share more than 0.9 of their union, of the first, or of the second."""
    common = intersection(first, second, pixel=1.0)
    areas = area(first, pixel=1.0), area(second, pixel=1.0)
    return common / min(*areas, sum(areas) - common) > SAME


def suppress(detections: Sequence[Mapping[str, Any]], limit: float) -> list[Mapping[str, Any]]:
    """Non-maximum suppression in each class: less the boxes whose IoU with a more confident one is over `limit`."""
    kept: list[Mapping[str, Any]] = []
    for found in sorted(detections, key=lambda found: -found["score"]):
        if not any(found["class"] == other["class"] and iou(found["box"], other["box"]) > limit for other in kept):
            kept.append(found)
    return kept

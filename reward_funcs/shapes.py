"""Judge of the shapes world, from pixels alone: find the shapes, then apply GenEval's rule and an exact inventory.

Finding: pixels that are not background grey form connected components; each component's colour is the nearest palette
entry of its pixels, its class the outline that overlaps it best. Nothing of the renderer is read: the outlines below
are drawn here, from their own formulas.

Values:
    ``inventory``  partial credit in [0, 1], 1 only for exactly the objects asked for (default for training)
    ``exact``      1.0 if ``inventory`` is 1, else 0.0
    ``correct``    GenEval's benchmark rule, which allows extra objects
GenEval's rule alone is gamed by drawing extra shapes, so the default value counts them.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward_funcs.geneval import judge, relative_position

COLOR_VALUES: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.96, 0.55, 0.10),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.15, 0.62, 0.25),
    "blue": (0.15, 0.30, 0.85),
    "purple": (0.55, 0.20, 0.70),
    "black": (0.06, 0.06, 0.06),
    "white": (0.97, 0.97, 0.97),
}
GREY_LEVELS = (0.46, 0.72)  # background brightness, with room on both sides
FOREGROUND_DISTANCE = 0.19  # RGB distance from the grey background segment
MIN_AREA = 8  # pixels; smaller specks are noise of the image tokenizer
MIN_OVERLAP = 0.62  # best outline overlap below which a component is "unknown"
CANVAS = 24  # side of the square on which outlines are compared
VALUES = ("inventory", "exact", "correct")


def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(CANVAS) + 0.5) / CANVAS
    return np.meshgrid(axis, axis)


@functools.cache
def outlines() -> dict[str, np.ndarray]:
    """Boolean mask of each class on the unit square, ``(CANVAS, CANVAS)``, aspect ratio kept."""
    x, y = _grid()
    u, v = 2 * x - 1, 2 * y - 1
    radius = np.hypot(u, v)
    inside = np.ones_like(x, dtype=bool)
    # Implicit heart curve, scaled to fill the square.
    hx, hy = 1.14 * u, -1.18 * v + 0.1
    heart = (hx**2 + hy**2 - 1) ** 3 - hx**2 * hy**3 <= 0
    crescent = (radius <= 1) & (np.hypot(x - 0.8, y - 0.5) > 0.4)
    return {
        "circle": radius <= 1,
        "square": inside,
        "triangle": np.abs(u) <= y,
        "diamond": np.abs(u) + np.abs(v) <= 1,
        "cross": (np.abs(u) <= 1 / 3) | (np.abs(v) <= 1 / 3),
        "ring": (radius <= 1) & (radius > 0.46),
        "frame": np.maximum(np.abs(u), np.abs(v)) > 0.5,
        "bar": np.abs(v) <= 0.44,
        "pillar": np.abs(u) <= 0.44,
        "crescent": crescent,
        "heart": heart,
        "hourglass": np.abs(u) <= 0.2 + 0.8 * np.abs(v),
    }


@functools.cache
def _fitted_outlines() -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and their outlines cut to their bounding box and centred, ``(classes, CANVAS, CANVAS)``."""
    masks = outlines()
    return tuple(masks), np.stack([_fit(mask) for mask in masks.values()])


def _fit(mask: np.ndarray) -> np.ndarray:
    """Scale the mask's bounding box to fill the canvas along its longer side, centred, aspect ratio kept."""
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    height, width = rows.max() - top + 1, columns.max() - left + 1
    side = max(height, width)
    centre = (np.arange(CANVAS) + 0.5) / CANVAS * side
    r = np.floor(centre - (side - height) / 2).astype(int)
    c = np.floor(centre - (side - width) / 2).astype(int)
    inside = ((r >= 0) & (r < height))[:, None] & ((c >= 0) & (c < width))[None, :]
    return mask[top + r.clip(0, height - 1)][:, left + c.clip(0, width - 1)] & inside


def classify_outline(mask: np.ndarray) -> tuple[str, float]:
    """Best class for one component and its overlap (intersection over union) with that class's outline."""
    names, references = _fitted_outlines()
    fitted = _fit(mask)
    overlap = (references & fitted).sum(axis=(1, 2)) / (references | fitted).sum(axis=(1, 2))
    best = int(overlap.argmax())
    return names[best], float(overlap[best])


def foreground(pixels: np.ndarray) -> np.ndarray:
    """True where a pixel is far from every grey of the background, ``(height, width)``; pixels in [0, 1]."""
    level = pixels.mean(axis=-1).clip(*GREY_LEVELS)
    return np.linalg.norm(pixels - level[..., None], axis=-1) > FOREGROUND_DISTANCE


def detect(image: Any) -> list[dict[str, Any]]:
    """Objects in a picture as GenEval detections: ``{"class", "box" (xyxy, pixels), "score", "color"}``.

    ``score`` is the overlap with the class's outline; a component unlike every outline has class ``unknown``.
    """
    from scipy import ndimage

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    palette = np.asarray(list(COLOR_VALUES.values()), dtype=np.float32)
    nearest = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(axis=-1)
    labels, count = ndimage.label(foreground(pixels), structure=np.ones((3, 3)))
    found = []
    for index in range(1, count + 1):
        component = labels == index
        if component.sum() < MIN_AREA:
            continue
        name, overlap = classify_outline(component)
        rows, columns = np.nonzero(component)
        color = list(COLOR_VALUES)[np.bincount(nearest[component], minlength=len(palette)).argmax()]
        found.append(
            {
                "class": name if overlap >= MIN_OVERLAP else "unknown",
                "box": [float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)],
                "score": overlap,
                "color": color,
            }
        )
    return found


@dataclass(frozen=True)
class Judgement:
    """What the judge says of one picture; ``extra`` is the number of objects beyond those asked for, or below 0."""

    inventory: float
    exact: float
    correct: float
    extra: int


def judge_image(image: Any, metadata: dict[str, Any]) -> Judgement:
    """Detect, then judge by GenEval's rule and by inventory."""
    detections = detect(image)
    # The outline overlap already decided what counts as an object, so GenEval's score thresholds are switched off.
    verdict = judge(detections, metadata, threshold=0.0, counting_threshold=0.0)
    inventory = inventory_score(detections, metadata)
    asked = sum(clause["count"] for clause in metadata["include"])
    return Judgement(inventory, float(inventory == 1.0), float(verdict.correct), len(detections) - asked)


def inventory_score(detections: list[dict[str, Any]], metadata: dict[str, Any]) -> float:
    """Credit of the best one-to-one matching of asked and found objects, over the larger of the two numbers.

    A pair earns 1 for the right class, half of it for the colour where one is asked. A relation that does not hold
    between the matched objects halves the sum. Missing and extra objects both enlarge the denominator.
    """
    from scipy.optimize import linear_sum_assignment

    asked = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    if not detections:
        return 0.0
    credit = np.asarray([[_credit(clause, found) for found in detections] for clause in asked])
    rows, columns = linear_sum_assignment(credit, maximize=True)
    score = float(credit[rows, columns].sum()) / max(len(asked), len(detections))
    matched = {asked_index: detections[found] for asked_index, found in zip(rows, columns, strict=True)}
    return score if _relations_hold(metadata["include"], matched) else score / 2


def _credit(clause: dict[str, Any], found: dict[str, Any]) -> float:
    right_class = float(found["class"] == clause["class"])
    if "color" not in clause:
        return right_class
    return 0.5 * right_class + 0.5 * float(found["color"] == clause["color"])


def _relations_hold(clauses: list[dict[str, Any]], matched: dict[int, dict[str, Any]]) -> bool:
    """Every ``position`` clause holds between the matched objects (index of the first object of each clause)."""
    first = np.cumsum([0, *(clause["count"] for clause in clauses)])
    for index, clause in enumerate(clauses):
        if "position" not in clause:
            continue
        relation, target = clause["position"]
        moved, reference = matched.get(int(first[index])), matched.get(int(first[target]))
        if moved is None or reference is None or relation not in relative_position(moved["box"], reference["box"]):
            return False
    return True


def reward(
    prompts: list[str], completions: list[Any], metadata: list[str], value: str = "inventory", **columns: Any
) -> list[float | None]:
    """One value an image; ``None`` where there is no image. ``metadata`` are GenEval-shaped JSON strings."""
    if value not in VALUES:
        raise ValueError(f"value={value!r} is unknown; choose one of {', '.join(VALUES)}")
    rewards: list[float | None] = []
    for image, described in zip(completions, metadata, strict=True):
        rewards.append(None if image is None else getattr(judge_image(image, json.loads(described)), value))
    return rewards


def exact(prompts: list[str], completions: list[Any], metadata: list[str], **columns: Any) -> list[float | None]:
    """1.0 for exactly the objects asked for, else 0.0."""
    return reward(prompts, completions, metadata, value="exact")


def correct(prompts: list[str], completions: list[Any], metadata: list[str], **columns: Any) -> list[float | None]:
    """1.0 where GenEval's rule holds (extra objects allowed), else 0.0."""
    return reward(prompts, completions, metadata, value="correct")

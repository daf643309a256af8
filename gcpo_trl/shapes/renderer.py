"""Draws a spec of the shapes world: one to four shapes in the slots of a 3x3 board on grey.

The picture is 36x36 pixels, 9x9 image tokens of 4x4 pixels. Each shape is 10 pixels wide in the middle of a slot of 12,
so that neighbours never touch (2 pixels apart) and a shape covers three tokens each way.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, ImageDraw

from .grammar import COLORS, SHAPES, Spec

IMAGE_SIZE = 36
SLOTS = 3
SLOT_SIZE = IMAGE_SIZE // SLOTS
SUPERSAMPLING = 8
SHAPE_SIZE = 10
GREY = 150
MARGIN = (SLOT_SIZE - SHAPE_SIZE) // 2

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (219, 41, 41),
    "orange": (245, 140, 26),
    "yellow": (242, 217, 38),
    "green": (38, 158, 64),
    "blue": (38, 77, 217),
    "purple": (140, 51, 178),
    "black": (15, 15, 15),
    "white": (247, 247, 247),
}


def _polygon(shape: str) -> list[tuple[float, float]] | None:
    """Corners in the unit square for the shapes that are one polygon."""
    match shape:
        case "square":
            return [(0, 0), (1, 0), (1, 1), (0, 1)]
        case "triangle":
            return [(0.5, 0), (1, 1), (0, 1)]
        case "diamond":
            return [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]
        case "cross":
            a, b = 1 / 3, 2 / 3
            return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
        case "bar":
            return [(0, 0.28), (1, 0.28), (1, 0.72), (0, 0.72)]
        case "pillar":
            return [(0.28, 0), (0.72, 0), (0.72, 1), (0.28, 1)]
        case "hourglass":
            return [(0, 0), (1, 0), (0.6, 0.5), (1, 1), (0, 1), (0.4, 0.5)]
        case "heart":
            angles = [2 * math.pi * i / 64 for i in range(64)]
            curve = [
                (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                for t in angles
            ]
            return [((x + 16) / 32, (12 - y) / 29) for x, y in curve]
    return None


@functools.cache
def sprite(shape: str, size: int = SHAPE_SIZE) -> np.ndarray:
    """Coverage of each pixel by the shape, ``(size, size)`` floats in [0, 1], anti-aliased by supersampling."""
    big = size * SUPERSAMPLING
    canvas = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(canvas)

    def box(low: float, high: float) -> tuple[float, float, float, float]:
        return (low * big, low * big, high * big - 1, high * big - 1)

    corners = _polygon(shape)
    if corners is not None:
        draw.polygon([(x * (big - 1), y * (big - 1)) for x, y in corners], fill=255)
    elif shape == "circle":
        draw.ellipse(box(0, 1), fill=255)
    elif shape == "ring":
        draw.ellipse(box(0, 1), fill=255)
        draw.ellipse(box(0.27, 0.73), fill=0)
    elif shape == "frame":
        draw.rectangle(box(0, 1), fill=255)
        draw.rectangle(box(0.25, 0.75), fill=0)
    elif shape == "crescent":
        draw.ellipse(box(0, 1), fill=255)
        draw.ellipse((0.4 * big, 0.1 * big, 1.2 * big, 0.9 * big), fill=0)
    else:
        raise ValueError(f"no drawing for shape {shape!r}; the shapes world has {', '.join(SHAPES)}")
    blocks = np.asarray(canvas, dtype=np.float32).reshape(size, SUPERSAMPLING, size, SUPERSAMPLING)
    return blocks.mean(axis=(1, 3)) / 255


def flat(generator: random.Random) -> np.ndarray:
    """The world's background: one grey, ``(height, width, 3)`` in [0, 255]."""
    return np.full((IMAGE_SIZE, IMAGE_SIZE, 3), GREY, dtype=np.float32)


def gradient(generator: random.Random) -> np.ndarray:
    """A vertical gradient of greys between 128 and 172: the image tokenizer learns from more than it will meet."""
    column = generator.uniform(142, 158) + generator.uniform(-14, 14) * np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    return np.broadcast_to(column[:, None, None], (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()


def _related_slots(relation: str, generator: random.Random) -> list[tuple[int, int]]:
    """Two slots ``(row, column)``: the second stands in ``relation`` to the first, mainly along that axis."""
    step = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[relation]
    cells = [(row, column) for row in range(SLOTS) for column in range(SLOTS)]
    choices = []
    for first in cells:
        for second in cells:
            offset = (second[0] - first[0], second[1] - first[1])
            along = offset[0] * step[0] + offset[1] * step[1]
            across = abs(offset[0] * step[1]) + abs(offset[1] * step[0])
            if along > 0 and across < along:
                choices.append([first, second])
    return generator.choice(choices)


def place(objects: Iterable[tuple[str, str, tuple[int, int]]], background: np.ndarray) -> Image.Image:
    """Draw ``(shape, color, (row, column))`` objects on a background ``(height, width, 3)``."""
    picture = background.copy()
    for shape, color, (row, column) in objects:
        y, x = row * SLOT_SIZE + MARGIN, column * SLOT_SIZE + MARGIN
        coverage = sprite(shape)[:, :, None]
        window = picture[y : y + SHAPE_SIZE, x : x + SHAPE_SIZE]
        window += coverage * (np.asarray(PALETTE[color], dtype=np.float32) - window)
    return Image.fromarray(picture.round().clip(0, 255).astype(np.uint8))


def draw(spec: Spec, generator: random.Random, background: Callable[[random.Random], np.ndarray] = flat) -> Image.Image:
    """A picture in which exactly the objects of ``spec`` appear; colours not named are drawn at random."""
    shapes = [(item.shape, item.color or generator.choice(COLORS)) for item in spec.items for _ in range(item.count)]
    if spec.relation:
        slots = _related_slots(spec.relation, generator)
    else:
        slots = generator.sample([(row, column) for row in range(SLOTS) for column in range(SLOTS)], len(shapes))
    return place(
        [(shape, color, slot) for (shape, color), slot in zip(shapes, slots, strict=True)], background(generator)
    )

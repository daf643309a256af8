"""Colours and roughly where they are: a descriptor from pixels alone, without weights. It sees no objects.

    feature = sqrt(histogram of each cell of a 3 x 3 board, all cells together summing to 1)

The cosine of two features is the mean over the cells of the Bhattacharyya coefficient, the share of colour in common: 1
for equal pictures, 0 where no cell has a colour in common. A histogram has 4 levels a channel, and a value between two
levels counts for both by its nearness, so that rounding or a little noise moves the feature a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...monitoring.overlays import shrink

CELLS = 3  # a side; the shapes world's board
LEVELS = 4  # a channel: 64 colours
LONGEST = 96  # pixels to which a picture is averaged first: colours and cells need no more


def label() -> str:
    """What a report calls it."""
    return f"histogram ({LEVELS**3} colours in {CELLS} x {CELLS} cells)"


def features(pictures: Sequence[Any]) -> Tensor:
    """``(pictures, cells * colours)``, each of length 1. Gradient: none."""
    return torch.from_numpy(np.stack([descriptor(picture) for picture in pictures]))


def descriptor(picture: Any) -> np.ndarray:
    """Feature of one picture; raises ValueError where it has fewer pixels than cells."""
    pixels = np.asarray(shrink(picture.convert("RGB"), LONGEST), dtype=np.float64)
    height, width = pixels.shape[:2]
    if min(height, width) < CELLS:
        raise ValueError(f"a picture of {width} x {height} pixels has no {CELLS} x {CELLS} cells; give a larger one")
    # By rows and columns as even as they divide: 0, 12, 24, 36.
    rows, columns = (np.linspace(0, side, CELLS + 1).round().astype(int) for side in (height, width))
    cells = [
        histogram(pixels[top:bottom, left:right]) for top, bottom in pairwise(rows) for left, right in pairwise(columns)
    ]
    return np.sqrt(np.concatenate(cells) / len(cells))


def histogram(pixels: np.ndarray) -> np.ndarray:
    """Share of each colour, ``(height, width, 3) in [0, 255] -> (colours,)``, summing to 1."""
    place = pixels.reshape(-1, 3, 1) / 255 * (LEVELS - 1)
    red, green, blue = np.moveaxis(np.clip(1 - np.abs(place - np.arange(LEVELS)), 0, 1), 1, 0)
    shares = np.einsum("pr,pg,pb->rgb", red, green, blue, optimize=True) / len(place)
    return shares.ravel()

"""Pictures beside their critical tokens, one colour a strategy, with a legend: what training and analysis both draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..objective.layout import Layout

# One colour a strategy, distinguishable also with a colour-vision deficiency (Okabe and Ito's palette).
COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (213, 94, 0), (0, 114, 178))
GAP = 6
LABEL_HEIGHT = 14
LEGEND_LINE = 16
OVERLAY_SHARE = 0.6


def enlarge(picture: Image.Image, tile: int) -> Image.Image:
    """The picture with its longest side at ``tile`` pixels, its own pixels kept sharp."""
    return picture.resize(scaled(picture.size, tile), Image.Resampling.NEAREST)


def shrink(picture: Image.Image, size: int) -> Image.Image:
    """The picture with its longest side at most ``size`` pixels, averaged; a smaller one stays as it is."""
    if max(picture.size) <= size:
        return picture
    return picture.resize(scaled(picture.size, size), Image.Resampling.BOX)


def scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Width and height with the longest at ``longest`` pixels, the other in proportion, rounded, at least 1."""
    width, height = (max(1, round(side * longest / max(size))) for side in size)
    return width, height


def overlay(
    picture: Image.Image, masks: Mapping[str, Tensor], layout: Layout, row: int, tile: int = 180
) -> Image.Image:
    """The picture with the critical tokens of one sample tinted, one colour per strategy; ``masks`` (batch, seq).

    Where the layout has several grids, each tints the cells of its own size, in an equal part of the strength.
    """
    canvas = np.asarray(enlarge(picture.convert("L").convert("RGB"), tile), dtype=np.float32).copy()
    share = OVERLAY_SHARE / len(layout.grids)
    for color, mask in zip(COLORS, masks.values(), strict=False):
        for cells in layout.maps(mask[row : row + 1]):
            height, width = canvas.shape[0] / cells.shape[1], canvas.shape[1] / cells.shape[2]
            for y, x in cells[0].nonzero().tolist():
                window = canvas[round(y * height) : round((y + 1) * height), round(x * width) : round((x + 1) * width)]
                window += share * (np.asarray(color, dtype=np.float32) - window)
    return Image.fromarray(canvas.round().astype(np.uint8))


def with_legend(sheet: Image.Image, names: Sequence[str]) -> Image.Image:
    """The sheet with one line a name below it, each beside its colour; as it is where there is no name."""
    if not names:
        return sheet
    page = Image.new("RGB", (sheet.width, sheet.height + LEGEND_LINE * (len(names) + 1)), "white")
    page.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(page)
    for index, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        top = sheet.height + LEGEND_LINE * index
        draw.rectangle((GAP, top + 2, GAP + 12, top + 14), fill=color)
        draw.text((GAP + 18, top + 2), name, fill="black")
    return page

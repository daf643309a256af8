"""PNG pictures of samples, learning and critical tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..extras import require

# One colour a strategy, distinguishable also with a colour-vision deficiency (Okabe and Ito's palette).
COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (213, 94, 0), (0, 114, 178))
GAP = 6
LABEL_HEIGHT = 14
OVERLAY_SHARE = 0.6


def grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], tile: int = 108, columns: Sequence[str] = ()
) -> Image.Image:
    """Pictures in rows, each row under its label; ``columns`` are headings above the first row."""
    width = max(len(row) for row in rows) * (tile + GAP) + GAP
    head = LABEL_HEIGHT if columns else 0
    sheet = Image.new("RGB", (width, head + len(rows) * (tile + LABEL_HEIGHT + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, heading in enumerate(columns):
        draw.text((GAP + index * (tile + GAP), 1), heading, fill="black")
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = head + r * (tile + LABEL_HEIGHT + GAP)
        draw.text((GAP, top + 1), label, fill="black")
        for c, picture in enumerate(row):
            sheet.paste(enlarge(picture, tile), (GAP + c * (tile + GAP), top + LABEL_HEIGHT))
    return sheet


def enlarge(picture: Image.Image, tile: int) -> Image.Image:
    """The picture at ``tile`` pixels, its own pixels kept sharp."""
    return picture.resize((tile, tile), Image.Resampling.NEAREST)


def overlay(
    picture: Image.Image, masks: Mapping[str, Tensor], shape: tuple[int, int], row: int, tile: int = 180
) -> Image.Image:
    """The picture with the critical tokens of one sample tinted, one colour a strategy; ``masks`` (batch, seq)."""
    canvas = np.asarray(enlarge(picture.convert("L").convert("RGB"), tile), dtype=np.float32).copy()
    height, width = tile / shape[0], tile / shape[1]
    for color, mask in zip(COLORS, masks.values(), strict=False):
        for index in mask[row].nonzero()[:, 0].tolist():
            y, x = divmod(index, shape[1])
            window = canvas[round(y * height) : round((y + 1) * height), round(x * width) : round((x + 1) * width)]
            window += OVERLAY_SHARE * (np.asarray(color, dtype=np.float32) - window)
    return Image.fromarray(canvas.round().astype(np.uint8))


def overlay_sheet(
    pictures: Sequence[Image.Image], masks: Mapping[str, Tensor], shape: tuple[int, int], labels: Sequence[str]
) -> Image.Image:
    """Each picture beside its critical tokens, with a legend below."""
    rows = [[picture, overlay(picture, masks, shape, row)] for row, picture in enumerate(pictures)]
    sheet = grid(rows, labels, tile=180)
    page = Image.new("RGB", (sheet.width, sheet.height + 16 * (len(masks) + 1)), "white")
    page.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(page)
    for index, (name, color) in enumerate(zip(masks, COLORS, strict=False)):
        top = sheet.height + 16 * index
        draw.rectangle((GAP, top + 2, GAP + 12, top + 14), fill=color)
        draw.text((GAP + 18, top + 2), name, fill="black")
    return page


def learning_curve(history: Sequence[Mapping[str, float]], path: Path, keys: Mapping[str, str]) -> None:
    """Metrics of a training log over steps, one panel each: ``keys`` maps a metric to its title."""
    require("matplotlib", "viz")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(keys), 3), layout="constrained")
    for axis, (key, title) in zip(np.atleast_1d(figure.subplots(1, len(keys))), keys.items(), strict=True):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        steps, values = [p[0] for p in points], np.asarray([p[1] for p in points], dtype=float)
        axis.plot(steps, values, color="0.75", linewidth=1)
        axis.plot(steps, running_mean(values, 10), color="C0")
        axis.set_title(title)
        axis.set_xlabel("step")
    figure.savefig(path, dpi=120)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values at each step, of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)

"""PNG pictures of samples, learning and critical tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..extras import require
from ..monitoring.overlays import GAP, LABEL_HEIGHT, enlarge, overlay, with_legend
from ..objective.layout import Layout


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


def overlay_sheet(
    pictures: Sequence[Image.Image], masks: Mapping[str, Tensor], layout: Layout, labels: Sequence[str]
) -> Image.Image:
    """Each picture beside its critical tokens, with a legend below."""
    rows = [[picture, overlay(picture, masks, layout, row)] for row, picture in enumerate(pictures)]
    sheet = grid(rows, labels, tile=180)
    return with_legend(sheet, list(masks))


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

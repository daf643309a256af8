"""PNG pictures of samples, learning and critical tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..drawing import GAP, LABEL_HEIGHT, enlarge, overlay, with_legend
from ..extras import require
from .study import Arm, interval


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
    pictures: Sequence[Image.Image], masks: Mapping[str, Tensor], shape: tuple[int, int], labels: Sequence[str]
) -> Image.Image:
    """Each picture beside its critical tokens, with a legend below."""
    rows = [[picture, overlay(picture, masks, shape, row)] for row, picture in enumerate(pictures)]
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


def study_picture(arms: Sequence[Arm], baseline: str, measure: str, against: str, scale: str, path: Path) -> None:
    """Training reward over steps, and score against diversity with the arms that no other beats in both.

    Crosses are 95% intervals over seeds; an arm without the diversity measure is left out of the right panel.
    """
    require("matplotlib", "viz")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = {}
    colors = colormaps["tab10" if len(arms) <= 10 else "tab20"].colors
    for index, arm in enumerate(arms):
        style = {"color": colors[index % len(colors)], "linestyle": "-" if index < len(colors) else "--"}
        style["linewidth"] = 2.5 if arm.name == baseline else 1.2
        curves = [result["history"].get("reward") or [] for result in arm.results.values()]
        length = min(map(len, curves), default=0)
        if length:
            mean = np.mean([curve[:length] for curve in curves], axis=0)
            left.plot(np.arange(1, length + 1), running_mean(mean, 10), label=arm.name, **style)
        scores, spread = (list(arm.values(name, scale).values()) for name in (measure, against))
        if scores and spread:
            (x, dx), (y, dy) = interval(spread), interval(scores)
            errors = {"xerr": np.nan_to_num(dx), "yerr": np.nan_to_num(dy)}
            right.errorbar(x, y, **errors, fmt="o", color=style["color"], linewidth=0.8, label=arm.name)
            points[arm.name] = (x, y)
    front = pareto_front(list(points.values()))
    right.plot([x for x, _ in front], [y for _, y in front], color="0.6", linewidth=1, zorder=0)
    left.set(title="training reward, mean of the last 10 steps", xlabel="step")
    right.set(title=f"{measure} against {against}, guidance {scale}", xlabel=against, ylabel=measure)
    figure.legend(*(right if points else left).get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of which no other is at least as high in both and higher in one, from left to right."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]

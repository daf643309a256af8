"""The picture of a study: training reward over steps, and score against diversity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..analysis.pictures import running_mean
from ..extras import require
from .statistics import Arm, interval


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

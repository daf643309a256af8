"""From the runs of a study to its table: means over seeds, intervals, and differences seed by seed.

mean ± half    half of the 95% t interval over seeds
difference     of the same seed in both arms, so that what a seed does to both cancels
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

LEVEL = 0.95
LAST_STEPS = 20  # steps over which the training reward at the end is averaged


@dataclass(frozen=True)
class Arm:
    """What is known of one arm: results by seed, and by seed why there is none; or of the untrained model."""

    name: str
    results: Mapping[int, Mapping[str, Any]]
    failures: Mapping[int, str] = field(default_factory=dict)
    trained: bool = True

    def values(self, measure: str, scale: str) -> dict[int, float]:
        """``measure`` at a guidance scale, by seed; no entry where a run has none."""
        found = {}
        for seed, result in self.results.items():
            report = result["reports"].get(scale, {})
            if measure in report:
                found[seed] = report[measure]["mean"]
        return found

    def last_reward(self) -> dict[int, float]:
        """Mean training reward of the last steps, by seed."""
        rewards = {seed: result["history"].get("reward") for seed, result in self.results.items()}
        return {seed: statistics.fmean(values[-LAST_STEPS:]) for seed, values in rewards.items() if values}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95% t interval; NaN for the half of a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(half)


def differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """``values`` minus ``baseline``, of the seeds that both have."""
    return [values[seed] - baseline[seed] for seed in values if seed in baseline]


def written(values: Sequence[float], sign: str = "") -> str:
    """``mean ± half`` with three digits; an en dash for nothing."""
    if not values:
        return "–"
    mean, half = interval(values)
    return f"{mean:{sign}.3f}" if math.isnan(half) else f"{mean:{sign}.3f} ± {half:.3f}"


def columns_of(arms: Sequence[Arm], scale: str, first: str) -> list[str]:
    """Measures that any run has at this scale, the compared one first."""
    seen = [measure for arm in arms for result in arm.results.values() for measure in result["reports"].get(scale, {})]
    return list(dict.fromkeys([first, *seen]))


def table(
    arms: Sequence[Arm],
    baseline: str,
    measure: str,
    scales: Sequence[str],
    headings: Mapping[str, str] | None = None,
) -> str:
    """Markdown: a row an arm, with its difference from ``baseline``; what failed is said below it.

    scales: guidance at evaluation; all measures at the first, the compared one at the others too.
    """
    first, headings = scales[0], headings or {}
    columns = columns_of(arms, first, measure)
    reference = next(arm for arm in arms if arm.name == baseline).values(measure, first)
    heads = ["arm", "runs", headings.get(measure, measure), f"minus {baseline}"]
    heads += [headings.get(column, column) for column in columns[1:]]
    heads += [f"{headings.get(measure, measure)}, guidance {scale}" for scale in scales[1:]] + ["training reward"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in arms:
        values = arm.values(measure, first)
        paired = differences(values, reference) if arm.name != baseline and arm.trained else []
        cells = [arm.name, str(len(arm.results)), written(list(values.values())), written(paired, "+")]
        cells += [written(list(arm.values(column, first).values())) for column in columns[1:]]
        cells += [written(list(arm.values(measure, scale).values())) for scale in scales[1:]]
        lines.append(f"| {' | '.join([*cells, written(list(arm.last_reward().values()))])} |")
    lost = [f"{arm.name}, seed {seed}: {why}" for arm in arms for seed, why in arm.failures.items()]
    return "\n".join(lines + ([""] + [f"Failed: {one}" for one in lost] if lost else []))


def minutes(arms: Sequence[Arm]) -> float:
    """Minutes of all runs shown, each counted once."""
    results = {result["key"]: result["minutes"] for arm in arms for result in arm.results.values()}
    return math.fsum(results.values())

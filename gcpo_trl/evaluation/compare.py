"""Finished runs of one benchmark against the first: paired bootstrap over prompts.

In each of 10,000 resamples every task's prompts are drawn with replacement, the same ones for all runs; the interval
holds 95% of the differences. Overall is made of each resample's task means as the reports make it.
Prompts are what varies: the seeds of the images are those of the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .scores import measures_of, prompt_means

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0
COMPARED = ("benchmark", "label", "scale", "overall_over")  # must be equal
DIVERSITY = "the same command with --diversity adds it to a run that is drawn"


@dataclass(frozen=True)
class Difference:
    """Means of the runs, ``(runs,)``, and the interval of each run's difference from the first, ``(runs, 2)``."""

    means: np.ndarray
    intervals: np.ndarray
    prompts: int
    left_out: int  # prompts that some run has no value for


def read_reports(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Reports of runs that can be compared; raises ValueError saying which cannot and why."""
    if len(files) < 2:
        raise ValueError(f"--compare takes at least two reports, {len(files)} given; write --compare A.json B.json")
    reports = [read_report(file) for file in files]
    for file, report in zip(files, reports, strict=True):
        for key in COMPARED:
            if report[key] != reports[0][key]:
                raise ValueError(f"{file} has {key} {report[key]!r}, {files[0]} has {reports[0][key]!r}")
        if report.get("diversity") != reports[0].get("diversity"):
            own, others = (one.get("diversity", "none") for one in (report, reports[0]))
            raise ValueError(f"{file} has diversity {own}, {files[0]} has {others}; {DIVERSITY}")
        asked, first = ([(row["prompt"], row["task"]) for row in one["scores"]] for one in (report, reports[0]))
        if asked != first:
            raise ValueError(f"{file} has other prompts than {files[0]}; compare runs over the same ones")
        if set(measures_of(report["scores"])) != set(measures_of(reports[0]["scores"])):
            raise ValueError(f"{file} has other measures than {files[0]}; compare runs judged alike")
    return reports


def read_report(file: Path) -> dict[str, Any]:
    """A report of `gcpo evaluate`."""
    try:
        report = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON ({error}); give reports of gcpo evaluate --out") from error
    if not isinstance(report, dict) or not {*COMPARED, "scores"} <= set(report):
        raise ValueError(f"{file} is no report with the scores of its pictures; give those of gcpo evaluate --out")
    return report


def compare(reports: Sequence[Mapping[str, Any]], resamples: int = RESAMPLES) -> dict[str, dict[str, Difference]]:
    """measure -> task, and "overall" where every task has the measure -> how the runs differ from the first."""
    compared = compare_values(reports, resamples)
    if "diversity" in reports[0]:
        compared |= compare_values([diversity_of(report) for report in reports], resamples)
    return compared


def diversity_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with the diversity of its prompts, a value each, in place of the values of its pictures."""
    rows = [row | {"values": {name: [value] for name, value in row["diversity"].items()}} for row in report["scores"]]
    return {**report, "scale": 1.0, "scores": rows}


def compare_values(reports: Sequence[Mapping[str, Any]], resamples: int) -> dict[str, dict[str, Difference]]:
    """`compare` of the pictures' values."""
    compared: dict[str, dict[str, Difference]] = {}
    every = {row["task"] for row in reports[0]["scores"]}
    scale = reports[0]["scale"]
    for measure in measures_of(reports[0]["scores"]):
        rng = np.random.default_rng(SEED)
        found, drawn = {}, []
        tasks = [measures_of(report["scores"])[measure] for report in reports]
        for task in tasks[0]:
            values = np.array([prompt_means(of_task[task], measure) for of_task in tasks], dtype=np.float64)
            kept = values[:, ~np.isnan(values).any(axis=0)] * scale  # None has become NaN
            if not kept.size:
                continue
            resampled = bootstrap(kept, rng, resamples)
            left_out = values.shape[1] - kept.shape[1]
            found[task] = Difference(kept.mean(axis=1), intervals(resampled), kept.shape[1], left_out)
            drawn.append(resampled)
        if len(found) == len(every):
            sizes = [one.prompts for one in found.values()]
            weights = sizes if reports[0]["overall_over"] == "prompts" else None
            means = np.average([one.means for one in found.values()], axis=0, weights=weights)
            resampled = np.average(drawn, axis=0, weights=weights)
            left_out = sum(one.left_out for one in found.values())
            found["overall"] = Difference(means, intervals(resampled), sum(sizes), left_out)
        compared[measure] = found
    return compared


def bootstrap(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of resampled columns, the same ones for every row: ``(runs, prompts) -> (runs, resamples)``."""
    prompts = values.shape[1]
    times_drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return values @ times_drawn.T / prompts


def intervals(resampled: np.ndarray) -> np.ndarray:
    """Of each run's difference from the first, ``(runs, 2)``."""
    tail = (1 - LEVEL) / 2
    return np.quantile(resampled - resampled[:1], (tail, 1 - tail), axis=1).T


def comparison_table(names: Sequence[str], compared: Mapping[str, Mapping[str, Difference]]) -> str:
    """Markdown: a table a measure, a row a task, and for each further run its difference from the first."""
    parts = []
    for measure, tasks in compared.items():
        columns = [measure, "prompts", names[0], *(f"{name} | difference" for name in names[1:])]
        width = 3 + 2 * (len(names) - 1)
        lines = [f"| {' | '.join(columns)} |", "|---" * width + "|"]
        for task, one in tasks.items():
            cells = [f"{one.means[0]:.3f}"]
            for mean, (low, high) in zip(one.means[1:], one.intervals[1:], strict=True):
                cells.append(f"{mean:.3f} | {mean - one.means[0]:+.3f} [{low:+.3f}, {high:+.3f}]")
            lost = f" ({one.left_out} left out)" if one.left_out else ""
            lines.append(f"| {task} | {one.prompts}{lost} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    note = (
        f"Differences from {names[0]}, {LEVEL:.0%} paired bootstrap over prompts, {RESAMPLES:,} resamples, seed {SEED}"
    )
    return "\n\n".join([*parts, note])

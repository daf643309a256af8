"""Values of pictures to a report: means of tasks with standard errors, their mean, JSON and Markdown.

    prompt   mean over those of its pictures that were scored
    task     mean over its prompts; images of one prompt are not independent, so errors are taken over prompts
    overall  mean of the task means, as GenEval counts, or of all prompts (`by_prompts`); only of a measure that every
             task has

A picture that the judge could not score is None: it is counted, and enters no mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .benchmark import Benchmark

MOST_FAILED = 0.05  # share of a task's pictures that may stay without a value
Scores = Sequence[Mapping[str, float | None]]  # a picture: measure -> value


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Mean and its standard error, 0 for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "error": error}


def mean_of_tasks(tasks: Sequence[Mapping[str, float]], weights: Sequence[float] = ()) -> dict[str, float]:
    """Mean of independent means and its standard error; no weights are equal ones."""
    weights = weights or [1.0] * len(tasks)
    mean = math.fsum(weight * task["mean"] for weight, task in zip(weights, tasks, strict=True))
    square = math.fsum((weight * task["error"]) ** 2 for weight, task in zip(weights, tasks, strict=True))
    return {"mean": mean / sum(weights), "error": math.sqrt(square) / sum(weights)}


def by_prompt(benchmark: Benchmark, scores: Scores) -> list[dict[str, Any]]:
    """A row a prompt: ``prompt``, ``task``, and of each measure its pictures' values in order."""
    rows = []
    for index, (row, task) in enumerate(zip(benchmark.rows, benchmark.tasks, strict=True)):
        pictures = scores[index * benchmark.images_per_prompt : (index + 1) * benchmark.images_per_prompt]
        values = {measure: [picture[measure] for picture in pictures] for measure in pictures[0]}
        rows.append({"prompt": row["prompt"], "task": task, "values": values})
    return rows


def prompt_means(rows: Iterable[Mapping[str, Any]], measure: str) -> list[float | None]:
    """Mean of each prompt's scored pictures; None where none was scored."""
    means: list[float | None] = []
    for row in rows:
        scored = [value for value in row["values"][measure] if value is not None]
        means.append(statistics.fmean(scored) if scored else None)
    return means


def measures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """measure -> task -> its rows, in order of appearance."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        for measure in row["values"]:
            found.setdefault(measure, {}).setdefault(row["task"], []).append(row)
    return found


def summarize(benchmark: Benchmark, rows: Sequence[Mapping[str, Any]], most_failed: float) -> dict[str, Any]:
    """``tasks[task][measure]`` and ``overall[measure]``, on the benchmark's scale.

    Raises RuntimeError if more than `most_failed` of a task's pictures have no value.
    """
    tasks: dict[str, dict[str, dict[str, float]]] = {task: {} for task in benchmark.tasks}
    overall = {}
    for measure, of_task in measures_of(rows).items():
        for task, prompts in of_task.items():
            tasks[task][measure] = summarize_task(benchmark, task, measure, prompts, most_failed)
        if len(of_task) == len(tasks):
            weights = [len(prompts) for prompts in of_task.values()] if benchmark.by_prompts else []
            overall[measure] = mean_of_tasks([tasks[task][measure] for task in of_task], weights)
    return {"tasks": tasks, "overall": overall}


def summarize_task(
    benchmark: Benchmark, task: str, measure: str, prompts: Sequence[Mapping[str, Any]], most_failed: float
) -> dict[str, float]:
    """Mean, standard error, pictures scored and failed; with `groups_of`, the deviation of group means too."""
    values = [value for row in prompts for value in row["values"][measure]]
    scored = [value for value in values if value is not None]
    failed = len(values) - len(scored)
    if not scored or failed > most_failed * len(values):
        raise RuntimeError(
            f"{measure} gave no value for {failed} of {len(values)} pictures of {task}, over {most_failed:.0%}; see "
            "the log, or allow more with --max-failed. The pictures are kept, and the same command judges them again"
        )
    means = [mean for mean in prompt_means(prompts, measure) if mean is not None]
    summary = {key: value * benchmark.scale for key, value in mean_and_error(means).items()}
    size = benchmark.groups_of
    groups = [values[start : start + size] for start in range(0, len(values) - size + 1, size)] if size else []
    kept = [[value for value in group if value is not None] for group in groups]
    if any(kept):
        summary["group_std"] = benchmark.scale * statistics.pstdev(statistics.fmean(group) for group in kept if group)
    return summary | {"scored": len(scored), "failed": failed}


def markdown(report: Mapping[str, Any], headings: Mapping[str, str]) -> str:
    """A row a task, ``mean ± standard error``; an en dash where a measure does not judge a task."""
    tasks = {**report["tasks"], "overall": report["overall"]}
    measures = list(dict.fromkeys(measure for row in report["tasks"].values() for measure in row))
    grouped = [m for m in measures if any("group_std" in row[m] for row in report["tasks"].values() if m in row)]
    columns = ["task", *(headings.get(m, m) for m in measures), *(f"{m}: std over groups" for m in grouped)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in tasks.items():
        cells = [f"{row[m]['mean']:.3f} ± {row[m]['error']:.3f}" if m in row else "–" for m in measures]
        cells += [f"{row[m]['group_std']:.4f}" if "group_std" in row.get(m, {}) else "–" for m in grouped]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def footnote(report: Mapping[str, Any]) -> str:
    """What the numbers are, in one line."""
    settings = report["settings"]
    failed = {
        f"{measure} of {task}": cell["failed"]
        for task, row in report["tasks"].items()
        for measure, cell in row.items()
        if cell.get("failed")
    }
    lost = "".join(f"; {count} pictures not scored by {what}" for what, count in failed.items())
    adapter = f" with {settings['adapter']}" if settings["adapter"] else ""
    scale = f", x{report['scale']:g}" if report["scale"] != 1 else ""
    diversity = "".join(f"\n{what}: {label}" for what, label in report.get("diversity", {}).items())
    return (
        f"{report['images']} images, guidance {settings['sampling']['guidance_scale']:g}, mean ± standard error over "
        f"prompts{scale}{lost}\n{report['label']}; {settings['model']}{adapter}; seed {settings['seed']}{diversity}"
    )

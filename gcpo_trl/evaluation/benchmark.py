"""What a benchmark is: prompts with their tasks, and a judge of pictures. A file in `benchmarks` defines one.

    def benchmark(prompts, rewards) -> Benchmark

prompts: files the user named, rewards: judges the user named instead of the benchmark's own; both may be empty.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from ..plugins import resolve
from ..prompts import load
from ..rewards.loading import load_rewards
from ..validation import check_count

PACKAGE = "gcpo_trl.evaluation.benchmarks"
TASK_COLUMNS = ("task", "style", "category", "tag")  # of a file of prompts, in this order, in any case
Row = dict[str, Any]
# Rows and their pictures, all of one task -> measure -> one value a picture, None where it could not be judged.
Judge = Callable[[Sequence[Row], Sequence[Any]], dict[str, list[float | None]]]


@dataclass(frozen=True)
class Benchmark:
    """Prompts and judges.

    label         what the numbers are to be called
    rows, tasks   a ``prompt`` and the columns that the judge reads; the task of each
    judges        by task
    judged_by     models and settings of the judge, for the report
    headings      measure -> what a table calls it
    scale         factor of the published numbers
    by_prompts    overall is the mean over all prompts; else that of the task means
    groups_of     pictures a group, where the published deviation is that of group means; 0: none
    gauge         by what the pictures of a prompt are compared (`diversity.Gauge`); None: they are not
    """

    name: str
    label: str
    rows: Sequence[Row]
    tasks: Sequence[str]
    judges: Mapping[str, Judge]
    images_per_prompt: int
    judged_by: Mapping[str, Any] = field(default_factory=dict)
    headings: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0
    by_prompts: bool = False
    groups_of: int = 0
    gauge: Any = None


def choose(
    name: str,
    prompts: Sequence[Path] = (),
    rewards: Sequence[Any] = (),
    images_per_prompt: int | None = None,
    limit: int | None = None,
) -> Benchmark:
    """The benchmark `name`, its judges loaded and asked once, so that what they lack is seen before anything is drawn.

    images_per_prompt: None is the benchmark's. limit: so many of its prompts, evenly spaced. Raises ValueError.
    """
    if images_per_prompt is not None:
        check_count("--images-per-prompt", images_per_prompt, least=1, hint="write the images of a prompt, such as 4")
    if limit is not None:
        check_count("--limit", limit, least=1, hint="write how many prompts, such as 20")
    benchmark: Benchmark = resolve(name, PACKAGE, "benchmark")(list(prompts), list(rewards))
    if images_per_prompt is not None:
        benchmark = dataclasses.replace(benchmark, images_per_prompt=images_per_prompt)
    if limit is not None and limit < len(benchmark.rows):
        kept = [index * len(benchmark.rows) // limit for index in range(limit)]
        rows, tasks = [benchmark.rows[i] for i in kept], [benchmark.tasks[i] for i in kept]
        benchmark = dataclasses.replace(benchmark, rows=rows, tasks=tasks)
    ask_once(benchmark)
    return benchmark


def ask_once(benchmark: Benchmark) -> list[str]:
    """Judge a grey picture of each task: rewards load their models and read their columns on first use.

    Returns what is measured.
    """
    grey = Image.new("RGB", (64, 64), "grey")
    measures: dict[str, None] = {}
    for task in dict.fromkeys(benchmark.tasks):
        measures |= dict.fromkeys(benchmark.judges[task]([benchmark.rows[benchmark.tasks.index(task)]], [grey]))
    return list(measures)


def from_rewards(
    name: str, rows: Sequence[Row], tasks: Sequence[str], rewards: Sequence[Any], images_per_prompt: int, **more: Any
) -> Benchmark:
    """A benchmark whose every task is judged by these rewards."""
    judge, labels = rewards_judge(rewards, rows)
    judges = dict.fromkeys(tasks, judge)
    return Benchmark(name, ", ".join(labels), rows, tasks, judges, images_per_prompt, **more)


def rewards_judge(rewards: Sequence[Any], rows: Sequence[Row]) -> tuple[Judge, list[str]]:
    """A judge that asks rewards, as training does, and what their numbers are called. They look at the rows first."""
    functions: dict[str, Callable[..., Any]] = {}
    for function in load_rewards(list(rewards), Dataset.from_list(list(rows))):
        if isinstance(function, torch.nn.Module):
            raise TypeError(f"reward {type(function).__name__} is a torch module, which scores text; name a function")
        functions[function.__name__] = function

    def judge(rows: Sequence[Row], pictures: Sequence[Any]) -> dict[str, list[float | None]]:
        return {name: ask(function, rows, pictures) for name, function in functions.items()}

    return judge, [label_of(function) for function in functions.values()]


def ask(reward: Callable[..., Any], rows: Sequence[Row], pictures: Sequence[Any]) -> list[float | None]:
    """One value a picture, from a plain or an asynchronous reward. What it logs goes nowhere."""
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    values = reward(
        prompts=[row["prompt"] for row in rows],
        completions=list(pictures),
        log_extra=lambda *_: None,
        log_metric=lambda *_: None,
        **columns,
    )
    if inspect.iscoroutine(values):
        with ThreadPoolExecutor(1) as pool:  # a notebook's own event loop forbids another in its thread
            values = pool.submit(asyncio.run, values).result()
    return values


def label_of(reward: Callable[..., Any]) -> str:
    """What the file of a reward calls its numbers (`label()`, which names detector or backbone), or its name."""
    module = sys.modules.get(reward.__module__)
    said = getattr(module, "label", None) if reward.__module__.startswith("reward_funcs.") else None
    return said() if callable(said) else reward.__name__


def own_prompts(name: str, prompts: Sequence[Path]) -> None:
    """Refuse files where a benchmark has its prompts."""
    if prompts:
        raise ValueError(f"{name} has its own prompts; leave out --prompts, or take --benchmark prompts --rewards NAME")


def file_rows(name: str, prompts: Sequence[Path]) -> list[Row]:
    """Rows of the one file or folder that the user must name."""
    if len(prompts) != 1:
        raise ValueError(f"{name} needs one file of prompts, {len(prompts)} given; write --prompts FILE")
    return load(prompts[0])


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """The task of each row: its first column of TASK_COLUMNS, or else "all" for every row."""
    named = {column.lower(): column for column in rows[0]}
    column = next((named[name] for name in TASK_COLUMNS if name in named), None)
    return ["all" if column is None or row[column] is None else str(row[column]) for row in rows]

"""Diversity added to a benchmark's report, from the kept pictures alone, so that it can be asked for afterwards.

A picture's file holds the tokens it was decoded from and their mean entropy. Where some file does not (another program
wrote it), the measures of tokens are left out and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm

from .benchmark import Benchmark
from .diversity import MEASURES, Drawn, Gauge, measure, summarize_groups
from .folder import Folder
from .ranks import Ranks

AT_ONCE = 64  # pictures whose features are computed together, about


def with_diversity(report: Mapping[str, Any], benchmark: Benchmark, folder: Folder, ranks: Ranks) -> dict[str, Any]:
    """The report with the benchmark's gauge applied to every prompt; all pictures must be drawn.

    Never on the benchmark's scale, which is that of its judge.
    """
    gauge: Gauge = benchmark.gauge
    values = measure_folder(benchmark, folder, ranks)
    tasks, overall = summarize_groups(values, benchmark.tasks, benchmark.by_prompts)
    measures = [name for name in MEASURES if name in overall]
    scores = [
        row | {"diversity": {name: value[name] for name in measures}}
        for row, value in zip(report["scores"], values, strict=True)
    ]
    about = gauge.labels()
    if "disagreement" not in measures:
        about["tokens"] = "not measured; some pictures do not hold their tokens: draw them anew with --force"
    return {
        **{key: value for key, value in report.items() if key != "scores"},
        "tasks": {task: row | tasks[task] for task, row in report["tasks"].items()},
        "overall": report["overall"] | overall,
        "diversity": about,
        "scores": scores,
    }


def measure_folder(benchmark: Benchmark, folder: Folder, ranks: Ranks) -> list[dict[str, float]]:
    """The measures of each prompt; each rank measures its share and all know all."""
    size, prompts = benchmark.images_per_prompt, len(benchmark.rows)
    each = max(1, AT_ONCE // size)
    parts = ranks.share([range(start, min(start + each, prompts)) for start in range(0, prompts, each)])
    own: list[tuple[int, dict[str, float]]] = []
    with tqdm(total=sum(map(len, parts)), desc="compared", unit="prompt", disable=ranks.rank > 0) as progress:
        for part in parts:
            groups = [[folder.read_drawn(prompt * size + sample) for sample in range(size)] for prompt in part]
            own += zip(
                part, measure([[Drawn(*one) for one in group] for group in groups], benchmark.gauge), strict=True
            )
            progress.update(len(part))
    measured = dict(gather_object(own) if ranks.world > 1 else own)
    return [measured[prompt] for prompt in range(prompts)]

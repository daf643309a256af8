"""DrawBench: 200 prompts from a file of the user, one image each, judged by HPSv2 unless rewards are named.

As hpsv2/evaluation.py does, overall is the mean over all prompts, times 100. Rows of the original table have a
category, which is the task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_funcs.hpsv2 import Scorer

from ..benchmark import Benchmark, file_rows, from_rewards, tasks_of


def benchmark(prompts: Sequence[Path], rewards: Sequence[Any]) -> Benchmark:
    """Prompts by category."""
    rows = file_rows("drawbench", prompts)
    if rewards:
        return from_rewards("drawbench", rows, tasks_of(rows), rewards, images_per_prompt=1, by_prompts=True)
    scorer = Scorer()
    judged = {"images_per_prompt": 1, "scale": 100.0, "by_prompts": True}
    made = from_rewards("drawbench", rows, tasks_of(rows), ["hpsv2"], **judged)
    return dataclasses.replace(made, label=f"HPSv2 (v{scorer.version})", judged_by=dataclasses.asdict(scorer))

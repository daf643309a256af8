"""HPSv2's benchmark: its folder of prompts (anime, concept-art, paintings, photo; 800 each), one image a prompt.

As hpsv2/evaluation.py prints it: the mean of each style times 100, and the deviation of the means of groups of 80 (by
n, not n - 1). Overall is the mean of the styles. The version that scores is HPSV2_VERSION's, 2.1 unless set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_funcs.hpsv2 import Scorer

from ..benchmark import Benchmark, file_rows, from_rewards, tasks_of

GROUP = 80  # hpsv2/evaluation.py, evaluate_benchmark


def benchmark(prompts: Sequence[Path], rewards: Sequence[Any]) -> Benchmark:
    """Prompts by style: a folder, or a file with a column ``style``."""
    rows = file_rows("hpsv2", prompts)
    if rewards:
        return from_rewards("hpsv2", rows, tasks_of(rows), rewards, images_per_prompt=1)
    scorer = Scorer()
    made = from_rewards("hpsv2", rows, tasks_of(rows), ["hpsv2"], images_per_prompt=1, scale=100.0, groups_of=GROUP)
    return dataclasses.replace(made, label=f"HPSv2 (v{scorer.version})", judged_by=dataclasses.asdict(scorer))

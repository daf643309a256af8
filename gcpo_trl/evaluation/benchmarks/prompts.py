"""Any file of prompts, judged by any rewards: ``--benchmark prompts --prompts FILE --rewards NAME ...``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmark import Benchmark, file_rows, from_rewards, tasks_of

IMAGES_PER_PROMPT = 4


def benchmark(prompts: Sequence[Path], rewards: Sequence[Any]) -> Benchmark:
    """Tasks are the file's column ``task``, ``style``, ``category`` or ``tag``, if it has one."""
    if not rewards:
        raise ValueError("prompts needs rewards to judge by; write --rewards NAME, such as hpsv2")
    rows = file_rows("prompts", prompts)
    return from_rewards("prompts", rows, tasks_of(rows), rewards, IMAGES_PER_PROMPT, by_prompts=True)

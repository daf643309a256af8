"""The shapes world: 206 held-out prompts, judged from pixels by four measures (`reward_funcs.shapes`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_funcs.shapes import judge_image

from ...shapes.grammar import held_out_specs
from ..benchmark import Benchmark, Row, from_rewards, own_prompts
from ..shapes import HEADINGS, IMAGES_PER_PROMPT, MEASURES


def benchmark(prompts: Sequence[Path], rewards: Sequence[Any]) -> Benchmark:
    """Held-out prompts, six images each; overall is the mean of the six task means."""
    own_prompts("shapes", prompts)
    rows = [spec.record() for spec in held_out_specs()]
    tasks = [row["tag"] for row in rows]
    if rewards:
        return from_rewards("shapes", rows, tasks, rewards, IMAGES_PER_PROMPT)
    judges = dict.fromkeys(tasks, judge)
    return Benchmark("shapes", "shapes world", rows, tasks, judges, IMAGES_PER_PROMPT, headings=HEADINGS)


def judge(rows: Sequence[Row], pictures: Sequence[Any]) -> dict[str, list[float | None]]:
    """The four measures of each picture."""
    judged = [judge_image(picture, json.loads(row["metadata"])) for row, picture in zip(rows, pictures, strict=True)]
    return {measure: [getattr(one, measure) for one in judged] for measure in MEASURES}

"""GenEval: its 553 prompts, four images each, judged by its rule over transformers' detector and CLIP.

Overall is the mean of the six task means, as in evaluation/summary_scores.py. `correct` is the benchmark's number,
`strict` asks for exact counts. The detector's weights are not the benchmark's: the label says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from reward_funcs._geneval_color import load_color_classifier
from reward_funcs._geneval_detector import load_detector
from reward_funcs.geneval import Models, judge_images
from reward_funcs.runtime import reward_device

from ...prompts import load
from ..benchmark import Benchmark, Row, from_rewards, own_prompts

IMAGES_PER_PROMPT = 4
MEASURES = ("correct", "strict")


def benchmark(prompts: Sequence[Path], rewards: Sequence[Any]) -> Benchmark:
    """The official prompts. Loads both models, so that one that is missing is seen at once."""
    own_prompts("geneval", prompts)
    rows = load("geneval")
    tasks = [json.loads(row["metadata"])["tag"] for row in rows]
    if rewards:
        return from_rewards("geneval", rows, tasks, rewards, IMAGES_PER_PROMPT)
    models = Models()
    device = reward_device(models.device)
    detector = load_detector(models.detector, device)
    load_color_classifier(models.clip, device)
    judges = dict.fromkeys(tasks, partial(judge, models))
    label = label_of(detector.model.config.model_type, models.detector)
    return Benchmark("geneval", label, rows, tasks, judges, IMAGES_PER_PROMPT, judged_by=dataclasses.asdict(models))


def label_of(family: str, detector: str) -> str:
    """The name under which to give results."""
    return "GenEval (HF Mask2Former)" if family == "mask2former" else f"GenEval ({detector})"


def judge(models: Models, rows: Sequence[Row], pictures: Sequence[Any]) -> dict[str, list[float | None]]:
    """Both values of each picture."""
    verdicts = judge_images(list(pictures), [row["metadata"] for row in rows], models)
    return {measure: [float(getattr(verdict, measure)) for verdict in verdicts] for measure in MEASURES}

"""The shapes benchmark: held-out prompts, fixed seeds, judged from pixels, with a standard error.

Overall is the mean of the six task means, as GenEval counts. Images of one prompt are not independent, so standard
errors are taken over the prompts of a task, not over images.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate.utils import gather_object

from reward_funcs.shapes import Judgement, judge_image

from ..rollout import Sampling, sample
from ..shapes.grammar import TASKS, Spec, held_out_specs
from .diversity import FEATURES, Gauge, drawn_of, measure, space_of, summarize_groups
from .scores import mean_and_error, mean_of_tasks

IMAGES_PER_PROMPT = 6  # 206 prompts, 1,236 images
HEADINGS = {
    "exact": "exact",
    "correct": "correct (extras allowed)",
    "inventory": "partial credit",
    "extra": "extra objects",
}
MEASURES = tuple(HEADINGS)


@dataclass(frozen=True)
class Report:
    """``tasks[task][measure]`` and ``overall[measure]`` are ``{"mean", "error"}``; ``extra`` is objects an image.

    features: the space of "vendi" and "pairwise_distance"; empty where diversity was not asked for.
    """

    tasks: dict[str, dict[str, dict[str, float]]]
    overall: dict[str, dict[str, float]]
    images: int
    sampling: dict[str, Any]
    features: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def table(self) -> str:
        """Markdown: a row a task, ``mean ± standard error``."""
        measures = list(self.overall)
        columns = ["task", *(HEADINGS.get(measure, measure) for measure in measures)]
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for name, row in [*self.tasks.items(), ("overall", self.overall)]:
            cells = [f"{row[m]['mean']:.3f} ± {row[m]['error']:.3f}" for m in measures]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def evaluate(
    policy: Any,
    sampling: Sampling,
    specs: Sequence[Spec] | None = None,
    images_per_prompt: int = IMAGES_PER_PROMPT,
    seed: int = 1234,
    rank: int = 0,
    world: int = 1,
    diversity: bool = False,
) -> Report:
    """Draw ``images_per_prompt`` pictures of every spec (default: the held-out set) and judge them.

    Of ``world`` processes, all of which must call this, each draws its share; the images do not depend on the split.
    diversity: also how much the pictures of a prompt differ: "vendi", "pairwise_distance", "disagreement", "entropy".
    """
    if diversity and images_per_prompt < 2:
        raise ValueError(f"images_per_prompt={images_per_prompt} leaves nothing to compare; diversity needs 2 or more")
    specs = held_out_specs() if specs is None else list(specs)
    specs = [spec for spec in specs for _ in range(images_per_prompt)]
    mine = list(range(rank, len(specs), world))
    rollout = sample(policy, [specs[i].prompt for i in mine], seed, mine, sampling)
    drawn = zip(mine, drawn_of(policy.decode(rollout.tokens), rollout), strict=True)
    own = [(index, judge_image(one.picture, specs[index].metadata), one if diversity else None) for index, one in drawn]
    every = sorted(gather_object(own) if world > 1 else own, key=lambda one: one[0])
    report = summarize(specs, [judged for _, judged, _ in every], asdict(sampling) | {"seed": seed})
    if not diversity:
        return report
    groups = [[one for _, _, one in every[i : i + images_per_prompt]] for i in range(0, len(every), images_per_prompt)]
    gauge = Gauge(*space_of(FEATURES))
    return with_values(report, measure(groups, gauge), [spec.tag for spec in specs[::images_per_prompt]], gauge.label)


def with_values(report: Report, values: Sequence[Mapping[str, float]], tags: Sequence[str], features: str) -> Report:
    """The report with further measures, one value a prompt and the task of each."""
    tasks, overall = summarize_groups(values, tags)
    tasks = {name: row | tasks[name] for name, row in report.tasks.items()}
    return replace(report, tasks=tasks, overall=report.overall | overall, features=features)


def summarize(specs: Sequence[Spec], judgements: Sequence[Judgement], sampling: dict[str, Any]) -> Report:
    """Means and standard errors of every task and of their mean."""
    by_prompt: dict[str, dict[str, list[Judgement]]] = {tag: {} for tag in TASKS}
    for spec, judgement in zip(specs, judgements, strict=True):
        by_prompt[spec.tag].setdefault(spec.prompt, []).append(judgement)
    tasks: dict[str, dict[str, dict[str, float]]] = {}
    for tag, prompts in by_prompt.items():
        if prompts:
            tasks[tag] = {m: mean_and_error([_mean(js, m) for js in prompts.values()]) for m in MEASURES}
    overall = {m: mean_of_tasks([task[m] for task in tasks.values()]) for m in MEASURES}
    return Report(tasks, overall, len(judgements), sampling)


def _mean(judgements: Sequence[Judgement], measure: str) -> float:
    return statistics.fmean(getattr(judgement, measure) for judgement in judgements)

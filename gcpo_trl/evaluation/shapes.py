"""The shapes benchmark: held-out prompts, fixed seeds, judged from pixels, with a standard error.

Overall is the mean of the six task means, as GenEval counts. Images of one prompt are not independent, so standard
errors are taken over the prompts of a task, not over images.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import gather_object

from reward_funcs.shapes import Judgement, judge_image

from ..rollout import Sampling, sample
from ..shapes.grammar import TASKS, Spec, held_out_specs
from .scores import mean_and_error, mean_of_tasks

IMAGES_A_PROMPT = 6  # 206 prompts, 1,236 images
HEADINGS = {
    "exact": "exact",
    "correct": "correct (extras allowed)",
    "inventory": "partial credit",
    "extra": "extra objects",
}
MEASURES = tuple(HEADINGS)


@dataclass(frozen=True)
class Report:
    """``tasks[task][measure]`` and ``overall[measure]`` are ``{"mean", "error"}``; ``extra`` is objects an image."""

    tasks: dict[str, dict[str, dict[str, float]]]
    overall: dict[str, dict[str, float]]
    images: int
    sampling: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def table(self) -> str:
        """Markdown: a row a task, ``mean ± standard error``."""
        lines = [f"| task | {' | '.join(HEADINGS.values())} |", "|---|---|---|---|---|"]
        for name, row in [*self.tasks.items(), ("overall", self.overall)]:
            cells = [f"{row[m]['mean']:.3f} ± {row[m]['error']:.3f}" for m in MEASURES]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def evaluate(
    policy: Any,
    sampling: Sampling,
    specs: Sequence[Spec] | None = None,
    images_a_prompt: int = IMAGES_A_PROMPT,
    seed: int = 1234,
    rank: int = 0,
    world: int = 1,
) -> Report:
    """Draw ``images_a_prompt`` pictures of every spec (default: the held-out set) and judge them.

    Of ``world`` processes, all of which must call this, each draws its share; the images do not depend on the split.
    """
    specs = held_out_specs() if specs is None else list(specs)
    specs = [spec for spec in specs for _ in range(images_a_prompt)]
    mine = list(range(rank, len(specs), world))
    tokens = sample(policy, [specs[i].prompt for i in mine], seed, mine, sampling).tokens
    pictures = zip(mine, policy.decode(tokens), strict=True)
    judged = [(index, judge_image(picture, specs[index].metadata)) for index, picture in pictures]
    judgements = dict(gather_object(judged) if world > 1 else judged)
    return summarize(specs, [judgements[i] for i in range(len(specs))], asdict(sampling) | {"seed": seed})


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

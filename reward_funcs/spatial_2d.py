"""T2I-CompBench's 2D-spatial score as a reward: "2D-spatial (detector=...)".

    prompt -> two nouns and a relation;  picture -> boxes;  reward = s1/4 + s2/4 + place/2, 0 below 1/2

The rule is the benchmark's (`_compbench_geometry`); its detector, UniDet, has no transformers port, so numbers are not
comparable with published ones: give them under `label()`. Values that can be the reward:
    published   as released: "on top of" and any relation outside its list score 0; near as the code has it
    corrected   every relation has its branch, near is the distance of the centres, and two objects of one class are two
                boxes (as released, one box is compared with itself)
    graded      corrected, without the cut at 1/2: finding the objects already earns something

T2I-R1's reward_gdino.py feeds boxes in [0, 1] to the 150-pixel rule, so that "near" always holds; here boxes come
to the evaluator's frame, whatever their picture's size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_funcs._compbench_detectors import DETECTOR, BoxDetector, load_detector
from reward_funcs._compbench_geometry import corrected_place, cut, in_frame, pair_score, published_place
from reward_funcs._compbench_text import Relation, read_prompt
from reward_funcs.runtime import check_images, prompt_text, reward_device

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BoxDetector", "Models", "Relation", "Verdict", "judge", "label", "reward"]

VALUES = ("published", "corrected", "graded")


@dataclass(frozen=True)
class Models:
    """What finds the objects: a hub id or folder (OWLv2, or GenEval's), or a BoxDetector.

    Unset, the environment decides. threshold: least score of a box; None is the family's default.
    """

    detector: str | BoxDetector = field(default_factory=lambda: os.environ.get("COMPBENCH_DETECTOR", DETECTOR))
    threshold: float | None = None
    device: str = "auto"  # GCPO_REWARD_DEVICE, or else this rank's GPU if there is one

    def load(self) -> BoxDetector:
        """The detector, loaded once a process."""
        if isinstance(self.detector, BoxDetector):
            return self.detector
        return load_detector(self.detector, self.threshold, reward_device(self.device))


@dataclass(frozen=True)
class Verdict:
    """The values of one picture."""

    published: float
    corrected: float
    graded: float


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Image | None],
    compbench: Sequence[str | None] | None = None,
    value: str = "published",
    models: Models | None = None,
    **columns: Any,
) -> list[float | None]:
    """2D-spatial of each picture.

    None where the picture is None, or its prompt states no relation, or the detector does not know one of the nouns.

    compbench: JSON strings, see `_compbench_text`; without, the relation is read from the prompt.
    """
    if value not in VALUES:
        raise ValueError(f"value={value!r}; write one of {', '.join(VALUES)}")
    said = [None] * len(prompts) if compbench is None else compbench
    check_images("spatial_2d", completions, prompts=prompts, compbench=said)
    relations = [read_prompt(prompt_text(prompt), line).relation for prompt, line in zip(prompts, said, strict=True)]
    rewards: list[float | None] = [None] * len(completions)
    if not any(image is not None and relations[index] is not None for index, image in enumerate(completions)):
        return rewards
    detector = (models or Models()).load()
    scored = {}
    for index, (image, relation) in enumerate(zip(completions, relations, strict=True)):
        asked = None if relation is None else in_classes(relation, detector)
        if image is not None and asked is not None:
            scored[index] = (image, asked)
    pictures = [image for image, _ in scored.values()]
    found = detector.find(pictures, [sorted({asked.first, asked.second}) for _, asked in scored.values()])
    for (index, (image, asked)), boxes in zip(scored.items(), found, strict=True):
        rewards[index] = float(getattr(judge(boxes, asked, image.size), value))
    return rewards


def corrected(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """`reward` with value="corrected", for a recipe: reward_funcs.spatial_2d:corrected."""
    return reward(prompts, completions, value="corrected", **columns)


def graded(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """`reward` with value="graded", for a recipe: reward_funcs.spatial_2d:graded."""
    return reward(prompts, completions, value="graded", **columns)


def label(models: Models | None = None) -> str:
    """The name under which to give results."""
    detector = (models or Models()).detector
    return f"2D-spatial (detector={detector if isinstance(detector, str) else detector.label})"


def in_classes(relation: Relation, detector: BoxDetector) -> Relation | None:
    """The relation in the detector's names; None where it has no name for a noun."""
    first, second = detector.class_of(relation.first), detector.class_of(relation.second)
    return None if first is None or second is None else Relation(first, relation.words, second)


def judge(detections: Sequence[Mapping[str, Any]], relation: Relation, size: tuple[int, int]) -> Verdict:
    """The rule alone. detections: {"class", "box" (xyxy, pixels), "score"}; size: (width, height) of the picture."""
    found = in_frame(detections, size)
    firsts = [box for box in found if box["class"] == relation.first]
    seconds = [box for box in found if box["class"] == relation.second]
    first, second = next(iter(firsts), None), next(iter(seconds), None)
    published = pair_score(published_place, relation.words, first, second)
    if relation.first == relation.second:
        second = firsts[1] if len(firsts) > 1 else None
        # Which of two equals is meant cannot be told: either order may fulfil the prompt.
        orders = [(first, second), (second, first)]
    else:
        orders = [(first, second)]
    graded = max(pair_score(corrected_place, relation.words, one, other) for one, other in orders)
    return Verdict(cut(published), cut(graded), graded)

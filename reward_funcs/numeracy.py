"""T2I-CompBench's numeracy score as a reward: "numeracy (detector=...)".

    reward = mean over the prompt's nouns of  (one half if any is found) + (one half if the count is right)

As UniDet_eval/numeracy_eval.py: boxes of one class that share over 0.9 of their union or of either area count once. Its
detector, UniDet, has no transformers port, so give results under `label()`. Two details differ: counts come from
`_compbench_text` (the same on 1299 of the benchmark's 1300 lines; "one candle lit up a cozy cup" here has a cup), and a
noun meets a detector's class by name or a written synonym, where the released code takes any class whose name contains
the noun ("car" in "carrot").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reward_funcs._compbench_detectors import BoxDetector
from reward_funcs._compbench_geometry import in_frame, without_duplicates
from reward_funcs._compbench_text import read_prompt
from reward_funcs.runtime import check_images, prompt_text
from reward_funcs.spatial_2d import Models

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BoxDetector", "Models", "judge", "label", "reward"]


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Image | None],
    compbench: Sequence[str | None] | None = None,
    models: Models | None = None,
    **columns: Any,
) -> list[float | None]:
    """Numeracy of each picture.

    None where the picture is None, or its prompt counts nothing, or the detector does not know one of the nouns.

    compbench: JSON strings, see `_compbench_text`; without, the counts are read from the prompt.
    """
    said = [None] * len(prompts) if compbench is None else compbench
    check_images("numeracy", completions, prompts=prompts, compbench=said)
    asked = [read_prompt(prompt_text(prompt), line).counts for prompt, line in zip(prompts, said, strict=True)]
    rewards: list[float | None] = [None] * len(completions)
    if not any(image is not None and asked[index] for index, image in enumerate(completions)):
        return rewards
    detector = (models or Models()).load()
    known = [in_classes(counts, detector) for counts in asked]
    scored = {i: (image, known[i]) for i, image in enumerate(completions) if image is not None and known[i]}
    pictures = [image for image, _ in scored.values()]
    found = detector.find(pictures, [sorted(counts) for _, counts in scored.values()])
    for (index, (image, counts)), boxes in zip(scored.items(), found, strict=True):
        rewards[index] = judge(boxes, counts, image.size)
    return rewards


def label(models: Models | None = None) -> str:
    """The name under which to give results."""
    detector = (models or Models()).detector
    return f"numeracy (detector={detector if isinstance(detector, str) else detector.label})"


def in_classes(counts: Mapping[str, int], detector: BoxDetector) -> dict[str, int]:
    """The counts by the detector's names, nouns of one class added up; empty where it has no name for a noun."""
    known: dict[str, int] = {}
    for noun, number in counts.items():
        name = detector.class_of(noun)
        if name is None:
            return {}
        known[name] = known.get(name, 0) + number
    return known


def judge(detections: Sequence[Mapping[str, Any]], counts: Mapping[str, int], size: tuple[int, int]) -> float:
    """The rule alone. detections: {"class", "box" (xyxy, pixels), "score"}; size: (width, height) of the picture."""
    names = [found["class"] for found in without_duplicates(in_frame(detections, size))]
    return sum(0.5 * (name in names) + 0.5 * (names.count(name) == number) for name, number in counts.items()) / len(
        counts
    )

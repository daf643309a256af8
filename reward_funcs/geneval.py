"""GenEval as a reward: "GenEval (HF Mask2Former)".

    picture -> instances (Mask2Former) -> colours where asked (CLIP) -> verdict (GenEval's rule)

The rule is the benchmark's, to the last comparison; the detector is transformers' Mask2Former, whose weights come from
another training run than the benchmark's mmdet model. So numbers are close to, but not, the official ones: report them
under the label above. With another detector write its name there.

Values of a verdict that can be the reward:
    correct       the benchmark's 0 or 1; extra objects allowed (default: what the GCPO authors train on)
    strict        0 or 1, exact counts
    score         the reward server's partial credit (what Flow-GRPO trains on); may be negative
    score_fixed   `score` without its reward for a missed position, never below 0
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_funcs._geneval_color import COLORS, ColorClassifier, classify_colors, load_color_classifier, object_on_grey
from reward_funcs._geneval_detector import CLASSES, Instance, detect, load_detector
from reward_funcs._geneval_metadata import RELATIONS, TAGS, validate_metadata
from reward_funcs._geneval_rule import (
    Rule,
    Verdict,
    judge,
    keep_boxes,
    looked_at,
    relative_position,
    rule_from_options,
    threshold_for,
)
from reward_funcs.runtime import batches_of_one_size, check_images, dataset_column, reward_device

if TYPE_CHECKING:
    from PIL.Image import Image

# fmt: off
__all__ = [
    "CLASSES", "COLORS", "RELATIONS", "TAGS",
    "Models", "Verdict", "judge", "judge_images", "relative_position", "reward", "validate_metadata",
]
# fmt: on

VALUES = ("correct", "strict", "score", "score_fixed")
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Models:
    """Which models see, by hub id or folder, how sure they must be, and where they run. Unset, the environment decides.

    detector: Mask2Former, or RT-DETR, RT-DETRv2, D-FINE or DETR, which give boxes without masks and whose thresholds
    need setting. device "auto" is GCPO_REWARD_DEVICE, or else this rank's GPU if there is one.
    """

    detector: str = field(default_factory=lambda: os.environ.get("GENEVAL_DETECTOR", DETECTOR))
    clip: str = field(default_factory=lambda: os.environ.get("GENEVAL_CLIP", CLIP))
    device: str = "auto"
    threshold: float = field(default_factory=lambda: float(os.environ.get("GENEVAL_THRESHOLD", Rule.threshold)))
    counting_threshold: float = field(
        default_factory=lambda: float(os.environ.get("GENEVAL_COUNTING_THRESHOLD", Rule.counting_threshold))
    )
    batch_size: int = 8  # images of 800 x 800 the detector sees at a time


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Image | None],
    metadata: Sequence[str | None],
    value: str = "correct",
    models: Models | None = None,
    **columns: Any,
) -> list[float | None]:
    """GenEval's verdict of each image as a float; None where the image or its metadata is None.

    metadata: JSON strings; the prompts are not read, since the metadata says what they ask for.
    """
    if value not in VALUES:
        raise ValueError(f"value={value!r}; write one of {', '.join(VALUES)}")
    check_images("geneval", completions, metadata=metadata)
    asked = [None if line is None else validate_metadata(line, CLASSES, COLORS) for line in metadata]
    scored = {i: image for i, image in enumerate(completions) if image is not None and asked[i] is not None}
    rewards: list[float | None] = [None] * len(completions)
    if scored:
        verdicts = judge_images(list(scored.values()), [asked[i] for i in scored], models)
        for index, verdict in zip(scored, verdicts, strict=True):
            rewards[index] = float(getattr(verdict, value))
    return rewards


def strict(prompts: Any, completions: Any, metadata: Any, **columns: Any) -> list[float | None]:
    """`reward` with value="strict", for a recipe: reward_funcs.geneval:strict."""
    return reward(prompts, completions, metadata, "strict", **columns)


def score(prompts: Any, completions: Any, metadata: Any, **columns: Any) -> list[float | None]:
    """`reward` with value="score", for a recipe: reward_funcs.geneval:score."""
    return reward(prompts, completions, metadata, "score", **columns)


def score_fixed(prompts: Any, completions: Any, metadata: Any, **columns: Any) -> list[float | None]:
    """`reward` with value="score_fixed", for a recipe: reward_funcs.geneval:score_fixed."""
    return reward(prompts, completions, metadata, "score_fixed", **columns)


def check_rows(dataset: Any) -> None:
    """Every metadata can be judged; the trainer asks before it loads a model."""
    for line in dataset_column("geneval", dataset, "metadata"):
        if line is not None:
            validate_metadata(line, CLASSES, COLORS)


def judge_images(
    images: Sequence[Image], metadata: Sequence[Any], models: Models | None = None, **options: float
) -> list[Verdict]:
    """Detect, classify colours where a clause asks for one, judge. options: fields of Rule, ahead of `models`'s."""
    models = models or Models()
    options = {"threshold": models.threshold, "counting_threshold": models.counting_threshold} | options
    rule = rule_from_options(options)
    device = reward_device(models.device)
    detector = load_detector(models.detector, device)
    verdicts: dict[int, Verdict] = {}
    for batch in batches_of_one_size(images, models.batch_size):
        found = detect(detector, [images[i] for i in batch], floor=min(rule.threshold, rule.counting_threshold))
        for index, instances in zip(batch, found, strict=True):
            asked = validate_metadata(metadata[index], CLASSES, COLORS)
            detections = [as_detection(instance) for instance in instances]
            if any("color" in clause for clause in asked.get("include", [])):
                classifier = load_color_classifier(models.clip, device)
                detections = with_colors(classifier, images[index], detections, asked, rule)
            verdicts[index] = judge(detections, asked, **options)
    return [verdicts[index] for index in range(len(images))]


def as_detection(instance: Instance) -> dict[str, Any]:
    """An instance as `judge` reads it, with its mask for the colour."""
    return {"class": instance.name, "box": instance.box, "score": instance.score, "mask": instance.mask}


def with_colors(
    classifier: ColorClassifier, image: Image, detections: Sequence[dict[str, Any]], asked: dict[str, Any], rule: Rule
) -> list[dict[str, Any]]:
    """The detections, with "color" on those that a colour clause looks at; no rule reads it on any other."""
    kept = keep_boxes(detections, threshold_for(asked, rule), rule.max_objects, rule.max_overlap)
    colors: dict[int, str] = {}
    for clause in asked.get("include", []):
        boxes = looked_at(kept.get(clause["class"], []), clause["count"])
        if "color" in clause and len(boxes) == clause["count"]:
            crops = [object_on_grey(image, box["mask"], box["box"]) for box in boxes]
            named = classify_colors(classifier, crops, clause["class"])
            colors |= {id(box): color for box, color in zip(boxes, named, strict=True)}
    return [box | {"color": colors[id(box)]} if id(box) in colors else box for box in detections]

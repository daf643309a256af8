"""T2I-CompBench's 3-in-1 score, for its complex prompts, as a reward.

    spatial          (2D-spatial + BLIP-VQA) / 2            "The red hat was on top of the brown coat."
    action           (CLIP + BLIP-VQA) / 2                  "The shiny silver car zoomed past the old rusty truck."
    spatial_action   (2D-spatial + CLIP + BLIP-VQA) / 3     "The sleek black cat sat next to the fluffy white pillow."

As 3_in_1_eval/3_in_1.py, which looks the kind of a prompt up in the benchmark's lists; here it is the `compbench`
column's "kind", or read from the prompt (`_compbench_text.kind_of`). CLIP is the bare cosine under ViT-B/32 with the
prompt less its adjectives (CLIPScore_eval/CLIP_similarity.py --complex). The spatial part depends on the detector: give
results under `label()`. The benchmark draws 10 pictures a prompt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_funcs import _clip, blip_vqa, spatial_2d
from reward_funcs._compbench_text import read_prompt
from reward_funcs._weights import found
from reward_funcs.runtime import check_images, prompt_text, reward_device, rewards_of

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP = "openai/clip-vit-base-patch32"
PARTS = {  # kind of prompt -> the parts whose mean is the score
    "spatial": ("attribute", "spatial"),
    "action": ("attribute", "action"),
    "spatial_action": ("attribute", "spatial", "action"),
}


@dataclass(frozen=True)
class Models:
    """The models of the three parts. Unset, the environment decides."""

    blip: blip_vqa.Scorer = field(default_factory=blip_vqa.Scorer)
    spatial: spatial_2d.Models = field(default_factory=spatial_2d.Models)
    clip: str = field(default_factory=lambda: os.environ.get("COMPBENCH_CLIP", CLIP))
    device: str = "auto"  # of CLIP
    batch_size: int = 32


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Image | None],
    compbench: Sequence[str | None] | None = None,
    value: str = "published",
    models: Models | None = None,
    **columns: Any,
) -> list[float | None]:
    """3-in-1 of each picture; None where the picture is None or a part that its kind needs is None.

    value: that of the spatial part, see `spatial_2d`. compbench: JSON strings, see `_compbench_text`.
    """
    if value not in spatial_2d.VALUES:
        raise ValueError(f"value={value!r}; write one of {', '.join(spatial_2d.VALUES)}")
    said = [None] * len(prompts) if compbench is None else compbench
    check_images("compbench_3in1", completions, prompts=prompts, compbench=said)
    asked = [read_prompt(prompt_text(prompt), line) for prompt, line in zip(prompts, said, strict=True)]
    models = models or Models()

    def needed(part: str) -> list[Image | None]:
        return [image if part in PARTS[one.kind] else None for image, one in zip(completions, asked, strict=True)]

    parts = {
        "attribute": blip_vqa.reward(prompts, completions, said, models.blip),
        "spatial": spatial_2d.reward(prompts, needed("spatial"), said, value, models.spatial),
        "action": similarities(models, needed("action"), [one.clip_text for one in asked]),
    }
    return [mean([parts[part][index] for part in PARTS[one.kind]]) for index, one in enumerate(asked)]


def label(models: Models | None = None) -> str:
    """The name under which to give results."""
    models = models or Models()
    return f"3-in-1 ({spatial_2d.label(models.spatial)})"


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values; None where one is None: a part that could not be judged is no 0."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def similarities(models: Models, images: Sequence[Image | None], texts: Sequence[str]) -> list[float | None]:
    """Cosine of each image with its text under CLIP, None for None. Gradient: none."""

    def cosines(pictures: list[Image], captions: list[str]) -> list[float]:
        with found("the CLIP of 3-in-1", models.clip, CLIP, "COMPBENCH_CLIP"):
            model = _clip.load_model(models.clip, reward_device(models.device))
            tokenizer = _clip.load_tokenizer(models.clip)
        return _clip.cosines(model, tokenizer, pictures, captions, models.batch_size)

    return rewards_of("compbench_3in1", texts, images, cosines)

"""PickScore as a reward: CLIP ViT-H-14 fine-tuned on people's choices between two pictures.

    reward = exp(logit_scale) * <normalise(image features), normalise(text features)>

Kirstain et al. 2023 (arXiv:2305.01569); 20.6 to 22.1 in GCPO's Table 2. Raw prompt, no template, float32.
transformers' own processor for this model rounds the middle of a picture that is not square down where clip.py rounds
to even, which `_clip` follows: then the crop may lie one pixel to the side. Square pictures are the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_funcs import _clip
from reward_funcs._weights import found
from reward_funcs.runtime import reward_device, rewards_of

if TYPE_CHECKING:
    from PIL.Image import Image

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the model's repository has no tokenizer
# What the score is divided by, under who does so.
SCALES = {
    "raw": 1.0,  # the paper
    "flow_grpo": 26.0,  # Flow-GRPO, pickscore_scorer.py: near 1 for a good picture
    "gcpo": 100.0,  # GCPO's authors, reward_pickscore.py: the bare cosine, since exp(logit_scale) is near 100
}


@dataclass(frozen=True)
class Scorer:
    """Which weights score, in which scale, and where. Unset, the environment decides.

    model, tokenizer: folder or hub id.
    """

    model: str = field(default_factory=lambda: os.environ.get("PICKSCORE_MODEL", MODEL))
    tokenizer: str = field(default_factory=lambda: os.environ.get("PICKSCORE_TOKENIZER", PROCESSOR))
    scale: str = "raw"
    device: str = "auto"  # GCPO_REWARD_DEVICE, or else this rank's GPU if there is one
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"PickScore scale={self.scale!r}; write one of {', '.join(SCALES)}")


def reward(
    prompts: Sequence[Any], completions: Sequence[Image | None], scorer: Scorer | None = None, **columns: Any
) -> list[float | None]:
    """PickScore of each picture with its prompt; None where the picture is None."""
    scorer = scorer or Scorer()
    return rewards_of("pickscore", prompts, completions, lambda images, texts: scores(scorer, images, texts))


def flow_grpo(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """`reward` in Flow-GRPO's scale, for a recipe: reward_funcs.pickscore:flow_grpo."""
    return reward(prompts, completions, Scorer(scale="flow_grpo"), **columns)


def gcpo(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """`reward` in the scale of GCPO's authors, for a recipe: reward_funcs.pickscore:gcpo."""
    return reward(prompts, completions, Scorer(scale="gcpo"), **columns)


def scores(scorer: Scorer, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
    """PickScore of each image with its text. Gradient: none."""
    device = reward_device(scorer.device)
    with found("PickScore's model", scorer.model, MODEL, "PICKSCORE_MODEL"):
        model = _clip.load_model(scorer.model, device)
    with found(
        "PickScore's tokenizer", scorer.tokenizer, f"{PROCESSOR} {_clip.TOKENIZER_FILES}", "PICKSCORE_TOKENIZER"
    ):
        tokenizer = _clip.load_tokenizer(scorer.tokenizer)
    factor = model.logit_scale.exp().item() / SCALES[scorer.scale]
    return [factor * cosine for cosine in _clip.cosines(model, tokenizer, images, texts, scorer.batch_size)]

"""CLIPScore as a reward: the cosine of picture and prompt under a CLIP as OpenAI released it.

    reward = <normalise(image features), normalise(text features)>

Numbers of two backbones do not compare, so a table names the backbone: `label` does. In the field: ViT-L/14
(ImageReward's package, models/CLIPScore.py) and ViT-B/32 (T2I-CompBench, CLIP_similarity.py), both bare cosines;
Hessel et al. 2021 (arXiv:2104.08718) multiply, cut at 0 and write "A photo depicts " before the caption.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_funcs import _clip
from reward_funcs._weights import found
from reward_funcs.runtime import reward_device, rewards_of

if TYPE_CHECKING:
    from PIL.Image import Image

MODEL = "openai/clip-vit-large-patch14"
HESSEL_PREFIX = "A photo depicts "  # jmhessel/clipscore, clipscore.py
SCALES: dict[str, Callable[[float], float]] = {
    "cosine": lambda cosine: cosine,  # ImageReward, T2I-CompBench
    "x100": lambda cosine: 100 * cosine,  # torchmetrics' CLIPScore, which also cuts the mean of a data set at 0
    "hessel": lambda cosine: 2.5 * max(cosine, 0.0),  # jmhessel/clipscore, get_clip_score; its backbone is ViT-B/32
}


@dataclass(frozen=True)
class Scorer:
    """Which CLIP scores, in which scale, and where. Unset, the environment decides.

    model: folder or hub id of the backbone, with its tokenizer. scale "hessel" also writes the paper's prefix.
    """

    model: str = field(default_factory=lambda: os.environ.get("CLIPSCORE_MODEL", MODEL))
    scale: str = "cosine"
    device: str = "auto"  # GCPO_REWARD_DEVICE, or else this rank's GPU if there is one
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"CLIPScore scale={self.scale!r}; write one of {', '.join(SCALES)}")


def label(scorer: Scorer | None = None) -> str:
    """What a table calls the numbers: CLIPScore (openai/clip-vit-large-patch14, cosine)."""
    scorer = scorer or Scorer()
    return f"CLIPScore ({scorer.model}, {scorer.scale})"


def reward(
    prompts: Sequence[Any], completions: Sequence[Image | None], scorer: Scorer | None = None, **columns: Any
) -> list[float | None]:
    """CLIPScore of each picture with its prompt; None where the picture is None."""
    scorer = scorer or Scorer()
    return rewards_of("clipscore", prompts, completions, lambda images, texts: scores(scorer, images, texts))


def x100(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """`reward` times 100, for a recipe: reward_funcs.clipscore:x100."""
    return reward(prompts, completions, Scorer(scale="x100"), **columns)


def hessel(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """`reward` as Hessel et al. scale it, for a recipe: reward_funcs.clipscore:hessel."""
    return reward(prompts, completions, Scorer(scale="hessel"), **columns)


def scores(scorer: Scorer, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
    """CLIPScore of each image with its text. Gradient: none."""
    with found(f"{label(scorer)}: the backbone", scorer.model, MODEL, "CLIPSCORE_MODEL"):
        model = _clip.load_model(scorer.model, reward_device(scorer.device))
        tokenizer = _clip.load_tokenizer(scorer.model)
    if scorer.scale == "hessel":
        texts = [HESSEL_PREFIX + text for text in texts]
    scale = SCALES[scorer.scale]
    return [scale(cosine) for cosine in _clip.cosines(model, tokenizer, images, texts, scorer.batch_size)]

"""Aesthetic Predictor v2.5 as a reward: LAION's idea on SigLIP so400m, also for drawings; 1 to 10. No prompt is read.

    reward = head(normalise(pooled output of SigLIP's vision tower)),   head: five linear layers without activations

discus0434/aesthetic-predictor-v2-5, siglip_v2_5.py. The GCPO authors' LlamaGen runs name it "aps". The picture is
resized to the model's square, not cropped. The released example runs bfloat16; this runs float32. The head file is
published under AGPL-3.0.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_funcs._clip import normalised, unit_pixels
from reward_funcs._linear_head import linear_head
from reward_funcs._weights import WeightFile, found, pretrained, read_tensors
from reward_funcs.aesthetic import ratings
from reward_funcs.runtime import reward_device, rewards_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

SIGLIP = "google/siglip-so400m-patch14-384"
HEAD = WeightFile(
    "the aesthetic v2.5 head",
    "aesthetic_predictor_v2_5.pth",
    "AESTHETIC_V25_HEAD",
    url="https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth",
)
LAYERS = ("scoring_head.0", "scoring_head.2", "scoring_head.4", "scoring_head.6", "scoring_head.8")
MEAN = STD = (0.5, 0.5, 0.5)  # transformers' SiglipImageProcessor


@dataclass(frozen=True)
class Scorer:
    """Which weights score, and where. Unset, the environment decides, or else the head lies in the working folder.

    head: a file, or a folder with HEAD.name. siglip: folder or hub id.
    """

    head: str = field(default_factory=lambda: os.environ.get("AESTHETIC_V25_HEAD", HEAD.name))
    siglip: str = field(default_factory=lambda: os.environ.get("AESTHETIC_V25_SIGLIP", SIGLIP))
    device: str = "auto"  # GCPO_REWARD_DEVICE, or else this rank's GPU if there is one
    batch_size: int = 32


def reward(
    prompts: Sequence[Any], completions: Sequence[Image | None], scorer: Scorer | None = None, **columns: Any
) -> list[float | None]:
    """Aesthetic v2.5 score of each picture; None where the picture is None."""
    scorer = scorer or Scorer()
    return rewards_of("aesthetic_v25", prompts, completions, lambda images, texts: scores(scorer, images))


def scores(scorer: Scorer, images: Sequence[Image]) -> list[float]:
    """Aesthetic v2.5 score of each image. Gradient: none."""
    device = reward_device(scorer.device)
    head = load_head(scorer.head, device)
    with found("aesthetic v2.5's SigLIP", scorer.siglip, SIGLIP, "AESTHETIC_V25_SIGLIP"):
        model = load_siglip(scorer.siglip, device)
    values: list[float] = []
    for start in range(0, len(images), scorer.batch_size):
        values.extend(ratings(head, image_features(model, images[start : start + scorer.batch_size])).tolist())
    return values


def image_features(model: Any, images: Sequence[Image]) -> Tensor:
    """Pooled output of each image, (images, dim). Gradient: none."""
    import torch

    batch = torch.stack([pixel_values(image, model.config.image_size) for image in images]).to(model.device)
    with torch.inference_mode():
        return model(pixel_values=batch).pooler_output


def pixel_values(image: Image, side: int) -> Tensor:
    """Picture as SigLIP takes it, (3, side, side): stretched to the square by PIL's bicubic filter."""
    from PIL.Image import Resampling

    return normalised(unit_pixels(image.convert("RGB").resize((side, side), Resampling.BICUBIC)), MEAN, STD)


@functools.cache
def load_siglip(place: str, device: str) -> Any:
    """SigLIP's vision tower in float32, loaded once a process."""
    from transformers import SiglipVisionModel

    logger.info("aesthetic v2.5: loading %s on %s", place, device)
    return pretrained(SiglipVisionModel, place).to(device)


@functools.cache
def load_head(place: str, device: str) -> Any:
    """The head, loaded once a process."""
    path = HEAD.find(place)
    return linear_head(f"the aesthetic v2.5 head {path}", read_tensors(path), LAYERS).to(device)

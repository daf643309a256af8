"""LAION's aesthetic score as a reward: how people would rate a picture, 1 to 10. The prompt is not read.

    reward = head(normalise(image features of CLIP ViT-L/14)),   head: five linear layers without activations

christophschuhmann/improved-aesthetic-predictor, simple_inference.py; the head file is the one Flow-GRPO ships
(sac+logos+ava1-l14-linearMSE). Not cut to 1..10.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_funcs import _clip
from reward_funcs._linear_head import linear_head
from reward_funcs._weights import WeightFile, found, read_tensors
from reward_funcs.runtime import reward_device, rewards_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CLIP = "openai/clip-vit-large-patch14"
HEAD = WeightFile(
    "the aesthetic head",
    "sac+logos+ava1-l14-linearMSE.pth",
    "AESTHETIC_HEAD",
    url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
)
LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")


@dataclass(frozen=True)
class Scorer:
    """Which weights score, and where. Unset, the environment decides, or else the head lies in the working folder.

    head: a file, or a folder with HEAD.name. clip: folder or hub id.
    """

    head: str = field(default_factory=lambda: os.environ.get("AESTHETIC_HEAD", HEAD.name))
    clip: str = field(default_factory=lambda: os.environ.get("AESTHETIC_CLIP", CLIP))
    device: str = "auto"  # GCPO_REWARD_DEVICE, or else this rank's GPU if there is one
    batch_size: int = 32


def reward(
    prompts: Sequence[Any], completions: Sequence[Image | None], scorer: Scorer | None = None, **columns: Any
) -> list[float | None]:
    """Aesthetic score of each picture; None where the picture is None."""
    scorer = scorer or Scorer()
    return rewards_of("aesthetic", prompts, completions, lambda images, texts: scores(scorer, images))


def scores(scorer: Scorer, images: Sequence[Image]) -> list[float]:
    """Aesthetic score of each image. Gradient: none."""
    device = reward_device(scorer.device)
    head = load_head(scorer.head, device)
    with found("the aesthetic score's CLIP", scorer.clip, CLIP, "AESTHETIC_CLIP"):
        model = _clip.load_model(scorer.clip, device)
    values: list[float] = []
    for start in range(0, len(images), scorer.batch_size):
        features = _clip.image_features(model, images[start : start + scorer.batch_size])
        values.extend(ratings(head, features).tolist())
    return values


def ratings(head: Any, features: Tensor) -> Tensor:
    """The head's rating of each row of features, (images, dim) -> (images,). Gradient: none."""
    import torch

    with torch.inference_mode():
        return head(torch.nn.functional.normalize(features, dim=-1)).squeeze(-1)


@functools.cache
def load_head(place: str, device: str) -> Any:
    """The head, loaded once a process."""
    path = HEAD.find(place)
    return linear_head(f"the aesthetic head {path}", read_tensors(path), LAYERS).to(device)

"""Human Preference Score v2 and v2.1 as a reward: the cosine of picture and prompt under a fine-tuned CLIP ViT-H-14.

    reward = <normalise(image features), normalise(text features)>

As hpsv2/img_score.py: raw prompt, no template, no logit scale; about 0.2 to 0.35 for usual pictures. The benchmark
prints it times 100. The released code runs under autocast; this runs float32. The `hpsv2` package is not needed, and
does not import on current versions.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_funcs import _clip, _open_clip
from reward_funcs._weights import WeightFile, found, read_tensors
from reward_funcs.runtime import reward_device, rewards_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}  # hpsv2/utils.py
REPOSITORY = "xswu/HPSv2"
TOKENIZER = "openai/clip-vit-large-patch14"  # any CLIP tokenizer: the vocabulary is one and the same


@dataclass(frozen=True)
class Scorer:
    """Which weights score, and where. Unset, the environment decides.

    checkpoint: a .pt or .safetensors file, a folder with the version's file, or a hub repository. version "2.1" is what
    the GCPO authors train on; the hpsv2 package itself defaults to 2.0.
    """

    checkpoint: str = field(default_factory=lambda: os.environ.get("HPSV2_CHECKPOINT", REPOSITORY))
    version: str = field(default_factory=lambda: os.environ.get("HPSV2_VERSION", "2.1"))
    tokenizer: str = field(default_factory=lambda: os.environ.get("HPSV2_TOKENIZER", TOKENIZER))
    device: str = "auto"  # GCPO_REWARD_DEVICE, or else this rank's GPU if there is one
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.version not in FILES:
            raise ValueError(f"HPSv2 version={self.version!r}; write one of {', '.join(FILES)}")


def reward(
    prompts: Sequence[Any], completions: Sequence[Image | None], scorer: Scorer | None = None, **columns: Any
) -> list[float | None]:
    """HPSv2 of each picture with its prompt; None where the picture is None."""
    scorer = scorer or Scorer()
    return rewards_of("hpsv2", prompts, completions, lambda images, texts: scores(scorer, images, texts))


def scores(scorer: Scorer, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
    """Cosine of each image with its text. Gradient: none."""
    device = reward_device(scorer.device)
    model, tokenizer = load_scorer(scorer.checkpoint, scorer.version, scorer.tokenizer, device)
    return _clip.cosines(model, tokenizer, images, texts, scorer.batch_size, pixel_values)


def pixel_values(image: Image, side: int) -> Tensor:
    """Picture as the model takes it, (3, side, side).

    hpsv2 turns the picture into a tensor BEFORE it resizes, so the resize is the tensor one: bicubic, smoothed when it
    shrinks (torchvision's default since 0.17; older versions did not smooth), values beyond [0, 1] not clamped.
    """
    from torch.nn.functional import interpolate

    height, width = _clip.fitted(image.height, image.width, side)
    top, left = _clip.middle(height, width, side)
    pixels = _clip.unit_pixels(image)[None]
    pixels = interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)[0]
    return _clip.normalised(pixels[:, top : top + side, left : left + side])


@functools.cache
def load_scorer(checkpoint: str, version: str, tokenizer: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer, loaded once a process."""
    path = checkpoint_path(checkpoint, version)
    logger.info("HPSv2 %s: loading %s on %s", version, path, device)
    with found("HPSv2's tokenizer", tokenizer, f"{TOKENIZER} {_clip.TOKENIZER_FILES}", "HPSV2_TOKENIZER"):
        words = _clip.load_tokenizer(tokenizer)
    return _open_clip.clip_model(read_tensors(path)).to(device), words


def checkpoint_path(checkpoint: str, version: str) -> Path:
    """The checkpoint's file: as given, the version's file in a folder, or downloaded from a hub repository."""
    what = f"the HPSv2 {version} checkpoint"
    return WeightFile(what, FILES[version], "HPSV2_CHECKPOINT", REPOSITORY).find(checkpoint)

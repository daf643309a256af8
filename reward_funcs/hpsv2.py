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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _open_clip
from ._runtime import check_images, prompt_text, reward_device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}  # hpsv2/utils.py
REPOSITORY = "xswu/HPSv2"
TOKENIZER = "openai/clip-vit-large-patch14"  # any CLIP tokenizer: the vocabulary is one and the same
# hpsv2/src/open_clip/constants.py
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


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
    check_images("hpsv2", completions, prompts=prompts)
    scored = {i: image for i, image in enumerate(completions) if image is not None}
    rewards: list[float | None] = [None] * len(completions)
    if scored:
        texts = [prompt_text(prompts[i]) for i in scored]
        for index, value in zip(scored, cosines(scorer, list(scored.values()), texts), strict=True):
            rewards[index] = value
    return rewards


def cosines(scorer: Scorer, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
    """Cosine of each image with its text. Gradient: none."""
    import torch

    device = reward_device(scorer.device)
    model, tokenizer = load_scorer(scorer.checkpoint, scorer.version, scorer.tokenizer, device)
    length = model.config.text_config.max_position_embeddings
    side = model.config.vision_config.image_size
    values: list[float] = []
    for start in range(0, len(images), scorer.batch_size):
        pixels = torch.stack([pixel_values(image, side) for image in images[start : start + scorer.batch_size]])
        batch = list(texts[start : start + scorer.batch_size])
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            image_features = model.get_image_features(pixel_values=pixels.to(device)).pooler_output
            text_features = model.get_text_features(**tokens.to(device)).pooler_output
        values.extend(torch.cosine_similarity(image_features, text_features, dim=-1).tolist())
    return values


def pixel_values(image: Image, side: int) -> Tensor:
    """Picture as the model takes it, (3, side, side).

    hpsv2 turns the picture into a tensor BEFORE it resizes, so the resize is the tensor one: bicubic, smoothed when it
    shrinks (torchvision's default since 0.17; older versions did not smooth), values beyond [0, 1] not clamped.
    """
    import torch
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    height, width = pixels.shape[1:]
    resized = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    pixels = interpolate(pixels[None], size=resized, mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = round((resized[0] - side) / 2), round((resized[1] - side) / 2)
    pixels = pixels[:, top : top + side, left : left + side]
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@functools.cache
def load_scorer(checkpoint: str, version: str, tokenizer: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer, loaded once a process."""
    from transformers import CLIPTokenizer

    path = checkpoint_path(checkpoint, version)
    logger.info("HPSv2 %s: loading %s on %s", version, path, device)
    try:
        words = CLIPTokenizer.from_pretrained(tokenizer)
    except OSError as error:
        raise FileNotFoundError(
            f"HPSv2's tokenizer {tokenizer!r} is neither a local folder nor downloadable here: run "
            f"`hf download {TOKENIZER} vocab.json merges.txt tokenizer_config.json --local-dir DIR` where there is a "
            "network and set HPSV2_TOKENIZER=DIR"
        ) from error
    return _open_clip.clip_model(open_clip_state(path)).to(device), words


def checkpoint_path(checkpoint: str, version: str) -> Path:
    """The checkpoint's file: as given, the version's file in a folder, or downloaded from a hub repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = Path(checkpoint).expanduser()
    if path.is_dir():
        path = path / FILES[version]
    if path.is_file():
        return path
    try:
        return Path(hf_hub_download(checkpoint, FILES[version]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"the HPSv2 {version} checkpoint {checkpoint!r} is neither a file, nor a folder with {FILES[version]}, nor "
            f"downloadable here: run `hf download {REPOSITORY} {FILES[version]} --local-dir DIR` where there is a "
            "network and set HPSV2_CHECKPOINT=DIR"
        ) from error


def open_clip_state(path: Path) -> Mapping[str, Tensor]:
    """State dict of a checkpoint in open_clip's layout. Only tensors are read: no pickled code runs."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return saved.get("state_dict", saved)

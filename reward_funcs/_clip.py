"""What rewards on CLIP share: the picture as the model takes it, the model, cosines in batches.

CLIP's transform (clip.py, `_transform`): short side to the model's by PIL's bicubic filter, the middle square,
normalised with CLIP's mean and deviation. HPSv2 alone resizes otherwise: hpsv2.py.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_funcs._weights import pretrained

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

# OpenAI's CLIP (clip.py, `_transform`); open_clip's constants.py has the same.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOKENIZER_FILES = "vocab.json merges.txt tokenizer_config.json"


def fitted(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width with the short side at `side`, the long one rounded down as torchvision's Resize does."""
    return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)


def middle(height: int, width: int, side: int) -> tuple[int, int]:
    """Top and left of the middle square, as torchvision's CenterCrop: halves go to the even number."""
    return round((height - side) / 2), round((width - side) / 2)


def normalised(pixels: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Pixels (3, height, width) in [0, 1] with the mean of each channel taken off and its deviation divided out."""
    import torch

    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def unit_pixels(picture: Image) -> Tensor:
    """Picture -> (3, height, width) in [0, 1]."""
    import torch

    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def pixel_values(image: Image, side: int) -> Tensor:
    """Picture as CLIP takes it, (3, side, side)."""
    from PIL.Image import Resampling

    height, width = fitted(image.height, image.width, side)
    top, left = middle(height, width, side)
    resized = image.convert("RGB").resize((width, height), Resampling.BICUBIC)
    return normalised(unit_pixels(resized.crop((left, top, left + side, top + side))))


@functools.cache
def load_model(place: str, device: str) -> Any:
    """CLIPModel in float32, loaded once a process, whichever rewards use it."""
    from transformers import CLIPModel

    logger.info("loading the CLIP %s on %s", place, device)
    return pretrained(CLIPModel, place).to(device)


@functools.cache
def load_tokenizer(place: str) -> Any:
    """CLIP's tokenizer, loaded once a process."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(place)


def cosines(
    model: Any,
    tokenizer: Any,
    images: Sequence[Image],
    texts: Sequence[str],
    batch_size: int,
    pixels: Callable[[Image, int], Tensor] = pixel_values,
) -> list[float]:
    """Cosine of each image with its text; longer texts are cut to the model's length. Gradient: none."""
    import torch

    length = model.config.text_config.max_position_embeddings
    values: list[float] = []
    for start in range(0, len(images), batch_size):
        features = image_features(model, images[start : start + batch_size], pixels)
        batch = list(texts[start : start + batch_size])
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            text_features = model.get_text_features(**tokens.to(model.device)).pooler_output
            values.extend(torch.cosine_similarity(features, text_features, dim=-1).tolist())
    return values


def image_features(
    model: Any, images: Sequence[Image], pixels: Callable[[Image, int], Tensor] = pixel_values
) -> Tensor:
    """Features of the images in CLIP's common space, (images, dim), not normalised. Gradient: none."""
    import torch

    side = model.config.vision_config.image_size
    batch = torch.stack([pixels(image, side) for image in images]).to(model.device)
    with torch.inference_mode():
        return model.get_image_features(pixel_values=batch).pooler_output

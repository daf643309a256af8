"""Colour of a detected object by CLIP zero-shot classification, as GenEval's evaluator does it.

    direction(colour) = normalise(mean over templates of normalise(text features))
    colour(object)    = argmax of cosine(image features of the object on grey, cropped to its box, direction)

evaluation/evaluate_images.py::color_classification with clip_benchmark's zero-shot classifier. The released code runs
half precision on CUDA; this runs float32.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reward_funcs.runtime import whole_weights

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# "a orange" stays: the released templates do not inflect the article.
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = "#999"  # released evaluator, ImageCrops


@dataclass(frozen=True, eq=False)
class ColorClassifier:
    """A loaded CLIP with its tokenizer and image processor."""

    model: Any
    tokenizer: Any
    processor: Any
    device: str


@functools.cache
def load_color_classifier(model_id: str, device: str) -> ColorClassifier:
    """Load once a process."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    logger.info("GenEval (HF Mask2Former): loading the colour classifier %s on %s", model_id, device)
    try:
        with whole_weights():
            model: Any = CLIPModel.from_pretrained(model_id, dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(model_id)
    except OSError as error:
        raise FileNotFoundError(
            f"GenEval's colour classifier {model_id!r} is neither a local folder nor downloadable here: run "
            "`hf download openai/clip-vit-large-patch14 --local-dir DIR` where there is a network "
            "and set GENEVAL_CLIP=DIR"
        ) from error
    side = model.config.vision_config.image_size
    # Short side to `side` by PIL bicubic, then the centre: a long thin object loses its ends, as released.
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return ColorClassifier(model.to(device).eval(), tokenizer, processor, device)


def classify_colors(classifier: ColorClassifier, crops: Sequence[Image], name: str) -> list[str]:
    """Colour of each crop of an object of class `name`. Gradient: none."""
    import torch

    inputs = classifier.processor(list(crops), return_tensors="pt").to(classifier.device)
    with torch.inference_mode():
        features = classifier.model.get_image_features(**inputs).pooler_output
    return nearest_colors(features, color_directions(classifier, name))


@functools.lru_cache(maxsize=128)
def color_directions(classifier: ColorClassifier, name: str) -> Tensor:
    """Direction of each colour for a class, (colors, dim)."""
    import torch

    texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
    tokens = classifier.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(classifier.device)
    with torch.inference_mode():
        features = classifier.model.get_text_features(**tokens).pooler_output
    return mean_directions(features.unflatten(0, (len(COLORS), len(TEMPLATES))))


def mean_directions(features: Tensor) -> Tensor:
    """Unit vector along the mean of the unit vectors of each class, (classes, templates, dim) -> (classes, dim)."""
    from torch.nn.functional import normalize

    return normalize(normalize(features, dim=-1).mean(dim=1), dim=-1)


def nearest_colors(features: Tensor, directions: Tensor) -> list[str]:
    """Colour whose direction has the largest cosine with each row of features, (objects, dim) x (colors, dim)."""
    return [COLORS[index] for index in (features @ directions.T).argmax(dim=-1).tolist()]


def object_on_grey(image: Image, mask: np.ndarray | None, box: Sequence[float]) -> Image:
    """The object alone on grey #999, cropped to its box in whole pixels; without a mask, all that is in the box."""
    from PIL.Image import composite, fromarray, new

    picture = image.convert("RGB")
    if mask is not None:
        picture = composite(picture, new("RGB", picture.size, BACKGROUND), fromarray(mask))
    left, top, right, bottom = box
    left, top = math.floor(left), math.floor(top)
    return picture.crop((left, top, max(math.ceil(right), left + 1), max(math.ceil(bottom), top + 1)))

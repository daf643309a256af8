"""Image features of a CLIP, the one that `reward_funcs/clipscore.py` scores with (``CLIPSCORE_MODEL``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reward_funcs import _clip
from reward_funcs._weights import found
from reward_funcs.clipscore import MODEL, Scorer
from reward_funcs.runtime import reward_device


def label() -> str:
    """Which CLIP."""
    return f"CLIP {Scorer().model}"


def features(pictures: Sequence[Any]) -> Tensor:
    """Features in CLIP's common space, ``(pictures, dim)``. Gradient: none."""
    scorer = Scorer()
    with found("diversity in CLIP's space: the model", scorer.model, MODEL, "CLIPSCORE_MODEL"):
        model = _clip.load_model(scorer.model, reward_device(scorer.device))
    size = scorer.batch_size
    parts = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    return torch.cat([_clip.image_features(model, part) for part in parts]).cpu()

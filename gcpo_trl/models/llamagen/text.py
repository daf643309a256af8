"""Text features for LlamaGen's prefix: a frozen T5 encoder beside the policy, each caption encoded once."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5EncoderModel

from reward_funcs.runtime import whole_weights

logger = logging.getLogger(__name__)

KEPT = 4096  # captions whose features stay in memory: about 20 tokens x 2048 x 2 bytes each, 340 MB


class TextEncoder:
    """Features of captions given as token ids. The model loads when the first caption comes.

    A caption is encoded alone and remembered by its ids, so that sampling and scoring read the same features, whatever
    batch either comes in. ``load`` builds the encoder: by default `T5EncoderModel.from_pretrained`.
    """

    def __init__(self, name: str, tokens: int, load: Any = None) -> None:
        self.name = name
        self.tokens = tokens
        self.model: Any = None
        self._load = load or load_t5
        self._features: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(batch, tokens, dim)`` of captions ``(batch, seq)``, moved to the end, and their mask.

        Positions before a caption are zero, as released (sample_t2i.py, left padding).
        """
        captions = [tuple(row[seen.bool()].tolist()) for row, seen in zip(ids, mask, strict=True)]
        found = [self._of(caption, ids.device) for caption in captions]
        features = found[0].new_zeros((len(found), self.tokens, found[0].shape[-1]), device=ids.device)
        shown = torch.zeros(len(found), self.tokens, dtype=torch.long, device=ids.device)
        for row, one in enumerate(found):
            features[row, self.tokens - len(one) :] = one.to(ids.device)
            shown[row, self.tokens - len(one) :] = 1
        return features, shown

    def _of(self, caption: tuple[int, ...], device: torch.device) -> Tensor:
        if caption not in self._features:
            if not 0 < len(caption) <= self.tokens:
                raise ValueError(
                    f"a caption has {len(caption)} tokens; the prefix holds 1 to {self.tokens}, so let the "
                    "LlamaGenProcessor cut it"
                )
            if self.model is None:
                self.model = self._load(self.name, device)
            ids = torch.tensor([caption], device=self.model.device)
            features = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            self._features[caption] = features.cpu()
            if len(self._features) > KEPT:
                self._features.popitem(last=False)
        self._features.move_to_end(caption)
        return self._features[caption]


def load_t5(name: str, device: torch.device) -> T5EncoderModel:
    """The encoder on ``device``, in bf16 on a GPU as released; whole on every rank, as it is no part of an engine."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logger.info("text encoder: loading %s in %s on %s", name, dtype, device)
    try:
        with whole_weights():
            return T5EncoderModel.from_pretrained(name, dtype=dtype).requires_grad_(False).eval().to(device)
    except OSError as error:
        raise FileNotFoundError(
            f"the text encoder {name!r} is neither a folder nor downloadable here: run `hf download google/flan-t5-xl "
            "--local-dir DIR` where there is a network and set caption_encoder in the model's config.json to DIR"
        ) from error


def resolve(name: str, home: str) -> str:
    """Where a text encoder lies: a folder beside the model it belongs to, or what ``name`` says."""
    beside = Path(home) / name
    return str(beside) if home and (beside / "config.json").is_file() else name

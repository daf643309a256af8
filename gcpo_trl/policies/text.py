"""A text language model: tokens on a line. TRL samples and scores it; critical tokens need only its embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


class TextPolicy:
    """A text policy, of which TRL does everything but the critical tokens."""

    generates_images = False
    layout = None

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor

    @torch.no_grad()
    def token_table(self, space: str = "aligner") -> Tensor:
        """Input embeddings ``(vocab, dim)``: the space the model reads; text has no other."""
        return self.model.get_input_embeddings().weight


def adapt(model: Any, processor: Any) -> TextPolicy:
    """The policy around a loaded model."""
    return TextPolicy(model, processor)


def load(model_id: str, **kwargs: Any) -> TextPolicy:
    """Load model and tokenizer from a path or an id."""
    return TextPolicy(AutoModelForCausalLM.from_pretrained(model_id, **kwargs), AutoTokenizer.from_pretrained(model_id))

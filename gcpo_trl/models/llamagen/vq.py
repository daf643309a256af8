"""LlamaGen's image tokenizer VQ-16: transformers has its network as `JanusVQVAE`, with another lookup."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.janus.modeling_janus import JanusVQVAE, JanusVQVAEVectorQuantizer

from .configuration import LlamaGenVQConfig

USAGE = 65536  # length of the released buffer of recently used codes; kept so that a checkpoint converts back whole


class NormalizedQuantizer(JanusVQVAEVectorQuantizer):
    """Nearest code by cosine: latents and codes are normalised at every lookup (tokenizer_image/vq_model.py)."""

    def __init__(self, config: LlamaGenVQConfig) -> None:
        super().__init__(config)
        self.register_buffer("codebook_used", torch.zeros(USAGE))

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised latents ``(batch, dim, height, width)``, the codebook loss, and code ids ``(batch * h * w,)``.

        Gradient: straight through to ``hidden_state``; the loss also to the codebook.
        """
        latents = F.normalize(hidden_state.permute(0, 2, 3, 1), dim=-1)
        codes = F.normalize(self.embedding.weight, dim=-1)
        flat = latents.flatten(0, 2)
        # The released code's expression of the squared distance, so that ties and rounding fall as they do there.
        distances = flat.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * flat @ codes.T
        ids = distances.argmin(1)
        chosen = codes[ids].view(latents.shape)
        loss = F.mse_loss(chosen, latents.detach()) + self.beta * F.mse_loss(latents, chosen.detach())
        quantized = latents + (chosen - latents).detach()
        return quantized.permute(0, 3, 1, 2).contiguous(), loss, ids


class LlamaGenVQModel(JanusVQVAE):
    """``encode(pixels).image_tokens`` and ``decode(ids (batch, seq))``; pixels ``(batch, 3, side, side)`` in [-1, 1].

    Decoded pixels are not clamped.
    """

    config: LlamaGenVQConfig
    config_class = LlamaGenVQConfig

    def __init__(self, config: LlamaGenVQConfig) -> None:
        super().__init__(config)
        self.quantize = NormalizedQuantizer(config)
        self.post_init()

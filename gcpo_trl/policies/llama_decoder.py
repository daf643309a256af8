"""Decodes with a transformers Llama body one token at a time, without what `generate` does around every token.

The prompt goes through transformers' own forward. After that a step is the model's own modules (so adapters and
quantised layers act as they do elsewhere) around a cache that is written in place and read to its present length;
rotary angles of all positions are computed once, and no mask is built where no prompt is padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class LlamaDecoder:
    """Keys and values of ``rows`` growing sequences. ``body`` is a ``LlamaModel``; ``rows`` pick prefilled prompts.

    prefill: ``hidden`` is the last position's state ``(rows, dim)``. step: from one embedding a row to the next state.
    """

    def __init__(self, body: Any, embeddings: Tensor, mask: Tensor, rows: Tensor, steps: int) -> None:
        """Run the prompts ``(prompts, seq, dim)``, left-padded as ``mask``, and make room for ``steps`` more tokens."""
        cache = DynamicCache(config=body.config)
        first = positions(mask)
        hidden = body(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=first, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        self.body = body
        self.hidden = hidden[rows]
        self.length = mask.shape[1]
        # Rotary angles in fp32 make keys fp32 under autocast, which would cast them again at every step.
        device = mask.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        self.keys = [_with_room(layer.keys[rows].to(dtype), steps) for layer in cache.layers]
        self.values = [_with_room(layer.values[rows].to(dtype), steps) for layer in cache.layers]
        ahead = first[rows][:, -1:] + 1 + torch.arange(steps, device=mask.device)
        cosine, sine = body.rotary_emb(self.hidden, ahead)
        self.cosine, self.sine = cosine[:, None], sine[:, None]  # (rows, 1, steps, head_dim)
        self.taken = 0
        seen = torch.cat([mask[rows], mask.new_ones(len(rows), steps)], dim=1).bool()
        self.seen = None if bool(mask.all()) else seen[:, None, None]

    def step(self, embeddings: Tensor) -> Tensor:
        """Append one token a row, ``(rows, dim)``; returns its last hidden state ``(rows, dim)``."""
        hidden = embeddings
        for index, layer in enumerate(self.body.layers):
            hidden = hidden + self._attend(index, layer.self_attn, layer.input_layernorm(hidden))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.length += 1
        self.taken += 1
        return self.body.norm(hidden)

    def _attend(self, index: int, attention: Any, hidden: Tensor) -> Tensor:
        rows, end = len(hidden), self.length + 1
        keys, values = self.keys[index], self.values[index]
        key, value = (
            project(hidden).view(rows, -1, 1, attention.head_dim) for project in (attention.k_proj, attention.v_proj)
        )
        keys[:, :, end - 1 : end], values[:, :, end - 1 : end] = self._rotate(key), value
        # Query heads that share a key head are its rows: two matrix products, no repeated keys. On a CPU this takes a
        # third of the time of scaled_dot_product_attention, whose tiles of queries stay empty.
        query = self._rotate(attention.q_proj(hidden).view(rows, keys.shape[1], -1, attention.head_dim))
        scores = query @ keys[:, :, :end].transpose(-1, -2) * attention.scaling
        if self.seen is not None:
            scores = scores.masked_fill(~self.seen[..., :end], -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return attention.o_proj((weights @ values[:, :, :end]).view(rows, -1))

    def _rotate(self, states: Tensor) -> Tensor:
        half = states.shape[-1] // 2
        turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
        here = slice(self.taken, self.taken + 1)
        return states * self.cosine[:, :, here] + turned * self.sine[:, :, here]


def positions(mask: Tensor) -> Tensor:
    """Position ids that start at 0 on the first real token of a left-padded row."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _with_room(states: Tensor, steps: int) -> Tensor:
    """A copy of ``(rows, heads, seq, dim)`` with ``steps`` more places in the sequence."""
    return torch.cat([states, states.new_zeros(*states.shape[:2], steps, states.shape[3])], dim=2)

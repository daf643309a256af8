"""Decodes with a transformers Llama body one token at a time, without what `generate` does around every token.

The prompt goes through transformers' own forward. After that a step is `LlamaBlock` after `LlamaBlock` around a cache
that is written in place. It is read to its present length; or, with `fix`, up to a given column with the place counted
on the device, so that every step of that width has the same shapes and the same addresses, which is what a CUDA graph
replays. `GrowingDecoder` answers the same questions by transformers' forward alone, token by token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .llama_block import LlamaBlock, Place, norm_of, swap_halves

WINDOW = 64  # columns by which a fixed window grows: finer reads less, coarser captures fewer graphs


class LlamaDecoder:
    """Keys and values of ``rows`` growing sequences. ``body`` is a ``LlamaModel`` or has its names.

    fill: from prompts to the last position's state. step: from one embedding a row to the next state.
    """

    # What a family changes: which elements of a head its rotation pairs.
    swap = staticmethod(swap_halves)

    def __init__(self, body: Any) -> None:
        self.body = body
        self.positions = getattr(body, "positions", positions)
        self.blocks: list[LlamaBlock] = []
        self.window: int | None = None

    @torch.no_grad()
    def fill(self, embeddings: Tensor, mask: Tensor, rows: Tensor, steps: int) -> Tensor:
        """Run the prompts ``(prompts, seq, dim)``, left-padded as ``mask``, and make room for ``steps`` more tokens.

        ``rows`` say which prompt each sequence continues; returns their last hidden states ``(rows, dim)``. A decoder
        that is filled again keeps its memory where the shapes are the same.
        """
        cache, first = DynamicCache(config=self.body.config), self.positions(mask)
        hidden = self.body(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=first, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1][rows]
        self.length = mask.shape[1]
        self.taken, self.window = 0, None
        self.padded = not bool(mask.all())
        self._prepare(hidden, cache.layers[0].keys, len(rows), steps)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            block.keys[:, :, : self.length] = layer.keys[rows]
            block.values[:, :, : self.length] = layer.values[rows]
        cosine, sine = self.rotation(hidden, first[rows][:, -1:] + 1 + torch.arange(steps, device=mask.device))
        self.cosine[:steps], self.signed_sine[:steps] = cosine.transpose(0, 1), sine.transpose(0, 1)
        self.bias.zero_()
        padding = self.bias.view(len(rows), -1, self.bias.shape[-1])[:, :, : self.length]
        padding.masked_fill_(mask[rows][:, None] == 0, -torch.inf)
        return hidden

    def _prepare(self, hidden: Tensor, keys: Tensor, rows: int, steps: int) -> None:
        """Weights as they are now, and memory for ``steps`` tokens after the prompts."""
        device = hidden.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # Keys that are fp32 under autocast would be cast again at every step.
        dtype = cast or hidden.dtype
        _, heads, _, dim = keys.shape
        shape = (rows, heads, self.window_at(steps), dim)
        before: list[Any] = self.blocks or [None] * len(self.body.layers)
        if self.blocks and (self.blocks[0].keys.shape != shape or self.blocks[0].keys.dtype != dtype):
            before = [None] * len(before)
        if before[0] is None:
            self.bias = hidden.new_zeros((rows * heads, 1, shape[2]), dtype=dtype)
            self.cosine, self.signed_sine = (hidden.new_zeros((shape[2], rows, 1, dim)) for _ in range(2))
            self.columns = torch.arange(shape[2], device=hidden.device)
            self.column, self.turn = (self.columns.new_zeros(1) for _ in range(2))
        self.blocks = [
            LlamaBlock(layer, self.swap, cast, *(_caches(one, hidden, shape, dtype)), one)
            for layer, one in zip(self.body.layers, before, strict=True)
        ]
        self.norm = norm_of(self.body.norm)

    def rotation(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine, and sine with the sign of the swapped element, ``(rows, steps, 1, head_dim)`` each."""
        cosine, sine = self.body.rotary_emb(hidden, position_ids)
        half = sine.shape[-1] // 2
        return cosine[:, :, None], torch.cat([-sine[..., :half], sine[..., half:]], dim=-1)[:, :, None]

    def step(self, embeddings: Tensor) -> Tensor:
        """Append one token a row, ``(rows, dim)``; returns its last hidden state ``(rows, dim)``."""
        place = self._growing() if self.window is None else self._fixed(self.window)
        hidden = embeddings
        for block in self.blocks:
            hidden = block(hidden, place)
        if self.window is None:
            self.length, self.taken = self.length + 1, self.taken + 1
        else:
            self.column += 1
            self.turn += 1
        return self.norm(hidden)

    def _growing(self) -> Place:
        """Everything up to here is read; without padding all of it is seen."""
        end, here = self.length + 1, self.taken
        bias = self.bias[:, :, :end] if self.padded else self.bias[:1, :, :1]
        return Place(end - 1, self.cosine[here], self.signed_sine[here], end, bias, int(self.padded))

    def _fixed(self, window: int) -> Place:
        """The whole window is read, and what lies behind this token is hidden."""
        later = self.columns[:window] > self.column
        bias = self.bias[:, :, :window].masked_fill(later, -torch.inf)
        cosine, sine = (table.index_select(0, self.turn)[0] for table in (self.cosine, self.signed_sine))
        return Place(self.column, cosine, sine, window, bias, 1)

    # What a captured step needs

    def fix(self, window: int) -> None:
        """From here on read ``window`` columns of the cache; the first call hands the place over to the device."""
        if self.window is None:
            self.rewind()
        self.window = window

    def rewind(self) -> None:
        """Let the device count from the first token after the prompt."""
        self.column.fill_(self.length)
        self.turn.fill_(0)

    def window_at(self, steps: int) -> int:
        """The window that reads the prompt and ``steps`` tokens after it."""
        return -(-(self.length + steps) // WINDOW) * WINDOW

    @property
    def counters(self) -> list[Tensor]:
        """What a fixed step counts up, ``(1,)`` each."""
        return [self.column, self.turn]

    def storages(self) -> list[Tensor]:
        """Every tensor that a fixed step reads or writes and that might be moved between two rollouts."""
        blocks = [tensor for block in self.blocks for tensor in block.storages()]
        return [*blocks, *self.body.parameters(), self.cosine, self.signed_sine, self.bias]


class GrowingDecoder:
    """The plain loop: transformers' forward on one token more, its cache concatenated at every step."""

    def __init__(self, body: Any) -> None:
        self.body = body
        self.positions = getattr(body, "positions", positions)

    @torch.no_grad()
    def fill(self, embeddings: Tensor, mask: Tensor, rows: Tensor, steps: int) -> Tensor:
        """As `LlamaDecoder.fill`, except that every row runs its own prompt."""
        self.cache, self.mask = DynamicCache(config=self.body.config), mask[rows]
        return self._forward(embeddings[rows], self.positions(self.mask))

    def step(self, embeddings: Tensor) -> Tensor:
        """As `LlamaDecoder.step`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self._forward(embeddings[:, None], self.positions(self.mask)[:, -1:])

    def _forward(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        return self.body(
            inputs_embeds=embeddings,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


def positions(mask: Tensor) -> Tensor:
    """Position ids that start at 0 on the first real token of a left-padded row; a body may count in its own way."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _caches(before: LlamaBlock | None, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Keys and values of a layer: an earlier block's, or new ones."""
    return [before.keys, before.values] if before else [like.new_zeros(shape, dtype=dtype) for _ in range(2)]

"""A batch of images being drawn: a decoder, what it reads of each image code, and the head that says what comes next.

One for every family whose body `LlamaDecoder` runs; such a family answers ``start`` with `begin`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base import NextLogits
from .llama_decoder import GrowingDecoder, LlamaDecoder


@dataclass
class Generator:
    """The parts of a model that draw: ``body`` from embeddings to states, ``head`` from states to logits of codes.

    embed: what the body reads of codes ``(batch,)``; table: the same for every code, ``(vocab, dim)``, made when asked.
    decoder: `LlamaDecoder` or a subclass with another rotation.
    """

    body: nn.Module
    head: nn.Module
    embed: Callable[[Tensor], Tensor]
    table: Callable[[], Tensor]
    decoder: type[LlamaDecoder] = LlamaDecoder


@dataclass
class DecodeState:
    """Conditional rows of the ``batch`` images first, then, if something guides, the unconditional ones.

    dtype: of the prompts' embeddings. Autocast may embed codes in another, which training adds up with the prompts.
    """

    decoder: Any
    head: nn.Module
    embed: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    batch: int
    guided: bool
    table: Tensor | None = None

    def step(self, tokens: Tensor) -> NextLogits:
        """Append the newest token of each image, ``(batch, 1)``; the unconditional rows see the same token."""
        tokens = tokens[:, 0]
        embeddings = self.embed(tokens).to(self.dtype) if self.table is None else self.table[tokens]
        if self.guided:
            embeddings = embeddings.repeat(2, 1)
        return self.next(self.decoder.step(embeddings))

    def next(self, hidden: Tensor) -> NextLogits:
        """Logits ``(batch, 1, vocab)`` from the last hidden states ``(rows, dim)``."""
        logits = self.head(hidden)[:, None]
        return NextLogits(logits[: self.batch], logits[self.batch :] if self.guided else None)

    # What a captured step needs (`base.FixedState`)

    def fix(self, steps: int) -> int:
        """Fix the shapes for steps that see ``steps`` drawn tokens; returns the width, equal while shapes are equal."""
        window: int = self.decoder.window_at(steps)
        self.decoder.fix(window)
        return window

    def counters(self) -> list[Tensor]:
        """What a fixed step counts up in place."""
        return self.decoder.counters

    def storages(self) -> list[Tensor]:
        """Tensors whose addresses a captured step keeps."""
        return [self.table, *self.head.parameters(), *self.decoder.storages()]


@torch.no_grad()
def begin(
    generator: Generator,
    embeddings: Tensor,
    mask: Tensor,
    rows: Tensor,
    steps: int,
    guided: bool,
    plain: bool,
    into: DecodeState | None,
) -> tuple[DecodeState, NextLogits]:
    """Prefill prompts ``(prompts, seq, dim)`` and fan out to ``rows``, the unconditional half last if ``guided``.

    ``plain`` takes transformers' forward at every step and the embedding of every token; ``into`` is a state of this
    generator whose memory is used again.
    """
    batch = len(rows) // 2 if guided else len(rows)
    if into is None:
        decoder = GrowingDecoder(generator.body) if plain else generator.decoder(generator.body)
        state = DecodeState(decoder, generator.head, generator.embed, embeddings.dtype, batch, guided)
    else:
        state = into
        state.dtype, state.batch, state.guided = embeddings.dtype, batch, guided
    if not plain:
        table = generator.table().to(embeddings.dtype)
        # In place, because a captured step reads this address; anew every time, because the embeddings may train.
        fits = state.table is not None and state.table.shape == table.shape and state.table.dtype == table.dtype
        state.table = state.table.copy_(table) if fits else table.detach().clone()
    return state, state.next(state.decoder.fill(embeddings, mask, rows, steps))

"""What the rest of the code asks of a generator: five questions, the same for every family.

    encode(prompts)                 -> PromptBatch
    start / step                    -> logits of the next position, from a cache with one prefill a prompt
    logits at given positions       -> attach_head: the teacher-forced scoring that the trainer calls
    decode(tokens)                  -> pictures; pixels(tokens): those still on the device
    grid, token_table()             -> where tokens lie, and what they mean to the model

A text language model answers the last two; TRL samples and scores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .decoding.image_head import Scored


@dataclass(frozen=True)
class PromptBatch:
    """Prompts ready for sampling, left-padded to one length.

    ids, mask, unconditional_ids: (prompts, seq); mask is 1 on real tokens. The unconditional ids share the mask.
    """

    ids: Tensor
    mask: Tensor
    unconditional_ids: Tensor

    def row_ids(self, row: int) -> list[int]:
        """Ids of one prompt without its padding."""
        return self.ids[row][self.mask[row].bool()].tolist()


@dataclass(frozen=True)
class NextLogits:
    """Logits of the next token, ``(batch, vocab)``; ``unconditional`` is None when nothing guides."""

    conditional: Tensor
    unconditional: Tensor | None = None


@runtime_checkable
class FixedState(Protocol):
    """A state whose step can keep its shapes and addresses, so that a CUDA graph can replay it."""

    def fix(self, steps: int) -> int:
        """Fix the shapes for steps that see ``steps`` drawn tokens; returns the width, equal while shapes are equal."""
        ...

    def counters(self) -> list[Tensor]:
        """What a fixed step counts up in place."""
        ...

    def storages(self) -> list[Tensor]:
        """Tensors whose addresses a captured step keeps."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A generator whose tokens lie on a grid (images) or on a line (text)."""

    generates_images: bool
    grid: tuple[int, int] | None

    def token_table(self, space: str) -> Tensor:
        """Embedding of every token the policy can draw, ``(vocab, dim)``, no gradient."""
        ...


@runtime_checkable
class ImagePolicy(Policy, Protocol):
    """A generator of images of a fixed number of tokens."""

    model: Any
    num_tokens: int
    scored: Scored  # which tokens `attach_head` scores from now on

    def encode(self, prompts: Sequence[Any]) -> PromptBatch: ...

    def start(
        self, prompts: PromptBatch, rows: Tensor, guided: bool, plain: bool = False, into: Any = None
    ) -> tuple[Any, NextLogits]:
        """Prefill each prompt once and fan out: row ``i`` of the batch continues prompt ``rows[i]``.

        plain: by the library's own forward at every step, which the tests hold the fast one to. into: an earlier state,
        whose memory the new one takes over where shapes are equal.
        """
        ...

    def step(self, state: Any, tokens: Tensor) -> NextLogits:
        """Append one token a row, ``(batch,)``; ``state`` is advanced in place."""
        ...

    def pixels(self, tokens: Tensor) -> Tensor:
        """``decode`` as far as the device goes, without waiting for it: see `to_pictures`."""
        ...

    def decode(self, tokens: Tensor) -> list[Any]: ...

    def set_generation(self, guidance_scale: float) -> None:
        """Write into the model's own generation settings how it was sampled, for whoever loads a checkpoint."""
        ...

    def attach_head(self, model: Any, temperature: float) -> None:
        """Make ``model(..., labels=..., fused_lm_head=True)`` score image tokens with the image head."""
        ...

"""What the rest of the code asks of a generator: `Policy` of every one, `ImagePolicy` of those that generate images.

    encode(prompts)                 -> PromptBatch
    start / step                    -> logits of the next tokens, from a cache with one prefill per prompt
    attach_head                     -> the teacher-forced scoring that the trainer calls
    pixels / decode                 -> pictures, on the device or as PIL images
    layout, widths, token_table     -> where tokens lie, how many a step samples, and what they mean to the model
    modules, default_modules        -> the parts that can train, and those that do by default

`ImageFamily` is what the file of a family states as a module. A text language model needs `Policy` alone, since TRL
samples and scores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..objective.layout import Layout
from .decoding.constraint import Constraint
from .decoding.image_head import Scored


@dataclass(frozen=True)
class PromptBatch:
    """Prompts ready for sampling, left-padded to one length.

    ids, mask, unconditional_ids: (prompts, seq); a mask is 1 on real tokens. unconditional_mask: the same for the
    unconditional ids, of which a negative prompt may have another number; by default it is ``mask``.
    """

    ids: Tensor
    mask: Tensor
    unconditional_ids: Tensor
    own_unconditional_mask: Tensor | None = None

    @property
    def unconditional_mask(self) -> Tensor:
        """1 on the real tokens of the unconditional prompts, ``(prompts, seq)``."""
        return self.mask if self.own_unconditional_mask is None else self.own_unconditional_mask

    def row_ids(self, row: int) -> list[int]:
        """Ids of one prompt without its padding."""
        return self.ids[row][self.mask[row].bool()].tolist()


@dataclass(frozen=True)
class NextLogits:
    """Logits of the next tokens, ``(batch, width, vocab)``; ``unconditional`` is None when nothing guides."""

    conditional: Tensor
    unconditional: Tensor | None = None


@runtime_checkable
class FixedState(Protocol):
    """A state whose step can keep its shapes and addresses, so that a CUDA graph can replay it.

    Attributes:
        fix, counters, storages: see each method; all three are needed, or the rollout runs without graphs.

    Example:
        >>> isinstance(object(), FixedState)
        False
    """

    def fix(self, steps: int) -> int:
        """Fix the shapes for steps that see ``steps`` tokens; returns the width, equal while shapes are equal."""
        ...

    def counters(self) -> list[Tensor]:
        """What a fixed step counts up in place."""
        ...

    def storages(self) -> list[Tensor]:
        """Tensors whose addresses a captured step keeps."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A generator of which the trainer computes critical tokens.

    Attributes:
        generates_images: whether the policy is an `ImagePolicy`; TRL samples and scores the others.
        layout: the grids on which tokens lie; None for a text.

    Example:
        >>> from gcpo_trl.policies.text import TextPolicy
        >>> isinstance(TextPolicy(model=None, processor=None), Policy)
        True
    """

    generates_images: bool
    layout: Layout | None

    def token_table(self, space: str) -> Tensor:
        """Embedding of every token that the policy can sample, ``(vocab, dim)``, without gradient."""
        ...


@runtime_checkable
class ImagePolicy(Policy, Protocol):
    """A generator of images that each have the same number of tokens.

    Attributes:
        model: the plain module, also where PEFT or an engine wraps it elsewhere.
        processor: what turns prompts into ids, and is saved beside the model.
        num_tokens: tokens of an image, ``layout.tokens``.
        widths: how many tokens each step of a rollout samples, ``num_tokens`` in sum: ``(1, 1, ...)`` in raster order,
            ``(1, 4, 9, ...)`` for a next-scale model.
        scored: which tokens `attach_head` scores from now on.
        modules: parts that can train, by name, as paths inside ``model``.
        default_modules: names of the parts that train by default.

    A policy may also have ``constraint``, a `Constraint`; without one every code is allowed everywhere.

    Example:
        >>> from gcpo_trl.policies import load
        >>> from gcpo_trl.shapes.build import SHIPPED
        >>> policy = load(SHIPPED["shapes-janus"])
        >>> isinstance(policy, ImagePolicy), policy.layout.grids, sum(policy.widths)
        (True, ((9, 9),), 81)
    """

    model: Any
    processor: Any
    num_tokens: int
    widths: tuple[int, ...]
    scored: Scored
    modules: Mapping[str, str]
    default_modules: Sequence[str]

    def encode(self, prompts: Sequence[Any]) -> PromptBatch:
        """Prompts, strings or conversations, as ids."""
        ...

    def start(
        self, prompts: PromptBatch, rows: Tensor, guided: bool, plain: bool = False, into: Any = None
    ) -> tuple[Any, NextLogits]:
        """Prefill each prompt once and fan out: row ``i`` of the batch continues prompt ``rows[i]``.

        plain: by the library's own forward at every step, which the tests hold the fast one to. into: an earlier state,
        whose memory the new one takes over where shapes are equal. Returns the state and the logits of the first step.
        """
        ...

    def step(self, state: Any, tokens: Tensor) -> NextLogits:
        """Append the tokens of the step before, ``(batch, width)``; ``state`` is advanced in place.

        Returns the logits of the next step, ``(batch, width of that step, vocab)``.
        """
        ...

    def attach_head(self, model: Any, temperature: float) -> None:
        """Make ``model(..., labels=..., fused_lm_head=True)`` score image tokens with the image head."""
        ...

    def pixels(self, tokens: Tensor) -> Tensor:
        """``decode`` as far as the device goes, without waiting for it: ``(batch, height, width, 3)`` in [-1, 1]."""
        ...

    def decode(self, tokens: Tensor) -> list[Any]:
        """Pictures of token grids ``(batch, seq)``, as PIL images."""
        ...

    def set_generation(self, guidance_scale: float) -> None:
        """Write into the model's own generation settings how it was sampled, for whoever loads a checkpoint."""
        ...


@runtime_checkable
class ImageFamily(Protocol):
    """What the file of an image family states, as a module.

    Attributes:
        MODEL_TYPES: the ``config.model_type`` that the family adapts.
        LORA_LAYERS: for each part that LoRA can adapt, a pattern of the names of its linear layers.
        UNQUANTISED: modules that stay whole where the language model is quantised.

    Example:
        >>> from gcpo_trl.policies import janus
        >>> janus.MODEL_TYPES
        ('janus',)
    """

    MODEL_TYPES: tuple[str, ...]
    LORA_LAYERS: Mapping[str, str]
    UNQUANTISED: Sequence[str]

    def image_layout(self, config: Any) -> Layout:
        """Where the tokens of an image lie, from its configuration alone; ValueError if that contradicts itself."""
        ...

    def adapt(self, model: Any, processor: Any) -> ImagePolicy:
        """The policy around a loaded model."""
        ...

    def load(self, model_id: str, **kwargs: Any) -> ImagePolicy:
        """Load model and processor from a path or a hub id; keyword arguments go to ``from_pretrained``."""
        ...


def constraint_of(policy: Any) -> Constraint | None:
    """The constraint of a policy, None without one, with its tensors where the model is."""
    constraint: Constraint | None = getattr(policy, "constraint", None)
    if constraint is None:
        return None
    device: torch.device = policy.model.device
    return Constraint(constraint.kinds.to(device), constraint.allowed.to(device))

"""How a configuration samples images: the one place where `GCPOConfig` becomes a `Sampling`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..rollout import Sampling

if TYPE_CHECKING:
    from .gcpo import GCPOConfig


def sampling_of(args: GCPOConfig, **changes: Any) -> Sampling:
    """The `Sampling` that training with ``args`` uses; ``changes`` are fields of `Sampling` that differ."""
    sampling = Sampling(
        guidance_scale=args.rollout_guidance_scale,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        batch_size=args.rollout_batch_size,
        entropy_from=args.select_entropy_from,
        backend=args.rollout_backend,
    )
    return dataclasses.replace(sampling, **changes)

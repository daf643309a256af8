"""Sampling images from a policy: guidance, caches, seeds."""

from .engine import Rollout, chunks, joined, sample
from .recorder import BACKENDS, Sampling

__all__ = ["BACKENDS", "Rollout", "Sampling", "chunks", "joined", "sample"]

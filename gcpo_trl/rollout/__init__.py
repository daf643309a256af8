"""Sampling images from a policy: guidance, caches, seeds."""

from .engine import Rollout, Sampling, sample

__all__ = ["Rollout", "Sampling", "sample"]

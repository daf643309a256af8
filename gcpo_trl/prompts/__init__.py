"""Prompt sets: GenEval's own, training prompts in its style that avoid it, and files of prompts."""

from .files import load
from .geneval import canonical_key, generate, official

__all__ = ["canonical_key", "generate", "load", "official"]

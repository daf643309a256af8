"""One training step: `GCPOTrainer` and the stages of which it consists."""

from .gcpo_trainer import GCPOTrainer

__all__ = ["GCPOTrainer"]

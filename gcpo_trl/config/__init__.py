"""Settings of the trainers, one file for each trainer: flat dataclasses on `trl.GRPOConfig`."""

from .gcpo import GCPOConfig
from .sampling import sampling_of

__all__ = ["GCPOConfig", "sampling_of"]

"""Settings of the trainers, one file for each trainer: flat dataclasses on `trl.GRPOConfig`."""

from .gcpo import GCPOConfig

__all__ = ["GCPOConfig"]

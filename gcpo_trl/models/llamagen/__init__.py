"""LlamaGen (Sun et al., 2024, arXiv 2406.06525): a Llama over an image tokenizer's codes, after a text or a class."""

from .configuration import SIZES, LlamaGenConfig, LlamaGenVQConfig
from .modeling import LlamaGenForImageGeneration, LlamaGenModel
from .processing import LlamaGenProcessor
from .vq import LlamaGenVQModel

__all__ = [
    "SIZES",
    "LlamaGenConfig",
    "LlamaGenForImageGeneration",
    "LlamaGenModel",
    "LlamaGenProcessor",
    "LlamaGenVQConfig",
    "LlamaGenVQModel",
]

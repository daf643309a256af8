"""LlamaGen (Sun et al., 2024, arXiv 2406.06525): a Llama over the codes of an image tokenizer, after a text or a class."""

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

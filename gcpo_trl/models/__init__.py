"""Generators that transformers does not have, in its conventions, known to its Auto classes once imported."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .llamagen import (
    LlamaGenConfig,
    LlamaGenForImageGeneration,
    LlamaGenProcessor,
    LlamaGenVQConfig,
    LlamaGenVQModel,
)

AutoConfig.register("llamagen", LlamaGenConfig)
AutoConfig.register("llamagen_vq", LlamaGenVQConfig)
AutoModel.register(LlamaGenConfig, LlamaGenForImageGeneration)
AutoModel.register(LlamaGenVQConfig, LlamaGenVQModel)
AutoProcessor.register(LlamaGenConfig, LlamaGenProcessor)

# ``config.architectures[0]`` -> class, for loaders that look for it in transformers alone.
ARCHITECTURES = {"LlamaGenForImageGeneration": LlamaGenForImageGeneration}

__all__ = [
    "ARCHITECTURES",
    "LlamaGenConfig",
    "LlamaGenForImageGeneration",
    "LlamaGenProcessor",
    "LlamaGenVQConfig",
    "LlamaGenVQModel",
]

"""Generators that transformers does not have, in its conventions, known to its Auto classes once imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from .llamagen import LlamaGenConfig, LlamaGenForImageGeneration, LlamaGenProcessor, LlamaGenVQConfig, LlamaGenVQModel

AutoConfig.register("llamagen", LlamaGenConfig)
AutoConfig.register("llamagen_vq", LlamaGenVQConfig)
AutoModel.register(LlamaGenConfig, LlamaGenForImageGeneration)
AutoModel.register(LlamaGenVQConfig, LlamaGenVQModel)
AutoModelForCausalLM.register(LlamaGenConfig, LlamaGenForImageGeneration)  # what TRL falls back on
AutoProcessor.register(LlamaGenConfig, LlamaGenProcessor)

__all__ = [
    "LlamaGenConfig",
    "LlamaGenForImageGeneration",
    "LlamaGenProcessor",
    "LlamaGenVQConfig",
    "LlamaGenVQModel",
]

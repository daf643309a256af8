"""Configurations of LlamaGen and of its image tokenizer."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

# Layers, heads, width, width of the feed-forward layer (autoregressive/models/gpt.py, "GPT Configs").
SIZES = {
    "B": (12, 12, 768, 2048),
    "L": (24, 16, 1024, 2816),
    "XL": (36, 20, 1280, 3584),
    "XXL": (48, 24, 1536, 4096),
    "XXXL": (48, 40, 2560, 6912),
    "1B": (22, 32, 2048, 5632),
    "3B": (24, 32, 3200, 8704),
    "7B": (32, 32, 4096, 11008),
}
TEXT, CLASS = "text", "class"


@strict
class LlamaGenVQConfig(JanusVQVAEConfig):
    """VQ-16, the tokenizer that Janus took over; ``num_patches`` is the side of the token grid."""

    model_type = "llamagen_vq"
    base_config_key = "vq_config"

    num_patches: int = 16


@strict
class LlamaGenConfig(LlamaConfig):
    """A LlamaGen transformer; the fields beyond `LlamaConfig` are these.

    condition: "text" (a prefix of ``condition_tokens`` text-encoder features, ``caption_dim`` wide) or "class" (one of
    ``num_classes``; the prefix is one token). grid_size: side of the token grid, pixels / 16.
    caption_encoder: the T5 whose features are the prefix, by id or path; it is no part of the model.
    token_dropout, resid_dropout, ffn_dropout: 0.1 in pre-training, and 0 here, because a policy that is scored must be
    the policy that was sampled. vq_config: None for a model without image tokenizer, which gives codes, no images.
    """

    model_type = "llamagen"
    sub_configs: ClassVar[dict[str, Any]] = {"vq_config": LlamaGenVQConfig}
    # TRL reads these two of every model that comes with a processor or is not transformers' own.
    auto_map: ClassVar[dict[str, str]] = {}
    image_token_id: ClassVar[int] = -1

    vocab_size: int = 16384
    hidden_size: int = 1280
    intermediate_size: int = 3584
    num_hidden_layers: int = 36
    num_attention_heads: int = 20
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    condition: str = TEXT
    condition_tokens: int = 120
    caption_dim: int = 2048
    num_classes: int = 1000
    grid_size: int = 16
    caption_encoder: str = "google/flan-t5-xl"
    token_dropout: float | int = 0.0
    resid_dropout: float | int = 0.0
    ffn_dropout: float | int = 0.0
    vq_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.condition not in (TEXT, CLASS):
            raise ValueError(f"condition={self.condition!r} is unknown; write {TEXT!r} or {CLASS!r}")
        if self.condition == CLASS:
            self.condition_tokens = 1
        if isinstance(self.vq_config, dict):
            self.vq_config = LlamaGenVQConfig(**self.vq_config)
        if self.vq_config is not None:
            self.vq_config.num_patches = self.grid_size
        self.max_position_embeddings = self.condition_tokens + self.grid_size**2
        super().__post_init__(**kwargs)

    @property
    def num_image_tokens(self) -> int:
        return self.grid_size**2

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> LlamaGenConfig:
        """The configuration of a published size, such as "XL"."""
        if size not in SIZES:
            raise ValueError(f"there is no LlamaGen of size {size!r}; there are {', '.join(SIZES)}")
        names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
        return cls(**dict(zip(names, SIZES[size], strict=True)) | changes)


__all__ = ["CLASS", "SIZES", "TEXT", "LlamaGenConfig", "LlamaGenVQConfig"]

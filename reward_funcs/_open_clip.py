"""open_clip's CLIP weights in transformers' CLIPModel: a key rename, the fused q, k, v split, projections transposed.

Facts of the two layouts: open_clip keeps residual blocks under `[visual.]transformer.resblocks.N`, q, k, v as one
`attn.in_proj_weight` in that order, and multiplies features by `proj` (width, dim) from the right; CLIPModel keeps
three linear layers and projections of shape (dim, width).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# ViT-H-14 of LAION (open_clip model config); its vision heads are 80 wide. Its activation is the exact GELU, not
# OpenAI's quick one.
VIT_H_14: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}

NOT_WEIGHTS = {"attn_mask"}  # causal mask, a buffer in old checkpoints
WHOLE_KEYS = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
TRANSPOSED = {"text_projection", "visual.proj"}
NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def clip_model(state: Mapping[str, Tensor], config: Mapping[str, Any] = VIT_H_14) -> Any:
    """CLIPModel in float32 with open_clip's weights; a weight missing or left over is an error."""
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig(**config))
    model.load_state_dict(rename(state), strict=True)
    return model.eval()


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip state dict -> CLIPModel state dict, in float32."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key not in NOT_WEIGHTS:
            renamed |= rename_one(key, value.float())
    return renamed


def rename_one(key: str, value: Tensor) -> dict[str, Tensor]:
    """One open_clip weight under its CLIPModel name; a fused q, k, v weight becomes three."""
    if key in WHOLE_KEYS:
        return {WHOLE_KEYS[key]: value.T.contiguous() if key in TRANSPOSED else value}
    module, _, parameter = key.rpartition(".")
    if module in NORMS:
        return {f"{NORMS[module]}.{parameter}": value}
    block = BLOCK.fullmatch(key)
    if block is None:
        raise ValueError(f"the checkpoint's key {key!r} is not open_clip's CLIP layout; give a HPS_v2*.pt file")
    tower, layer, inside = block.groups()
    prefix = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{layer}"
    if inside in ("attn.in_proj_weight", "attn.in_proj_bias"):
        parameter = inside.removeprefix("attn.in_proj_")
        parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{name}.{parameter}": part.contiguous() for name, part in parts}
    module, _, parameter = inside.rpartition(".")
    if module not in IN_BLOCK:
        raise ValueError(f"the checkpoint's key {key!r} is not open_clip's CLIP layout; give a HPS_v2*.pt file")
    return {f"{prefix}.{IN_BLOCK[module]}.{parameter}": value}

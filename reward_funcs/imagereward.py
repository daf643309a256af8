"""ImageReward v1.0 as a reward: BLIP reads the picture while it reads the prompt, and a linear head rates the pair.

    image  = ViT-L/16(picture at 224)
    text   = BERT with cross-attention to image(prompt padded to 35 tokens), first token
    reward = (head(text) - MEAN) / STD,   head: five linear layers without activations

Xu et al. 2023 (arXiv:2304.05977), ImageReward/ImageReward.py; -0.2 to 1.0 in GCPO's Table 2. The
`image-reward` package is not needed, and does not import on current versions. Facts of its file's layout: timm's names
for the ViT, BERT's for the text, each block's q, k, v fused in both layouts.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_funcs import _clip
from reward_funcs._linear_head import linear_head
from reward_funcs._weights import WeightFile, check_keys, found, read_tensors
from reward_funcs.runtime import reward_device, rewards_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

FILE = WeightFile("the ImageReward checkpoint", "ImageReward.pt", "IMAGEREWARD_CHECKPOINT", "THUDM/ImageReward")
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # ImageReward.py, class ImageReward
LENGTH = 35  # tokens; the same file, inference_rank
LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
# models/BLIP/vit.py and blip.py (vit="large", image_size=224), train/src/config/med_config.json. As a decoder the text
# model has the cross-attention; it is still called as an encoder, so that each token sees the whole prompt.
LARGE: dict[str, dict[str, Any]] = {
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    "text": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "is_decoder": True,
    },
}
# In the file, not in the score: BLIP's contrastive projections and a buffer of old versions.
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|blip\.text_encoder\.embeddings\.position_ids$")
PREFIXES = {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "head": "mlp."}
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


@dataclass(frozen=True)
class Scorer:
    """Which weights score, and where. Unset, the environment decides.

    checkpoint: ImageReward.pt, its folder, or a hub repository with it. tokenizer: folder or hub id of BERT's.
    """

    checkpoint: str = field(default_factory=lambda: os.environ.get("IMAGEREWARD_CHECKPOINT", FILE.repository))
    tokenizer: str = field(default_factory=lambda: os.environ.get("IMAGEREWARD_TOKENIZER", TOKENIZER))
    device: str = "auto"  # GCPO_REWARD_DEVICE, or else this rank's GPU if there is one
    batch_size: int = 32


@dataclass(frozen=True, eq=False)
class Model:
    """The three parts of ImageReward."""

    vision: Any
    text: Any
    head: Any


def reward(
    prompts: Sequence[Any], completions: Sequence[Image | None], scorer: Scorer | None = None, **columns: Any
) -> list[float | None]:
    """ImageReward of each picture with its prompt; None where the picture is None."""
    scorer = scorer or Scorer()
    return rewards_of("imagereward", prompts, completions, lambda images, texts: scores(scorer, images, texts))


def scores(scorer: Scorer, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
    """ImageReward of each image with its text. Gradient: none."""
    tokenizer_files = f"{TOKENIZER} vocab.txt tokenizer.json tokenizer_config.json"
    with found("ImageReward's tokenizer", scorer.tokenizer, tokenizer_files, "IMAGEREWARD_TOKENIZER"):
        tokenizer = load_tokenizer(scorer.tokenizer)
    model = load_model(scorer.checkpoint, reward_device(scorer.device))
    values: list[float] = []
    for start in range(0, len(images), scorer.batch_size):
        batch = slice(start, start + scorer.batch_size)
        values.extend(ratings(model, tokenizer, images[batch], texts[batch]))
    return values


def ratings(model: Model, tokenizer: Any, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
    """ImageReward of one batch. Gradient: none."""
    import torch

    device, side = model.vision.device, model.vision.config.image_size
    pixels = torch.stack([_clip.pixel_values(image, side) for image in images]).to(device)
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.inference_mode():
        patches = model.vision(pixel_values=pixels).last_hidden_state
        hidden = model.text(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            encoder_hidden_states=patches,
            is_decoder=False,
        ).last_hidden_state
        return ((model.head(hidden[:, 0]).squeeze(-1) - MEAN) / STD).tolist()


@functools.cache
def load_tokenizer(place: str) -> Any:
    """BERT's tokenizer, loaded once a process."""
    from transformers import BertTokenizer

    return BertTokenizer.from_pretrained(place)


@functools.cache
def load_model(checkpoint: str, device: str) -> Model:
    """The model, loaded once a process."""
    path = FILE.find(checkpoint)
    logger.info("ImageReward: loading %s on %s", path, device)
    model = build(read_tensors(path))
    return Model(model.vision.to(device), model.text.to(device), model.head.to(device))


def build(state: Mapping[str, Tensor], sizes: Mapping[str, Mapping[str, Any]] = LARGE) -> Model:
    """The model in float32 with the released file's weights; a weight missing or left over is an error."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    parts = split(state)
    vision = BlipVisionModel(BlipVisionConfig(**sizes["vision"]))
    text = BlipTextModel(BlipTextConfig(**sizes["text"]), add_pooling_layer=False)
    for name, module in (("vision", vision), ("text", text)):
        check_keys(f"the ImageReward checkpoint's {name} model", parts[name], module.state_dict())
        module.load_state_dict(parts[name])
    head = linear_head("the ImageReward checkpoint's head", parts["head"], LAYERS)
    return Model(vision.eval(), text.eval(), head)


def split(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The released state dict as those of transformers' vision model, of its text model, and of the head."""
    used = {key: value.float() for key, value in state.items() if not UNUSED.match(key)}
    foreign = [key for key in used if not key.startswith(tuple(PREFIXES.values()))]
    check_keys("the ImageReward checkpoint", foreign, ())
    parts = {
        name: {key.removeprefix(prefix): value for key, value in used.items() if key.startswith(prefix)}
        for name, prefix in PREFIXES.items()
    }
    return parts | {"vision": {vision_name(key): value for key, value in parts["vision"].items()}}


def vision_name(key: str) -> str:
    """A weight of timm's ViT under its name in BlipVisionModel; a name neither knows stays and is reported."""
    for pattern, name in VISION_NAMES:
        key = re.sub(pattern, name, key)
    return key

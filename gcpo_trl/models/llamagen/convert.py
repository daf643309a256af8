"""Released LlamaGen checkpoints -> folders that `from_pretrained` opens, and back, tensor for tensor.

Known files: the transformer or the image tokenizer under "model", "module" or "state_dict", or bare; and the
community's transformers-like layout. Only tensors and plain containers are read (`weights_only`).
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .configuration import CLASS, SIZES, TEXT, LlamaGenConfig, LlamaGenVQConfig
from .modeling import LlamaGenForImageGeneration
from .vq import USAGE, LlamaGenVQModel

WRAPPERS = ("model", "module", "state_dict")  # data parallel, DeepSpeed, Lightning; FSDP writes the bare state
LAYOUTS = (*WRAPPERS, "bare", "community")
HEADS = {(layers, width): heads for layers, heads, width, _ in SIZES.values()}
RENAMED = (  # of the transformer: ours, released
    (r"^model\.embed_tokens\.", "tok_embeddings."),
    (r"^model\.condition\.(fc\d)", r"cls_embedding.cap_proj.\1"),
    (r"^model\.condition\.", "cls_embedding."),
    (r"^model\.norm\.", "norm."),
    (r"^lm_head\.", "output."),
    (r"^model\.layers\.", "layers."),
    (r"\.self_attn\.o_proj\.", ".attention.wo."),
    (r"\.self_attn\.[qkv]_proj\.", ".attention.wqkv."),
    (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
    (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
    (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
)
COMMUNITY = ((r"^model\.condition\.(fc\d)", r"model.cls_embedding.cap_proj.\1"), (r"\.condition\.", ".cls_embedding."))
TOKENIZER = (  # of the image tokenizer: ours, released
    (r"\.(?:down|up)\.(\d+)\.", r".conv_blocks.\1."),
    (r"\.block\.", ".res."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: its layout (one of `LAYOUTS`) and its tensors by their released names."""

    path: Path
    layout: str
    state: Mapping[str, Tensor]

    @property
    def is_tokenizer(self) -> bool:
        return "quantize.embedding.weight" in self.state


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a released file. ValueError, with what was found and what is known, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, or no file; give a LlamaGen checkpoint such as t2i_XL.pt")
    saved = _load(path)
    if not isinstance(saved, Mapping):
        raise ValueError(f"{path} holds a {type(saved).__name__}, no state dict; {_known()}")
    wrapper = next((key for key in WRAPPERS if isinstance(saved.get(key), Mapping)), None)
    state = saved[wrapper] if wrapper else saved
    if any(not isinstance(value, Tensor) for value in state.values()) or not state:
        raise ValueError(f"{path} holds {_some(state)} and no tensors under them; {_known()}")
    if "model.embed_tokens.weight" in state:
        return Checkpoint(path, "community", state)
    if {"tok_embeddings.weight", "quantize.embedding.weight"} & set(state):
        return Checkpoint(path, wrapper or "bare", state)
    raise ValueError(f"{path} holds {_some(state)}, which is no LlamaGen; {_known()}")


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        # Released training checkpoints keep their command line beside the weights; a Namespace is a plain container.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has a different one for each way in which a file can be broken
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is corrupt, cut short or holds more than tensors ({reason}); {_known()}") from error


def _known() -> str:
    return f"known are LlamaGen's transformer and image tokenizer under {', '.join(WRAPPERS)}, or bare, or community's"


def _some(state: Mapping[str, Any]) -> str:
    names = [str(name) for name in list(state)[:4]]
    return f"{', '.join(names)}{', ...' if len(state) > 4 else ''}" if names else "nothing"


# the transformer


def transformer_config(checkpoint: Checkpoint, heads: int | None = None, grid: int = 16) -> LlamaGenConfig:
    """The configuration that a checkpoint's shapes imply; heads and grid, which they do not, are asked for."""

    def shape(name: str) -> tuple[int, ...]:
        if (theirs := rename(name)) not in checkpoint.state:
            raise ValueError(f"{checkpoint.path} (layout {checkpoint.layout}) has no {theirs}; is it cut short?")
        return tuple(checkpoint.state[theirs].shape)

    rename = renaming(checkpoint.layout)
    vocab, width = shape("model.embed_tokens.weight")
    layers = len({m[1] for name in checkpoint.state if (m := re.match(r"(?:model\.)?layers\.(\d+)\.", name))})
    heads = heads or HEADS.get((layers, width))
    if heads is None or width % heads or (width // heads) % 4:
        raise ValueError(
            f"{checkpoint.path} has {layers} layers of width {width}, which is no published size, and heads={heads} "
            f"does not fit; give --heads (a divisor of {width}, with a multiple of 4 channels each)"
        )
    key_rows = shape("model.layers.0.self_attn.k_proj.weight")[0]
    if checkpoint.layout != "community":  # there, one matrix has the rows of queries, keys and values
        key_rows = (key_rows - width) // 2
    changes = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_rows // (width // heads),
        "intermediate_size": shape("model.layers.0.mlp.gate_proj.weight")[0],
        "grid_size": grid,
    }
    if (classes := rename("model.condition.embedding_table.weight")) in checkpoint.state:
        return LlamaGenConfig(**changes, condition=CLASS, num_classes=len(checkpoint.state[classes]) - 1)
    tokens, caption = shape("model.condition.uncond_embedding")
    return LlamaGenConfig(**changes, condition=TEXT, condition_tokens=tokens, caption_dim=caption)


def import_transformer(checkpoint: Checkpoint, config: LlamaGenConfig) -> LlamaGenForImageGeneration:
    """The model with a checkpoint's weights, all of them and nothing else."""
    with torch.device("meta"):
        model = LlamaGenForImageGeneration(config)
    rename = renaming(checkpoint.layout)
    theirs = {rename(name) for name in model.state_dict() if not name.startswith("vqmodel.")}
    _account(checkpoint, theirs)
    found = {}
    for name in model.state_dict():
        if not name.startswith("vqmodel."):
            value = checkpoint.state[rename(name)]
            found[name] = _turn(name, _part(name, value, config), config, halves=True)
    return _filled(model, found, checkpoint)


def export_transformer(model: LlamaGenForImageGeneration, layout: str) -> dict[str, Any]:
    """The contents of a file in one of `LAYOUTS`."""
    state: dict[str, Any] = {}
    rename = renaming(layout)
    for name, value in model.state_dict().items():
        if name.startswith("vqmodel."):
            continue
        value, theirs = _turn(name, value, model.config, halves=False), rename(name)
        state[theirs] = torch.cat([state[theirs], value]) if theirs in state else value  # q, k, v come in this order
    return wrap(state, layout)


def wrap(state: dict[str, Any], layout: str) -> dict[str, Any]:
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    return {layout: state} if layout in WRAPPERS else state


def renaming(layout: str) -> Callable[[str], str]:
    """Our names of the transformer's tensors -> those of a layout."""
    return functools.partial(_renamed, rules=COMMUNITY if layout == "community" else RENAMED)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    return name


def _part(name: str, value: Tensor, config: LlamaGenConfig) -> Tensor:
    """The rows of a fused projection that one of ours has; the whole of anything else."""
    match = re.search(r"\.([qkv])_proj\.", name)
    key_rows = config.num_key_value_heads * config.head_dim
    if match is None or len(value) != config.hidden_size + 2 * key_rows:
        return value
    return value.split([config.hidden_size, key_rows, key_rows])["qkv".index(match[1])]


def _turn(name: str, value: Tensor, config: LlamaGenConfig, halves: bool) -> Tensor:
    """Rows of a query or key projection: channels 2j, 2j+1 of a head become j, j + head_dim / 2, or the way back."""
    if not re.search(r"\.[qk]_proj\.", name):
        return value.clone()
    head = (config.head_dim // 2, 2) if halves else (2, config.head_dim // 2)
    return value.unflatten(0, (-1, *head)).transpose(1, 2).flatten(0, 2).contiguous()


# the image tokenizer


def import_tokenizer(checkpoint: Checkpoint, grid: int = 16) -> LlamaGenVQModel:
    """The image tokenizer with a checkpoint's weights; its shapes imply everything but the grid."""
    state = checkpoint.state
    if not checkpoint.is_tokenizer:
        raise ValueError(f"{checkpoint.path} holds {_some(state)}, no image tokenizer; give vq_ds16_t2i.pt or its like")
    base = state["encoder.conv_in.weight"].shape[0]
    levels = {int(m[1]) for name in state if (m := re.match(r"encoder\.conv_blocks\.(\d+)\.", name))}
    blocks = {m[1] for name in state if (m := re.match(r"encoder\.conv_blocks\.0\.res\.(\d+)\.", name))}
    config = LlamaGenVQConfig(
        base_channels=base,
        channel_multiplier=[
            state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] // base for i in sorted(levels)
        ],
        num_res_blocks=len(blocks),
        latent_channels=state["encoder.conv_out.weight"].shape[0],
        embed_dim=state["quantize.embedding.weight"].shape[1],
        num_embeddings=state["quantize.embedding.weight"].shape[0],
        num_patches=grid,
    )
    with torch.device("meta"):
        model = LlamaGenVQModel(config)
    names = {name: _renamed(name, TOKENIZER) for name in model.state_dict()}
    usage = {"quantize.codebook_used"} - set(state)  # a tokenizer trained without counting has no such buffer
    _account(checkpoint, set(names.values()) - usage)
    found = {name: state[theirs].clone() for name, theirs in names.items() if theirs in state}
    found |= {name: torch.zeros(USAGE) for name in usage}
    return _filled(model, found, checkpoint)


def export_tokenizer(model: LlamaGenVQModel, layout: str) -> dict[str, Any]:
    """The contents of a released tokenizer file."""
    return wrap({_renamed(name, TOKENIZER): value for name, value in model.state_dict().items()}, layout)


def _account(checkpoint: Checkpoint, expected: set[str]) -> None:
    missing, unexpected = sorted(expected - set(checkpoint.state)), sorted(set(checkpoint.state) - expected)
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint.path} (layout {checkpoint.layout}) is no whole LlamaGen: missing {missing or 'nothing'}; "
            f"unexpected {unexpected or 'nothing'}"
        )


def _filled(model: Any, state: dict[str, Tensor], checkpoint: Checkpoint) -> Any:
    """The model with ``state`` as its tensors; ValueError names the ones of another shape."""
    expected = model.state_dict()
    wrong = [
        f"{k} {tuple(v.shape)}, not {tuple(expected[k].shape)}"
        for k, v in state.items()
        if v.shape != expected[k].shape
    ]
    if wrong:
        raise ValueError(f"{checkpoint.path} has tensors of other shapes: {'; '.join(wrong)}")
    model.load_state_dict(state, strict=False, assign=True)
    return model.eval()

"""``gcpo convert``: released checkpoints of a family into a folder that `from_pretrained` opens, and back."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..models import LlamaGenForImageGeneration, LlamaGenProcessor, LlamaGenVQModel
from ..models.llamagen.configuration import CLASS
from ..models.llamagen.convert import (
    LAYOUTS,
    Checkpoint,
    export_tokenizer,
    export_transformer,
    import_tokenizer,
    import_transformer,
    read_checkpoint,
    transformer_config,
)
from ..models.llamagen.processing import class_tokenizer
from .console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("family", choices=["llamagen"])
    parser.add_argument("source", type=Path, help="a released .pt or .safetensors file; with --back a folder")
    parser.add_argument("target", type=Path, help="the new folder; with --back the new .pt file")
    parser.add_argument(
        "--vq", type=Path, help="the image tokenizer's file: without it the model draws codes, no pictures"
    )
    parser.add_argument(
        "--grid", type=int, default=16, help="side of the token grid: 16, 24, 32 at 256, 384, 512 pixels"
    )
    parser.add_argument("--heads", type=int, help="attention heads, for a size that was not published")
    parser.add_argument("--text-encoder", default="google/flan-t5-xl", help="id or folder of the T5 and its tokenizer")
    parser.add_argument("--back", action="store_true", help="from a folder to a released file")
    parser.add_argument("--layout", choices=LAYOUTS, default="model", help="of the file that --back writes")
    parser.add_argument("--part", choices=["transformer", "vq"], default="transformer", help="what --back writes")


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Read and check everything; the returned function writes."""
    if options.target.exists():
        raise FileExistsError(f"{options.target} exists already; name another place")
    return _backward(options) if options.back else _forward(options)


def _forward(options: argparse.Namespace) -> Callable[[], int]:
    source = read_checkpoint(options.source)
    model = import_tokenizer(source, options.grid) if source.is_tokenizer else _whole(source, options)
    processor = None if source.is_tokenizer else _processor(model.config, options)

    def write() -> int:
        part = options.target.with_name(f".{options.target.name}.part")  # nothing unfinished under the final name
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part)
        if processor is not None:
            processor.save_pretrained(part)
        os.replace(part, options.target)
        say(f"{options.source} (layout {source.layout}): {len(source.state)} tensors -> {options.target}")
        return 0

    return write


def _whole(source: Checkpoint, options: argparse.Namespace) -> LlamaGenForImageGeneration:
    config = transformer_config(source, options.heads, options.grid)
    config.caption_encoder = options.text_encoder
    model = import_transformer(source, config)
    if options.vq:
        vqmodel = import_tokenizer(read_checkpoint(options.vq), options.grid)
        if vqmodel.config.num_embeddings != config.vocab_size:
            raise ValueError(
                f"{options.vq} has {vqmodel.config.num_embeddings} codes, {options.source} draws {config.vocab_size}"
            )
        model.vqmodel, config.vq_config = vqmodel, vqmodel.config
    return model


def _processor(config: object, options: argparse.Namespace) -> LlamaGenProcessor | None:
    if config.condition == CLASS:
        return LlamaGenProcessor(class_tokenizer(config.num_classes), max_length=1)
    try:
        return LlamaGenProcessor(
            AutoTokenizer.from_pretrained(options.text_encoder), max_length=config.condition_tokens
        )
    except (OSError, ValueError):
        say(
            f"no tokenizer at {options.text_encoder!r} here: the folder will hold no processor. Give --text-encoder a "
            "folder that has one, or pass a LlamaGenProcessor of your own to the trainer"
        )
        return None


def _backward(options: argparse.Namespace) -> Callable[[], int]:
    folder = options.source
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no folder with a config.json; give what `gcpo convert` or a run has written"
        )
    if json.loads((folder / "config.json").read_text()).get("model_type") == LlamaGenVQModel.config_class.model_type:
        contents = export_tokenizer(LlamaGenVQModel.from_pretrained(folder, dtype="auto"), options.layout)
    else:
        model = LlamaGenForImageGeneration.from_pretrained(folder, dtype="auto")
        if options.part == "vq" and model.vqmodel is None:
            raise ValueError(f"{folder} has no image tokenizer, so there is no --part vq of it")
        vq = options.part == "vq"
        contents = export_tokenizer(model.vqmodel, options.layout) if vq else export_transformer(model, options.layout)

    def write() -> int:
        part = options.target.with_name(f".{options.target.name}.part")
        torch.save(contents, part)
        os.replace(part, options.target)
        say(f"{folder} -> {options.target} (layout {options.layout})")
        return 0

    return write

"""``gcpo sample``: draw images for prompts and save them as one grid."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..analysis.pictures import grid
from ..policies import load
from ..rollout import Sampling, sample
from ..shapes.build import SHIPPED
from .console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", required=True, help="repeat for several prompts")
    parser.add_argument("--images", type=int, default=4, help="images a prompt")
    parser.add_argument("--out", type=Path, default=Path("samples.png"))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how to sample from it."""
    parser.add_argument("--model", default="shapes-janus", help=f"path, hub id, {' or '.join(SHIPPED)}")
    parser.add_argument("--adapter", default=None, help="LoRA adapter on that model: path or hub id")
    parser.add_argument("--family", default=None, help="adapter in gcpo_trl/policies; default: the model's own")
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="Janus-Pro: 5; the shapes model: 1.5")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=128, help="images sampled at once")
    parser.add_argument("--seed", type=int, default=0)


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Sampling settings from parsed options."""
    return Sampling(
        guidance_scale=options.guidance_scale,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        batch_size=options.batch_size,
    )


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Load the model; the returned function samples and writes the grid."""
    policy = load_policy(options)
    return lambda: write_samples(policy, options)


def load_policy(options: argparse.Namespace) -> Any:
    """The model of the options, on a GPU in its own precision if there is one; in fp32 on a CPU, which is faster."""
    gpu = torch.cuda.is_available()
    policy = load(SHIPPED.get(options.model, options.model), options.family, dtype="auto" if gpu else torch.float32)
    if options.adapter:
        PeftModel.from_pretrained(policy.model, options.adapter)  # puts its layers into the policy's own model
    if gpu:
        policy.model.to("cuda")
    return policy


def write_samples(policy: Any, options: argparse.Namespace) -> int:
    """Sample and write the grid."""
    prompts = [prompt for prompt in options.prompt for _ in range(options.images)]
    rollout = sample(policy, prompts, options.seed, list(range(len(prompts))), sampling_of(options))
    images = policy.decode(rollout.tokens)
    rows = [images[i : i + options.images] for i in range(0, len(images), options.images)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, options.prompt).save(options.out)
    say(f"{len(images)} images written to {options.out}")
    return 0

"""``gcpo shapes-model``: the tiny Janus from scratch, image tokenizer first, and the figures that it must reach."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import JanusForConditionalGeneration, JanusVQVAE

from ..evaluation.ground_truth import ground_truth_table
from ..evaluation.shapes import evaluate
from ..policies.janus import JanusPolicy
from ..rollout import Sampling
from ..shapes.build import CHECKPOINT, GRID, IMAGE_CODES, build_model, build_processor, save_atomically
from ..shapes.localize import localize_tokenizer
from ..shapes.renderer import IMAGE_SIZE
from ..shapes.train_policy import STAGES, any_scenes, scenes, train_policy
from ..shapes.train_tokenizer import tokenizer_config, train_tokenizer
from .console import say

HIDDEN, LAYERS, HEADS = 128, 4, 4
TOKENIZER_SCENES = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--tokenizer", type=Path, default=None, help="take a trained image tokenizer from this folder")
    parser.add_argument("--tokenizer-steps", type=int, default=3500)
    parser.add_argument("--local-steps", type=int, default=1500)
    parser.add_argument("--policy", type=Path, default=None, help="go on from the policy in this folder")
    parser.add_argument("--stages", type=int, nargs="*", default=range(len(STAGES)), help="stages of the policy")
    parser.add_argument("--seed", type=int, default=0)


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """The function that trains the model; nothing to check before."""
    return lambda: train_world(options)


def train_world(options: argparse.Namespace) -> int:
    """Train, report the figures, save in transformers' layout (bf16 safetensors)."""
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    if options.tokenizer:
        tokenizer = JanusVQVAE.from_pretrained(options.tokenizer).eval()
    else:
        tokenizer = JanusVQVAE(tokenizer_config(IMAGE_SIZE, GRID, IMAGE_CODES, HIDDEN))
        pictures = any_scenes(TOKENIZER_SCENES, options.seed + 1, STAGES[0][1])
        say(f"image tokenizer: {train_tokenizer(tokenizer, pictures, options.tokenizer_steps, options.seed)}")
        _, pictures = scenes(TOKENIZER_SCENES, options.seed + 1, STAGES[0][1])
        say(f"local codes: {localize_tokenizer(tokenizer, pictures, options.local_steps, options.seed)}")
    say(ground_truth_table(tokenizer, scenes_a_task=300))
    processor = build_processor()
    if options.policy:
        model = JanusForConditionalGeneration.from_pretrained(options.policy, dtype=torch.float32)
    else:
        model = build_model(tokenizer.config, HIDDEN, LAYERS, HEADS)
        model.model.vqmodel.load_state_dict(tokenizer.state_dict())
        model.model.generation_embeddings.weight.data.copy_(tokenizer.quantize.embedding.weight)
    for stage in options.stages:
        stats = train_policy(model, processor, tokenizer, *STAGES[stage], seed=options.seed + stage)
        say(f"policy, stage {stage}: {stats}")
    save_atomically(model.to(torch.bfloat16), processor, options.out)
    policy = JanusPolicy(model.float(), processor)
    for scale in (1.0, 1.5, 2.0, 3.0, 5.0):
        report = evaluate(policy, Sampling(guidance_scale=scale, batch_size=256), images_a_prompt=2)
        say(f"\nguidance {scale:g}\n{report.table()}")
    say(f"\nwritten to {options.out}")
    return 0

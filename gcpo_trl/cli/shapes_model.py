"""``gcpo shapes-model``: a tiny model of the shapes world from scratch, and the figures that it must reach.

The tiny Janus starts with its image tokenizer; the tiny LlamaGen takes the one that the tiny Janus ships with. Every
stage leaves its model in the work folder, so a killed run goes on with the stage it was in.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import JanusForConditionalGeneration, JanusVQVAE

from ..evaluation.ground_truth import ground_truth_table
from ..evaluation.shapes import evaluate
from ..rollout import Sampling
from ..shapes.build import CHECKPOINT, GRID, IMAGE_CODES, LLAMAGEN_CHECKPOINT, save_atomically
from ..shapes.llamagen import LlamaGenLearner
from ..shapes.localize import localize_tokenizer
from ..shapes.renderer import IMAGE_SIZE
from ..shapes.train_policy import STAGES, JanusLearner, any_scenes, scenes, train_policy
from ..shapes.train_tokenizer import tokenizer_config, train_tokenizer
from .console import say

HIDDEN, LAYERS, HEADS = 128, 4, 4
TOKENIZER_SCENES = 20_000
TOKENIZER_STEPS, LOCAL_STEPS = 3500, 1500
LEARNERS: dict[str, Any] = {"janus": JanusLearner, "llamagen": LlamaGenLearner}
PLACES = {"janus": CHECKPOINT, "llamagen": LLAMAGEN_CHECKPOINT}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--model", choices=list(LEARNERS), default="janus")
    parser.add_argument("--out", type=Path, default=None, help="default: where the package keeps it")
    parser.add_argument("--work", type=Path, default=Path("outputs/shapes-model"), help="where stages are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, to try the command")


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Check the options; the returned function trains the model."""
    if not 0 < options.scale <= 1:
        raise ValueError(f"--scale is {options.scale}; it is a share of the training steps, above 0 and at most 1")
    shipped = PLACES[options.model]
    options.out = options.out or shipped
    if options.scale < 1 and options.out == shipped:
        raise ValueError(
            f"--scale {options.scale:g} would replace the model that ships; name another folder with --out"
        )
    return lambda: train_world(options)


def train_world(options: argparse.Namespace) -> int:
    """Train, save in transformers' layout (bf16 safetensors), report the figures."""
    tokenizer = image_tokenizer(options) if options.model == "janus" else shipped_tokenizer()
    say(ground_truth_table(tokenizer, scenes_a_task=300))
    learner = learnt(options, tokenizer)
    learner.save(options.out, torch.bfloat16)
    policy = learner.policy()
    for scale in (1.0, 1.5, 2.0, 3.0, 5.0):
        report = evaluate(policy, Sampling(guidance_scale=scale, batch_size=256), images_per_prompt=2)
        say(f"\nguidance {scale:g}\n{report.table()}")
    say(f"\nwritten to {options.out}")
    return 0


def steps(options: argparse.Namespace, count: int) -> int:
    """``count`` training steps at the scale asked for, at least one."""
    return max(1, round(count * options.scale))


def stage_folder(options: argparse.Namespace, name: str) -> Path:
    """Where a finished stage is kept: runs of another seed or scale have their own."""
    folder: Path = options.work / f"seed_{options.seed}_scale_{options.scale:g}" / name
    return folder


def shipped_tokenizer() -> JanusVQVAE:
    """The image tokenizer of the tiny Janus in this package, in fp32."""
    model = JanusForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model.model.vqmodel.eval().requires_grad_(False)


def image_tokenizer(options: argparse.Namespace) -> JanusVQVAE:
    """The trained image tokenizer: reconstruction first, then local codes. Saved once, taken from disk afterwards."""
    folder = stage_folder(options, "image_tokenizer")
    if folder.exists():
        return JanusVQVAE.from_pretrained(folder).eval().requires_grad_(False)
    seed_everything(options.seed)
    model = JanusVQVAE(tokenizer_config(IMAGE_SIZE, GRID, IMAGE_CODES, HIDDEN))
    pictures = any_scenes(TOKENIZER_SCENES, options.seed + 1)
    say(f"image tokenizer: {train_tokenizer(model, pictures, steps(options, TOKENIZER_STEPS), options.seed)}")
    _, pictures = scenes(TOKENIZER_SCENES, options.seed + 1, STAGES[0][1])
    say(f"local codes: {localize_tokenizer(model, pictures, steps(options, LOCAL_STEPS), options.seed)}")
    save_atomically(folder, model)
    return model


def learnt(options: argparse.Namespace, tokenizer: JanusVQVAE) -> Any:
    """The policy after its last stage; stages that are in the work folder are not repeated."""
    kind = LEARNERS[options.model]
    prefix = "policy" if options.model == "janus" else options.model
    folders = [stage_folder(options, f"{prefix}_{stage}") for stage in range(len(kind.stages))]
    done = max((stage + 1 for stage, folder in enumerate(folders) if folder.exists()), default=0)
    if done:
        learner = kind.open(folders[done - 1])
    else:
        seed_everything(options.seed)
        learner = kind.fresh(tokenizer, HIDDEN, LAYERS, HEADS)
    for stage, (count, noise, tasks) in list(enumerate(kind.stages))[done:]:
        losses = train_policy(learner, tokenizer, steps(options, count), noise, tasks, seed=options.seed + stage)
        say(f"policy, stage {stage}: {losses}")
        learner.save(folders[stage])
    return learner


def seed_everything(seed: int) -> None:
    """Initial weights and drawn scenes are those of ``seed``."""
    torch.manual_seed(seed)
    random.seed(seed)

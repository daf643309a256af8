"""``gcpo doctor``: does this installation work; ``gcpo doctor --memory RECIPE``: how much memory will a run take.

One line a check: ``ok``, ``warn`` or ``FAIL``, what was seen, and what to do about it. Nothing is downloaded.
Packages are imported inside the checks, so that a broken one is a line of the report and not the end of it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from ..plugins import available
from ..runs.findings import Finding
from ..runs.launchers import check_build_locks, check_deepspeed_on_cpu, check_processes, check_rendezvous
from .console import say

logger = logging.getLogger(__name__)

TESTED_PYTHON, LOWEST_PYTHON = (3, 11), (3, 11)
# Tested version (constraints.txt), versions allowed (setup.cfg), and the extra that brings an optional package.
PACKAGES: dict[str, tuple[str, str, str]] = {
    "torch": ("2.13.0", ">=2.6", ""),
    "trl": ("1.16.0", ">=1.16,<1.17", ""),
    "transformers": ("5.23.0", ">=5.23,<6", ""),
    "accelerate": ("1.15.0", "", ""),
    "peft": ("0.21.2", "", ""),
    "datasets": ("5.2.0", "", ""),
    "deepspeed": ("0.19.8", "", "deepspeed"),
    "wandb": ("0.31.0", "", "wandb"),
    "tensorboard": ("2.21.0", "", "trackers"),
    "trackio": ("0.43.0", "", "trackers"),
    "bitsandbytes": ("0.50.2", "", "qlora"),
}
GIB = 2**30
MEMORY_WANTED = 2 * GIB  # the shapes recipe with its libraries stays below
DISK_WANTED, DISK_NEEDED = 5 * GIB, GIB // 4  # a checkpoint of the shapes model with its optimizer takes about 20 MB
REWARDS = "reward_funcs"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


Check = Callable[[], Finding]


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Parse; the returned function checks, or prints the table. ValueError for words that neither understands."""
    parser = argparse.ArgumentParser(prog="gcpo doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="folder whose disk is looked at")
    parser.add_argument("--model", nargs="+", default=[], help="folders or ids of models to look for")
    parser.add_argument("--memory", nargs="+", metavar="RECIPE", help="print a memory table instead, a column a recipe")
    parser.add_argument("--gpus", type=int, default=1, help="devices the run is spread over")
    parser.add_argument("--zero", type=int, default=0, choices=(0, 2, 3), help="DeepSpeed ZeRO stage; 0 is none")
    parser.add_argument("--prompt-tokens", type=int, default=None, help="length of the longest prompt of a batch")
    options, overrides = parser.parse_known_args(arguments)
    if options.memory:
        from ..memory.table import PROMPT_TOKENS, memory_table

        prompt = PROMPT_TOKENS if options.prompt_tokens is None else options.prompt_tokens
        text = memory_table(options.memory, overrides, options.gpus, options.zero, prompt)
        return functools.partial(show, text)
    if overrides:
        raise ValueError(f"unknown words {' '.join(overrides)}; --key value belongs behind --memory RECIPE")
    return lambda: report(checks(options.output_dir, options.model))


def show(text: str) -> int:
    """Print the memory table; exit code 0."""
    say(text)
    return 0


def report(listed: list[tuple[str, Check]]) -> int:
    """Run the checks, a line each; 1 if one of them FAILs, else 0."""
    findings = []
    for subject, check in listed:
        findings.append(examine(subject, check))
        say(findings[-1].line())
    return int(any(finding.status == "FAIL" for finding in findings))


def examine(subject: str, check: Check) -> Finding:
    """The finding of one check; an exception inside it is a FAIL and does not stop the others."""
    try:
        return check()
    except Exception as error:
        logger.warning("the check of %s stopped", subject, exc_info=logger.isEnabledFor(logging.DEBUG))
        message = " ".join(str(error).split())
        return Finding("FAIL", subject, f"{type(error).__name__}: {message}; the check itself stopped here")


def checks(folder: Path, models: list[str]) -> list[tuple[str, Check]]:
    """Every check with its subject, in the order of the report."""
    rewards = [name for name in available(REWARDS, "reward") if name not in GOLDEN]
    return [
        ("python", check_python),
        *((name, functools.partial(check_package, name)) for name in PACKAGES),
        ("accelerator", check_accelerator),
        ("memory", check_memory),
        ("disk", functools.partial(check_disk, folder)),
        *(("model", functools.partial(check_model, model)) for model in models),
        ("shapes model", check_shapes_model),
        *((f"reward {name}", functools.partial(check_golden, name)) for name in GOLDEN),
        *((f"reward {name}", functools.partial(check_weights, name)) for name in rewards),
        ("DeepSpeed", functools.partial(check_deepspeed_on_cpu, os.environ)),
        ("compiled ops", functools.partial(check_build_locks, os.environ)),
        ("processes", functools.partial(check_processes, os.environ)),
        ("rendezvous", functools.partial(check_rendezvous, os.environ)),
    ]


# versions


def check_python() -> Finding:
    """The interpreter: below the lowest allowed is a FAIL, another than the tested one a warning."""
    seen = ".".join(map(str, sys.version_info[:3]))
    tested = ".".join(map(str, TESTED_PYTHON))
    if sys.version_info[:2] < LOWEST_PYTHON:
        return Finding("FAIL", "python", f"{seen}; install Python {tested} or newer")
    if sys.version_info[:2] != TESTED_PYTHON:
        return Finding("warn", "python", f"{seen}, not tested; the tests run on {tested}")
    return Finding("ok", "python", f"{seen}, tested")


def check_package(name: str) -> Finding:
    """An installed version against `PACKAGES`: outside the allowed range is a FAIL, untested a warning."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    tested, allowed, extra = PACKAGES[name]
    try:
        seen = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if extra:
            return Finding("warn", name, f"not installed, optional; to use it: pip install 'gcpo_trl[{extra}]'")
        return Finding("FAIL", name, f"not installed; run: pip install '{name}=={tested}'")
    if not SpecifierSet(allowed).contains(Version(seen), prereleases=True):
        return Finding("FAIL", name, f"{seen} is outside {allowed}; run: pip install '{name}=={tested}'")
    if Version(seen).public != tested:  # without the +cpu or +cu130 of a build
        return Finding("warn", name, f"{seen}, not tested; if something breaks: pip install '{name}=={tested}'")
    return Finding("ok", name, f"{seen}, tested")


# the machine


def check_accelerator() -> Finding:
    """The device that training would take."""
    import torch

    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("ok", "accelerator", f"{name}, bf16")
        return Finding(
            "warn", "accelerator", f'{name} without bf16; set bf16: False and dtype: "float32" in the recipe'
        )
    if shutil.which("nvidia-smi"):
        seen = f"nvidia-smi is there, but torch {torch.__version__} sees no GPU"
        return Finding("warn", "accelerator", f"{seen}; install a CUDA build of torch, or look at CUDA_VISIBLE_DEVICES")
    return Finding("ok", "accelerator", "no GPU: CPU; the shapes recipe is made for it")


def check_memory() -> Finding:
    """Free memory of the machine, and of the GPU if there is one."""
    import psutil  # comes with accelerate
    import torch

    free = psutil.virtual_memory().available
    seen = f"{free / GIB:.1f} GiB free"
    if torch.cuda.is_available():
        seen += f", {torch.cuda.mem_get_info()[0] / GIB:.1f} GiB on the GPU"
    if free < MEMORY_WANTED:
        return Finding("warn", "memory", f"{seen}; free some, the shapes recipe wants {MEMORY_WANTED / GIB:.0f} GiB")
    return Finding("ok", "memory", f"{seen}; for a recipe: gcpo doctor --memory RECIPE")


def check_disk(folder: Path) -> Finding:
    """Room under the output folder, or under the nearest parent that exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("FAIL", "disk", f"{existing} is no folder that can be written to; give another --output-dir")
    free = shutil.disk_usage(existing).free
    seen = f"{free / GIB:.1f} GiB free under {existing}"
    if free < DISK_NEEDED:
        return Finding("FAIL", "disk", f"{seen}; free some, or give another --output-dir")
    if free < DISK_WANTED:
        return Finding("warn", "disk", f"{seen}; a checkpoint of Janus-Pro-1B with its optimizer takes about 10 GB")
    return Finding("ok", "disk", seen)


def check_model(where: str) -> Finding:
    """The files of the model that is to be trained; nothing is loaded."""
    from ..shapes.build import SHIPPED

    wanted = (("config.json",), WEIGHTS)
    missing = [files[0] for files in wanted if not on_disk(SHIPPED.get(where, where), files)]
    if missing:
        return Finding(
            "FAIL",
            "model",
            f"{where} has no {' and no '.join(missing)} on this disk; give its folder, or hf download it",
        )
    return Finding("ok", "model", f"{where} is on this disk, not loaded")


# what comes with the package


def check_shapes_model() -> Finding:
    """The checkpoint in the package opens and every parameter is finite."""
    import torch

    from ..policies import load
    from ..shapes.build import CHECKPOINT
    from ..validation import first_non_finite

    policy = load(str(CHECKPOINT), "janus", dtype=torch.float32)
    count = sum(parameter.numel() for parameter in policy.model.parameters())
    if not all(bool(torch.isfinite(parameter).all()) for parameter in policy.model.parameters()):
        return Finding("FAIL", "shapes model", f"{first_non_finite(policy.model)}; install the package again")
    return Finding("ok", "shapes model", f"opens, {count / 1e6:.1f} M parameters, {policy.num_tokens} image tokens")


def golden_shapes() -> tuple[float, float]:
    """Reward of a rendered scene with its own caption and with another one."""
    from reward_funcs.shapes import reward

    from ..shapes.grammar import Item, Spec
    from ..shapes.renderer import draw

    own = Spec("color_attr", (Item("circle", "red"), Item("square", "blue")))
    other = Spec("color_attr", (Item("circle", "blue"), Item("square", "red")))
    picture = draw(own, random.Random(0))
    asked = [json.dumps(spec.metadata) for spec in (own, other)]
    first, second = reward([own.prompt, other.prompt], [picture, picture], asked)
    if first is None or second is None:
        raise ValueError("the reward gave no score for a rendered picture")
    return first, second


# Rewards that need no weights: their own caption must score 1, another one less.
GOLDEN: dict[str, Callable[[], tuple[float, float]]] = {"shapes": golden_shapes}


# Rewards that need weights: the class of their settings, and per environment variable its field and the files it needs.
TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt")
SETTINGS: dict[str, tuple[str, dict[str, tuple[str, tuple[str, ...]]]]] = {
    "geneval": ("Models", {"GENEVAL_DETECTOR": ("detector", WEIGHTS), "GENEVAL_CLIP": ("clip", WEIGHTS)}),
    "hpsv2": ("Scorer", {"HPSV2_TOKENIZER": ("tokenizer", TOKENIZER)}),
    "pickscore": ("Scorer", {"PICKSCORE_MODEL": ("model", WEIGHTS), "PICKSCORE_TOKENIZER": ("tokenizer", TOKENIZER)}),
    "clipscore": ("Scorer", {"CLIPSCORE_MODEL": ("model", WEIGHTS)}),
    "imagereward": (
        "Scorer",
        {
            "IMAGEREWARD_CHECKPOINT": ("checkpoint", ("ImageReward.pt",)),
            "IMAGEREWARD_TOKENIZER": ("tokenizer", TOKENIZER),
        },
    ),
    "aesthetic": (
        "Scorer",
        {"AESTHETIC_HEAD": ("head", ("sac+logos+ava1-l14-linearMSE.pth",)), "AESTHETIC_CLIP": ("clip", WEIGHTS)},
    ),
    "aesthetic_v25": (
        "Scorer",
        {
            "AESTHETIC_V25_HEAD": ("head", ("aesthetic_predictor_v2_5.pth",)),
            "AESTHETIC_V25_SIGLIP": ("siglip", WEIGHTS),
        },
    ),
    "blip_vqa": ("Scorer", {"BLIP_VQA_MODEL": ("model", WEIGHTS)}),
}


def check_golden(name: str) -> Finding:
    """A reward on a picture whose score is known."""
    own, other = GOLDEN[name]()
    seen = f"a rendered scene scores {own:g} with its own caption, {other:g} with another"
    if own == 1.0 and other < 1.0:
        return Finding("ok", f"reward {name}", seen)
    return Finding("FAIL", f"reward {name}", f"{seen}, expected 1 and less; install the package again")


def wanted_weights(name: str) -> dict[str, tuple[str, tuple[str, ...]]] | None:
    """Environment variable -> the id or path it names and the files of which one must be there; None if unknown."""
    if name not in SETTINGS:
        return None
    module = importlib.import_module(f"reward_funcs.{name}")
    owner, variables = SETTINGS[name]
    settings = getattr(module, owner)()
    if name == "hpsv2":  # which file it is depends on the version
        variables = {"HPSV2_CHECKPOINT": ("checkpoint", (module.FILES[settings.version],)), **variables}
    return {variable: (getattr(settings, attribute), files) for variable, (attribute, files) in variables.items()}


def check_weights(name: str) -> Finding:
    """A reward that needs weights: are they on this disk? It is not run, and nothing is downloaded."""
    wanted = wanted_weights(name)
    if wanted is None:
        return Finding("warn", f"reward {name}", "no self-test is known for it; score a picture of your own")
    missing = [
        f"{where} ({files[0]}; {variable})" for variable, (where, files) in wanted.items() if not on_disk(where, files)
    ]
    if missing:
        return Finding(
            "warn", f"reward {name}", f"not on this disk: {', '.join(missing)}; hf download, or set the variable"
        )
    return Finding(
        "ok", f"reward {name}", f"weights on disk, not run: {', '.join(where for where, _ in wanted.values())}"
    )


def on_disk(where: str, files: tuple[str, ...]) -> bool:
    """Whether a file, a folder with one of the files, or the hub's cache of the id has it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = Path(where).expanduser()
    if path.exists():
        return path.is_file() or any((path / file).is_file() for file in files)
    try:
        return any(isinstance(try_to_load_from_cache(where, file), str) for file in files)
    except HFValidationError:  # a path that does not exist is no id either
        return False

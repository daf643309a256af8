"""Which parts of an image model train, and the sentence that says so."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from torch import nn

from .policies import lora_targets


def freeze_all_but(model: nn.Module, policy: Any, names: list[str] | None) -> None:
    """Let only the named modules train; everything else (vision tower, aligners, VQ, unused text head) is frozen.

    ``names`` are keys of ``policy.modules``; None means ``policy.default_modules``.
    """
    names = list(names) if names else list(policy.default_modules)
    model.requires_grad_(False)
    for name in names:
        if name not in policy.modules:
            near = difflib.get_close_matches(name, list(policy.modules), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"train_modules has {name!r}; {hint}choose from {', '.join(policy.modules)}")
        model.get_submodule(policy.modules[name]).requires_grad_(True)


def names_no_target(peft_config: Any) -> bool:
    """Whether a LoRA configuration leaves open what to adapt. PEFT has no default for image models."""
    return getattr(peft_config, "target_modules", "") is None and not getattr(peft_config, "target_parameters", None)


def with_lora_targets(peft_config: Any, pattern: str) -> Any:
    """A copy of ``peft_config`` that adapts the modules whose full name matches ``pattern``."""
    peft_config = copy.copy(peft_config)
    peft_config.target_modules = pattern
    return peft_config


def default_adapters(peft_config: Any, model: Any, config: Any, args: Any) -> Any:
    """The LoRA configuration of an image policy, None without LoRA; by default it adapts ``args.train_modules``.

    What we let train takes part in every loss, so DDP need not look for parts that do not. Adapters of the user's own
    may lie in the vision tower, where no gradient comes.
    """
    ours = peft_config is None and not hasattr(model, "peft_config")
    if names_no_target(peft_config):
        peft_config, ours = with_lora_targets(peft_config, lora_targets(config, args.train_modules)), True
    if ours and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
    return peft_config


def train_report(model: nn.Module) -> str:
    """One line: trained and frozen parameters by module, so that a run's log says what it trained."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(p for p in name.split(".")[:4] if p not in ("model", "base_model"))
        part = part.split(".")[0]
        numel = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves the parameter itself empty
        counts.setdefault(part, [0, 0])[parameter.requires_grad] += numel
    trained = sum(c[1] for c in counts.values())
    total = sum(sum(c) for c in counts.values())
    parts = ", ".join(f"{name} {c[1]:,}" for name, c in counts.items() if c[1])
    frozen = ", ".join(name for name, c in counts.items() if not c[1])
    return f"training {trained:,} of {total:,} parameters ({parts}); frozen: {frozen or 'nothing'}"

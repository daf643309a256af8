"""Which parts of an image model train, and the sentence that says so."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from torch import nn

from ..policies import lora_targets, unquantised

QUANTISATION = "quantization_config"
SKIPPED = "llm_int8_skip_modules"  # of a BitsAndBytesConfig, whose 4 bit layers it spares too
CPU_PACKING = "support_avx512bf16_for_cpu"  # of a bitsandbytes Linear4bit


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


def default_quantization(quantization_config: Any, config: Any, args: Any) -> Any:
    """The quantisation of an image policy, None without; unless told otherwise its language model alone is quantised.

    As in TRL it may lie in ``args.model_init_kwargs`` instead, from where it is taken; a recipe writes a mapping there.
    """
    if quantization_config is None and QUANTISATION in (args.model_init_kwargs or {}):
        args.model_init_kwargs = dict(args.model_init_kwargs)
        quantization_config = args.model_init_kwargs.pop(QUANTISATION)
    if isinstance(quantization_config, dict):
        by_bitsandbytes = quantization_config.get("load_in_4bit") or quantization_config.get("load_in_8bit")
        return {SKIPPED: unquantised(config)} | quantization_config if by_bitsandbytes else quantization_config
    if getattr(quantization_config, SKIPPED, ()) is None:
        quantization_config = copy.copy(quantization_config)
        setattr(quantization_config, SKIPPED, unquantised(config))
    return quantization_config


def keep_differentiable(model: nn.Module) -> None:
    """Let 4 bit layers pass gradients also after the model has drawn on a CPU.

    Evaluated on a CPU with AVX512-BF16, a layer of bitsandbytes 0.50 packs its weight for inference; from then on its
    product has no backward, so the layers before it would learn from the adapters' own branch alone.
    """
    for module in model.modules():
        if hasattr(module, CPU_PACKING):
            setattr(module, CPU_PACKING, False)


def train_report(model: nn.Module) -> str:
    """One line: trained and frozen parameters by module, so that a run's log says what it trained."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(p for p in name.split(".")[:4] if p not in ("model", "base_model"))
        part = part.split(".")[0]
        numel = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves the parameter itself empty
        if (state := getattr(parameter, "quant_state", None)) is not None:
            numel = state.shape.numel()  # bitsandbytes keeps two weights in a byte
        counts.setdefault(part, [0, 0])[parameter.requires_grad] += numel
    trained = sum(c[1] for c in counts.values())
    total = sum(sum(c) for c in counts.values())
    parts = ", ".join(f"{name} {c[1]:,}" for name, c in counts.items() if c[1])
    frozen = ", ".join(name for name, c in counts.items() if not c[1])
    return f"training {trained:,} of {total:,} parameters ({parts}); frozen: {frozen or 'nothing'}"

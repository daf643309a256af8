"""Adapters, one file a model family: ``load(model_id)`` for a name, ``adapt(model, processor)`` for a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig

from .. import models  # noqa: F401  transformers' Auto classes know them from here on
from ..objective.layout import Layout
from ..plugins import available, resolve

# transformers' ``config.model_type`` -> the file that adapts it; everything else is a text language model.
FAMILIES = {"janus": "janus", "llamagen": "llamagen"}


def family_of(config: Any) -> str:
    """Name of the adapter for a model configuration."""
    return FAMILIES.get(config.model_type, "text")


def image_layout(config: Any) -> Layout:
    """Layout of an image family's tokens, from its configuration alone, so that mistakes show before weights load."""
    layout: Layout = resolve(family_of(config), __name__, "image_layout")(config)
    return layout


def lora_targets(config: Any, modules: Sequence[str] | None = None) -> str:
    """Pattern of full module names for ``LoraConfig.target_modules``: linear layers of the named parts, never a VQ's.

    By default those of the language model. Raises ValueError for a part that has no linear layer to adapt.
    """
    layers = resolve(family_of(config), __name__, "LORA_LAYERS")
    for name in modules or ():
        if name not in layers:
            raise ValueError(f"train_modules has {name!r}, which LoRA cannot adapt; use {', '.join(layers)}")
    return "|".join(rf"(.*\.)?{layers[name]}" for name in modules or ["language_model"])


def unquantised(config: Any) -> list[str]:
    """Names of the modules of an image family that stay whole where its language model is quantised."""
    return list(resolve(family_of(config), __name__, "UNQUANTISED"))


def adapt(model: Any, processor: Any) -> Any:
    """The policy around a loaded model (unwrapped: no PEFT, DDP or engine around it)."""
    return resolve(family_of(model.config), __name__, "adapt")(model, processor)


def load(model_id: str, family: str | None = None, **kwargs: Any) -> Any:
    """Load a policy from a path or an id; ``family`` names another adapter than the configuration's own."""
    family = family or family_of(AutoConfig.from_pretrained(model_id))
    if family == "text":
        raise ValueError(f"{model_id} holds a text model, which draws no images; families: {', '.join(FAMILIES)}")
    return resolve(family, __name__, "load")(model_id, **kwargs)


__all__ = ["FAMILIES", "adapt", "available", "family_of", "image_layout", "load", "lora_targets", "unquantised"]

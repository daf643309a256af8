"""Adapters, one file a model family: ``load(model_id)`` for a name, ``adapt(model, processor)`` for a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig

from .. import models  # noqa: F401  transformers' Auto classes know them from here on
from ..objective.layout import Layout
from ..plugins import available, resolve


def families() -> list[str]:
    """Names of the image families: the files here that state `MODEL_TYPES`."""
    return available(__name__, "MODEL_TYPES")


def family_of(config: Any) -> str:
    """Name of the file that adapts a model configuration, by its `MODEL_TYPES`; "text" for a language model.

    Raises ValueError for a model that holds an image tokenizer and that no family claims: it would train as text.
    """
    for name in families():
        if config.model_type in resolve(name, __name__, "MODEL_TYPES"):
            return name
    if hasattr(config, "vq_config"):
        raise ValueError(
            f"a {config.model_type!r} model holds an image tokenizer, but no family of image generators claims it; "
            f"there are {', '.join(families())}. Write gcpo_trl/policies/<name>.py with MODEL_TYPES = "
            f"({config.model_type!r},) to train it; gcpo_trl/policies/README.md says what else belongs there"
        )
    return "text"


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
        raise ValueError(f"{model_id} holds a text model, which draws no images; families: {', '.join(families())}")
    return resolve(family, __name__, "load")(model_id, **kwargs)


__all__ = ["adapt", "available", "families", "family_of", "image_layout", "load", "lora_targets", "unquantised"]

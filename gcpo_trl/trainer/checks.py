"""Mistakes caught before weights are loaded: what was seen, and what to write instead."""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers import AutoConfig

from ..policies import image_layout

# Of ``model_init_kwargs``, what says where a model lies and whether its code may run.
WHERE = ("revision", "subfolder", "token", "cache_dir", "trust_remote_code")


def load_config(model: Any, args: Any = None) -> Any:
    """The model's configuration; for a path or an id, read without its weights, from where ``args`` say it lies."""
    if isinstance(model, str):
        where = {key: value for key, value in (getattr(args, "model_init_kwargs", None) or {}).items() if key in WHERE}
        where.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
        config = AutoConfig.from_pretrained(model, **where)
        name = (config.architectures or [""])[0]
        found = getattr(transformers, name, None)  # None for code of the model's own, which GRPOTrainer takes too
        if found is not None and not found.can_generate():
            raise ValueError(
                f"{model} holds a {name}, which generates nothing; give a Janus or a causal language model"
            )
        return config
    if not hasattr(model, "config"):
        raise TypeError(f"model is a {type(model).__name__}; pass a path, a hub id or a transformers model")
    return model.config


def check_engine(state: Any) -> None:
    """The processes and the engine that the launcher promised; accelerate drops either without a word.

    ``state`` is accelerate's PartialState as the training arguments made it.
    """
    promised = int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1
    if state.num_processes != promised:
        raise ValueError(
            f"the launcher started {promised} processes, but each trains alone; start them with `accelerate launch "
            "--multi_gpu` or a file of recipes/accelerate"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" and state._cpu:
        raise ValueError("use_cpu=True makes accelerate train with DDP instead of DeepSpeed; set it to False")


def engine_report(accelerator: Any) -> str:
    """One line: processes and what keeps them together, so that a run's log says how it ran."""
    kind = str(accelerator.distributed_type).rpartition(".")[-1]
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    engine = {"DEEPSPEED": f"DeepSpeed ZeRO-{plugin.zero_stage}" if plugin else "", "NO": "no engine"}.get(kind, kind)
    return f"{accelerator.num_processes} process(es), {engine}, on {accelerator.device}"


def check_image_settings(args: Any, config: Any) -> int:
    """Tokens an image has; raises on settings of `GRPOConfig` that have no meaning for images or would spoil them."""
    if args.use_vllm or args.use_transformers_continuous_batching:
        name = "use_vllm" if args.use_vllm else "use_transformers_continuous_batching"
        raise ValueError(
            f"{name}=True, but {config.model_type} draws images with gcpo_trl's own sampler; set it to False"
        )
    if args.mask_truncated_completions:
        raise ValueError(
            "mask_truncated_completions=True, but images never end with an end-of-sequence token, so every image would "
            "count as truncated and train on nothing; set it to False"
        )
    if args.pad_to_multiple_of is not None:
        raise ValueError(f"pad_to_multiple_of={args.pad_to_multiple_of} would pad images; leave it at None")
    if args.cast_lm_head_to_fp32:
        raise ValueError("cast_lm_head_to_fp32=True concerns the text head, which draws no image; set it to False")
    unused = {"min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None}
    for name, neutral in unused.items():
        if getattr(args, name) != neutral:
            raise ValueError(
                f"{name}={getattr(args, name)!r} is not read when sampling images; leave it at {neutral} and use "
                "temperature, top_k, top_p and rollout_guidance_scale"
            )
    tokens = image_layout(config).tokens
    args.check_tokens(tokens)
    return tokens


def check_text_settings(args: Any, config: Any) -> None:
    """Raise on settings of `GCPOConfig` that need pictures, which a text model does not draw."""
    if args.log_images:
        raise ValueError(
            f"log_images={args.log_images}, but {config.model_type} draws no images; set it to 0, and "
            "log_completions=True to see texts"
        )


def check_quantization(model: Any, quantization_config: Any, peft_config: Any, args: Any) -> None:
    """Quantised weights do not train, so something else must; transformers says so only once they are loaded."""
    quantised = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
    if isinstance(model, str) and quantised and peft_config is None:
        raise ValueError(
            "quantization_config without peft_config leaves nothing to train, since quantised weights do not; give a "
            "LoraConfig (gcpo train: --use_peft true)"
        )


def check_text_only(**features: Any) -> None:
    """Features of GRPOTrainer that make sense for conversations alone."""
    for name, value in features.items():
        if value is not None:
            raise ValueError(f"{name} is for text models; an image policy draws one image a prompt, so leave it out")


def check_processor(model: Any, config: Any, processor: Any) -> None:
    """An image policy needs the whole processor: its template, its tokens around an image."""
    if processor is None and not isinstance(model, str) and not getattr(config, "_name_or_path", ""):
        raise ValueError(
            "the model was never saved, so there is nowhere to load its processor from; pass processing_class, such as "
            "AutoProcessor.from_pretrained(...)"
        )
    if processor is not None and not hasattr(processor, "tokenizer"):
        raise TypeError(
            f"processing_class is a {type(processor).__name__}; an image policy needs the whole processor, such as "
            "AutoProcessor.from_pretrained(...), not its tokenizer alone"
        )


def check_dataset(dataset: Any) -> None:
    """Columns an image policy needs and those that TRL would take for something else."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if "prompt" not in columns:
        raise ValueError(
            f"the dataset has columns {sorted(columns)} but no 'prompt'; rename the caption column to 'prompt'"
        )
    taken = sorted({"image", "images"} & set(columns))
    if taken:
        raise ValueError(
            f"the dataset has a column {taken[0]!r}, which TRL reads as picture input of a conversation; rename it, "
            "for example to 'reference_image'"
        )

"""Recipe -> model on the meta device -> table of `gcpo_trl.memory.estimate`. No weight is read or downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, JanusConfig, JanusForConditionalGeneration
from trl import ModelConfig, get_peft_config

from ..config import GCPOConfig
from ..policies import lora_targets
from ..policies.janus import JanusPolicy
from ..rewards.loading import load_reward
from ..runs.recipe import RunArguments, parse
from ..shapes.build import SHIPPED
from ..trainer.trainable_modules import freeze_all_but, names_no_target, with_lora_targets
from .estimate import Row, Run, estimate, reached, table

PROMPT_TOKENS = 32  # a GenEval prompt in Janus-Pro's template is about 30 tokens
# `language_config` of config.json of deepseek-ai/Janus-Pro-1B and -7B. The rest of the two models is what transformers'
# convert_janus_weights_to_hf.py builds from the same files: the defaults of its vision and VQ configurations, projected
# to the hidden size. Neither file ties the text head to the embeddings.
LANGUAGE = {
    "Janus-Pro-1B": {"hidden_size": 2048, "num_hidden_layers": 24, "heads": 16, "intermediate_size": 5632},
    "Janus-Pro-7B": {"hidden_size": 4096, "num_hidden_layers": 30, "heads": 32, "intermediate_size": 11008},
}
OWNERS = ("deepseek-community", "deepseek-ai")


def published_config(name: str) -> JanusConfig:
    """The published configuration of ``Janus-Pro-1B`` or ``Janus-Pro-7B``, a key of `LANGUAGE`."""
    sizes = dict(LANGUAGE[name])
    heads, hidden = sizes.pop("heads"), sizes["hidden_size"]
    text = {"model_type": "llama", "vocab_size": 102400, "max_position_embeddings": 16384}
    return JanusConfig(
        text_config=text | sizes | {"num_attention_heads": heads, "num_key_value_heads": heads},
        vision_config={"projection_dim": hidden, "image_size": 384, "num_image_tokens": 576},
        vq_config={"projection_dim": hidden, "image_token_embed_dim": hidden, "num_embeddings": 16384, "embed_dim": 8},
        tie_word_embeddings=False,
    )


def config_of(name: str | None) -> Any:
    """Configuration of a model by path, ``shapes-janus`` or the id of a Janus-Pro; raises ValueError for others."""
    if not name:
        raise ValueError("model_name_or_path is missing; give a path, a hub id or 'shapes-janus'")
    name = SHIPPED.get(name, name)
    owner, _, short = name.rpartition("/")
    if owner in OWNERS and short in LANGUAGE and not Path(name).is_dir():
        return published_config(short)
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError as error:
        known = ", ".join(f"{OWNERS[0]}/{model}" for model in LANGUAGE)
        raise ValueError(
            f"{name!r} has no configuration on this disk; give a local folder or one of {known}"
        ) from error


def meta_model(config: Any, args: GCPOConfig, model_args: ModelConfig, zero: int) -> nn.Module:
    """The model as `GCPOTrainer` would train it, frozen or with adapters, its weights on the meta device."""
    if config.model_type != "janus":
        raise ValueError(f"the table is for image models of type 'janus'; this is a {config.model_type!r} model")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("quantised weights are not counted; leave out load_in_4bit and load_in_8bit")
    # The same precedence as `build_trainer`: model_init_kwargs, then dtype, then fp32.
    kwargs: Any = args.model_init_kwargs or {}
    dtype = kwargs.get("dtype") or model_args.dtype or "float32"
    if dtype == "auto":
        dtype = config.dtype or "float32"
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config).to(getattr(torch, str(dtype).removeprefix("torch.")))
        if not model_args.use_peft:
            freeze_all_but(model, JanusPolicy, args.train_modules)
            return model
        from peft import get_peft_model

        peft_config: Any = get_peft_config(model_args)
        if names_no_target(peft_config):
            peft_config = with_lora_targets(peft_config, lora_targets(config, args.train_modules))
        # As GRPOTrainer calls it: adapters in fp32, except under ZeRO-3.
        return get_peft_model(model, peft_config, autocast_adapter_dtype=zero != 3)


def run_of(run: RunArguments, args: GCPOConfig, model_args: ModelConfig, gpus: int, zero: int, prompt: int) -> Run:
    """The settings of a recipe that memory depends on."""
    drawn = args.per_device_train_batch_size * (args.steps_per_generation or 1)  # TRL fills it in
    rewards = {name: getattr(load_reward(name), "memory_bytes", None) for name in run.reward_funcs}
    return Run(
        rows=args.per_device_train_batch_size,
        sampled=min(args.rollout_batch_size or drawn, drawn),
        guided=args.rollout_guidance_scale != 1.0,
        prompt=prompt,
        mixed=bool(args.bf16 or args.fp16),
        checkpointing=args.gradient_checkpointing,
        reference=not model_args.use_peft and (args.beta != 0.0 or args.needs_weight),
        optimizer=getattr(args.optim, "value", args.optim),
        lora_dropout=model_args.use_peft and model_args.lora_dropout > 0,
        gpus=gpus,
        zero=zero,
        graphs=args.rollout_backend in ("auto", "graph"),
        rewards=rewards,
    )


def memory_table(recipes: list[str], overrides: list[str], gpus: int, zero: int, prompt: int) -> str:
    """The table of the recipes, a column each, with notes under it. ``overrides`` are ``--key value`` for all of them.

    Raises ValueError for what a recipe gets wrong, and for models and settings that are not counted.
    """
    columns: dict[str, list[Row]] = {}
    notes: dict[str, None] = {}  # a set that keeps its order
    undeclared: dict[str, None] = {}
    for recipe in recipes:
        # bf16 is refused where there is no GPU unless the CPU is asked for; nothing runs here, so it may be.
        cpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
        run, args, model_args = parse([recipe, *cpu, *overrides])
        if args.deepspeed:
            raise ValueError(
                "the recipe sets deepspeed, whose file is not read here; leave it out and give --zero 2 or 3"
            )
        model = meta_model(config_of(model_args.model_name_or_path), args, model_args, zero)
        settings = run_of(run, args, model_args, gpus, zero, prompt)
        columns[Path(recipe).stem] = estimate(model, settings)
        notes |= dict.fromkeys(_notes(model, settings, model_args))
        undeclared |= dict.fromkeys(name for name, size in settings.rewards.items() if size is None)
    if undeclared:
        notes[f"Nor are the models of the rewards {', '.join(undeclared)}, which declare no memory_bytes."] = None
    head = f"{gpus} device{'s' if gpus > 1 else ''}, {f'ZeRO-{zero}' if zero else 'no ZeRO'}, {prompt} prompt tokens."
    return "\n".join([table(columns), "", f"{head} {' '.join(notes)}".strip()])


def _notes(model: nn.Module, run: Run, model_args: ModelConfig) -> list[str]:
    """Sentences about what the numbers assume or leave out."""
    notes = ["Not counted: CUDA context, fragmentation, workspaces."]
    if run.zero:
        notes.append("DeepSpeed's buckets are not counted, about 2 GiB at its defaults.")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not run.zero and any(p.element_size() == 2 for p in trained):
        notes.append(
            "AdamW steps on bf16 weights without an fp32 copy: a step below about 1/512 of a weight is rounded away; "
            "ZeRO or dtype float32 keeps it."
        )
    if len(trained) > len(reached(model)):
        notes.append("Some adapters lie where no gradient comes, such as the vision tower; name modules by a pattern.")
    return notes

"""The one file that knows TRL's private names (TRL 1.16). Each use is pinned by a test in tests/contract.

Of TRL's loss only the normalisers are written again, for a term beside it: masks enter through ``tool_mask``, weights
through ``advantages``, both of which ``GRPOTrainer._compute_loss`` reads by design.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers.trainer as hf_trainer
import trl.trainer.grpo_trainer as grpo
import trl.trainer.utils as chunked
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models.utils import unwrap_model_for_generation

ANY_BETA = 1.0  # not zero, so that TRL builds and runs the reference; the KL term never sees it

# Keys of a TRL batch that its scoring takes beside ids and masks, for models that also read pictures.
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@contextlib.contextmanager
def reference_built(args: Any, model: Any, needed: bool) -> Iterator[None]:
    """Around ``GRPOTrainer.__init__``: build a ``needed`` reference also for ``beta=0`` and for a model in memory.

    TRL skips the reference when beta is 0, and otherwise reloads it from ``config._name_or_path``, which a model that
    was never saved does not have; such a model is copied instead, before anything trains.
    """
    beta, create = args.beta, grpo.create_model_from_path
    if not isinstance(model, str) and not getattr(model.config, "_name_or_path", ""):
        grpo.create_model_from_path = lambda *_, **__: copy.deepcopy(model).requires_grad_(False)
    if needed and beta == 0.0:
        args.beta = ANY_BETA
    try:
        yield
    finally:
        args.beta, grpo.create_model_from_path = beta, create


@contextlib.contextmanager
def reference_scored(trainer: Any, needed: bool) -> Iterator[None]:
    """Around rollout scoring: with ``beta=0`` TRL scores no reference, so beta is temporarily another where needed."""
    with temporary_beta(trainer, ANY_BETA if needed and trainer.beta == 0.0 else trainer.beta):
        yield


def generation_context(trainer: Any) -> contextlib.ExitStack:
    """Whole weights under ZeRO-3 and FSDP, no gradients, no gradient checkpointing: TRL's own way to generate.

    Under the precision of training, which else only the model's own forward has: images must come from the policy that
    is trained.
    """
    stack = contextlib.ExitStack()
    stack.enter_context(
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        )
    )
    stack.enter_context(torch.no_grad())
    stack.enter_context(trainer.accelerator.autocast())
    stack.enter_context(trainer._dist.summon_full_params(trainer.model_wrapped, recurse=True))
    stack.enter_context(unsharded(trainer.model_wrapped))
    return stack


def fused_log_probs(hidden: Tensor, head: torch.nn.Linear, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """TRL's fused head on its own, to compare with: log-probabilities of ``tokens`` ``(rows,)``.

    It computes the entropies too. hidden: (rows, dim). Gradient: flows to ``hidden`` and the head.
    """
    size, outputs = chunked._CHUNKED_LOGPROB_CHUNK_SIZE, ("log_probs", "entropy")
    found = chunked._ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, tokens, temperature, size, None, 1.0, outputs
    )
    log_probs: Tensor = found[0]
    return log_probs


def gathered(trainer: Any, module: torch.nn.Module) -> Any:
    """Context in which the parameters of ``module`` are whole, also under ZeRO-3."""
    return trainer._dist.gather_params(list(module.parameters()))


@contextlib.contextmanager
def unsharded(model: torch.nn.Module) -> Iterator[None]:
    """Whole parameters under FSDP2, where they are otherwise whole only inside the forward of their own shard.

    The sampler calls parts of a layer and not the layer, so the hooks that would gather them never run.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not shards:
        yield
        return
    root = shards[0]
    root._get_fsdp_state()._lazy_init()  # or the first part that is called would take itself for the root
    groups = [group for shard in shards for group in shard._get_fsdp_state()._fsdp_param_groups]
    settings = [(group, group.post_forward_mesh_info) for group in groups]
    root.set_reshard_after_forward(False)  # the forward of the prompts must not take them away again
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        for group, setting in settings:
            group.post_forward_mesh_info = setting
        for shard in shards:
            shard.reshard()
        root.reset_iter_state()  # only parts of a forward ran


def with_critical_mask(trainer: Any, batch: dict[str, Any], critical: Tensor, policy: Tensor) -> dict[str, Any]:
    """The batch with only ``critical`` tokens in its loss: TRL multiplies ``tool_mask`` into the loss mask.

    ``num_items_in_batch``, which normalises the token-level losses, is counted again over all ranks. ``policy``, the
    mask of the policy's own tokens, which ``tool_mask`` held until now, stays in the batch for the weight, and the
    number of these tokens for a term that is on all of them.
    """
    mask = (critical & policy).long()
    items, all_items = trainer.accelerator.gather(torch.stack([mask.sum(), policy.sum()])[None]).sum(dim=0)
    ours = {"tool_mask": mask, "policy_mask": policy, "num_items_in_batch": items, "policy_items_in_batch": all_items}
    return {**batch, **ours}


@contextlib.contextmanager
def temporary_beta(trainer: Any, beta: float) -> Iterator[None]:
    """Within, TRL reads this ``beta``: at 0 its loss has no KL term, and it logs none."""
    own = trainer.beta
    trainer.beta = beta
    try:
        yield
    finally:
        trainer.beta = own


def aggregate(trainer: Any, per_token: Tensor, mask: Tensor, items: Tensor) -> Tensor:
    """``per_token`` ``(batch, seq)`` under ``mask`` made into a loss as TRL makes one of its own, for every loss type.

    ``items`` is the number of tokens of the generation on all ranks that such a mask leaves, what TRL calls
    ``num_items_in_batch``. Linear in ``per_token``, so a term may be added to the loss after the fact.

    Gradient: flows to per_token where mask is True.
    """
    kept = torch.where(mask, per_token, 0.0)
    train = trainer.model.training
    accumulated = trainer.current_gradient_accumulation_steps if train else 1.0
    match trainer.loss_type:
        case "grpo" | "sapo":
            return (kept.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() / accumulated
        case "bnpo":
            return kept.sum() / mask.sum().clamp(min=1.0) / accumulated
        case "dr_grpo":
            return kept.sum() / (len(kept) * trainer.max_completion_length) / accumulated
        case "luspo":
            return kept.sum(-1).mean() / accumulated
        case "cispo" | "dapo" | "vespo":
            share = accumulated / trainer.args.steps_per_generation if train else 1.0
            return kept.sum() / (items.clamp(min=1.0) / trainer.accelerator.num_processes * share)
    raise ValueError(f"loss_type={trainer.loss_type!r} has no known normaliser; set divergence back to 'k3'")


def importance_ratio(trainer: Any, logps: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What TRL multiplies its KL by under ``use_bias_correction_kl``: the ratio to the policy that sampled the tokens.

    ``(batch, seq)``, or ``(batch, 1)`` with ``importance_sampling_level="sequence"``. Gradient: flows to logps.
    """
    old = inputs.get("old_per_token_logps")
    log_ratio = logps - (logps.detach() if old is None else old)
    if trainer.importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    return log_ratio.exp()


def plain_model(trainer: Any, model: Any) -> Any:
    """``model`` without the engine of accelerate and without PEFT around it."""
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def metrics(trainer: Any) -> dict[str, list[float]]:
    """What the trainer has gathered for its next log entry, of training or of evaluation; a name is made on first use.

    Of each name TRL logs the mean, and leaves out what is NaN.
    """
    found: dict[str, list[float]] = trainer._metrics["train" if trainer.model.training else "eval"]
    return found


def micro_batches(trainer: Any) -> int:
    """How many micro-batches this rank has trained on so far."""
    return int(trainer._step)


def rollout_buffer(trainer: Any) -> list[dict[str, Any]]:
    """The batches of the newest generation, which TRL trains on in turn; empty before the first."""
    return trainer._buffered_inputs or []


def continue_at(trainer: Any, micro_batch: int, buffer: list[dict[str, Any]]) -> None:
    """Let training go on behind ``micro_batch`` micro-batches; without a ``buffer`` it generates first."""
    trainer._step, trainer._buffered_inputs = micro_batch, buffer or None


def checkpoint_folder(trainer: Any, trial: Any) -> Path:
    """Where a checkpoint of the current step lies."""
    return Path(trainer._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"


def reward_loop(trainer: Any) -> Any:
    """The event loop in which TRL awaits asynchronous rewards; None where it has none of them."""
    return getattr(trainer, "async_loop", None)


def reward_loggers(trainer: Any) -> tuple[Any, Any]:
    """What TRL passes to rewards as ``log_extra`` and ``log_metric``."""
    return trainer._log_completion_extra, trainer._log_metric


def has_entropy_bonus(trainer: Any) -> bool:
    """Whether TRL adds an entropy bonus to its loss, whose gradient needs the entropy of every token."""
    return bool(trainer._entropy_bonus_enabled)


def eight_of_generate(
    prompt_ids: list[list[int]], tokens: list[list[int]], labels: list[str], valid: Tensor
) -> tuple[Any, ...]:
    """What ``_generate`` returns: prompt ids, completion ids, tool mask, completions, log-probs, extra, images (2x)."""
    # A tool mask that is everywhere 1 would change nothing, and None is what TRL has without tools.
    mask = None if bool(valid.all()) else valid.long().tolist()
    return prompt_ids, tokens, mask, labels, None, {}, None, []


@contextlib.contextmanager
def rewards_replaced(trainer: Any, replacements: Mapping[int, Any]) -> Iterator[None]:
    """Around ``_calculate_rewards``: other functions at some places of ``reward_funcs``, under the same names."""
    rewards = trainer.reward_funcs
    trainer.reward_funcs = [replacements.get(place, reward) for place, reward in enumerate(rewards)]
    try:
        yield
    finally:
        trainer.reward_funcs = rewards


def log_apart(trainer: Any, values: dict[str, float]) -> None:
    """Log ``values`` at this step to every tracker, from within a callback, as an entry of their own.

    ``GRPOTrainer.log`` would close the averages of a step still in progress and write the table of completions again.
    Logging also resets ``control.should_log``, so the value that a step may just have set is put back.
    """
    should_log = trainer.control.should_log
    Trainer.log(trainer, dict(values))
    trainer.control.should_log = should_log


@contextlib.contextmanager
def arguments_stay_here() -> Iterator[None]:
    """Around a push: ``training_args.bin`` is left out. It is a pickle, which loading could run, and nothing reads it.

    Trainer's pushes name what they leave out themselves and take no more; each asks for its `HfApi` by this function.
    """
    original = hf_trainer.hf_api

    def hf_api() -> Any:
        api = copy.copy(original())
        upload = api.upload_folder

        def upload_folder(*, ignore_patterns: Any = (), **options: Any) -> Any:
            return upload(ignore_patterns=[*ignore_patterns, hf_trainer.TRAINING_ARGS_NAME], **options)

        api.upload_folder = upload_folder
        return api

    hf_trainer.hf_api = hf_api
    try:
        yield
    finally:
        hf_trainer.hf_api = original


def tensorboard_writer(trainer: Any) -> Any | None:
    """The SummaryWriter that transformers' callback has open; None where there is none, as on all but one process."""
    callbacks = trainer.callback_handler.callbacks
    writers = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
    return writers[0] if writers else None

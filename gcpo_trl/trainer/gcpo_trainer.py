"""GRPO on the critical tokens of images: `GCPOTrainer` overrides `trl.GRPOTrainer` and holds no algorithm.

    prompt -> rollout -> reward -> advantages -> critical tokens -> weight -> loss

Rollout and rewards are in `rollouts`, critical tokens in `critical_tokens`, divergences other than TRL's KL in
`divergence_term`, the weight here; advantages and loss are TRL's.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import trl_compat
from ..config import GCPOConfig
from ..monitoring.held_out import HeldOutCallback
from ..monitoring.image_grids import ImageLog
from ..monitoring.model_card import write_card
from ..objective.stage import stage_advantage_weight
from ..objective.weighting import advantage_weight
from ..policies import adapt, family_of
from ..rewards.loading import load_rewards, place_rewards
from ..shapes.build import SHIPPED
from ..validation import first_non_finite
from .checks import (
    check_dataset,
    check_engine,
    check_image_settings,
    check_processor,
    check_quantization,
    check_text_only,
    check_text_settings,
    engine_report,
    load_config,
)
from .critical_tokens import OPPOSING
from .divergence_term import DivergenceTrainer
from .masks import loss_mask, policy_mask
from .selected_logps import selected_only
from .trainable_modules import default_adapters, default_quantization, freeze_all_but, keep_differentiable, train_report

logger = logging.getLogger(__name__)


def weighted_advantages(advantages: Tensor, weight: Tensor) -> Tensor:
    """Advantage of each token, ``(batch, seq)``: that of its sample, ``(batch,)``, times the token's weight (Eq. 8).

    Gradient: flows to ``weight``.
    """
    return advantages[:, None] * weight


class GCPOTrainer(DivergenceTrainer):
    """`trl.GRPOTrainer` that trains image (and text) policies on critical tokens with a dynamic advantage weight.

    Takes GRPOTrainer's arguments; ``args`` is a `GCPOConfig`. A plain `GRPOConfig` trains exactly as GRPOTrainer would.
    ``model`` may also be "shapes-janus" or "shapes-llamagen", the tiny models that ship with the package.
    For an image policy the reward functions receive PIL images as ``completions`` and may return None for an image that
    they could not score.

    Source: Group Critical-token Policy Optimization, Eqs. 4 to 8.
    """

    _tag_names = ["trl", "gcpo"]
    _name = "GCPO"
    _paper = {"title": "Group Critical-token Policy Optimization for Autoregressive Image Generation"}

    # Class-level defaults: parts of TRL and its tests build trainers without __init__.
    _in_loss: dict[str, Any] | None = None

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        if isinstance(model, str):
            model = SHIPPED.get(model, model)
        config = load_config(model, args)
        is_image_model = family_of(config) != "text"
        args = self._settings(args, config)
        check_engine(args.distributed_state)
        place_rewards(args.reward_device)
        check_quantization(model, quantization_config, peft_config, args)
        if is_image_model:
            args.max_completion_length = check_image_settings(args, config)  # dr_grpo divides by it
            check_text_only(tools=tools, rollout_func=rollout_func, environment_factory=environment_factory)
            check_processor(model, config, processing_class)
            check_dataset(train_dataset)
            check_dataset(eval_dataset)
            peft_config = default_adapters(peft_config, model, config, args)
            quantization_config = default_quantization(quantization_config, config, args)
            beside = args.rollout_overlap and args.device.type == "cuda"
            reward_funcs = load_rewards(reward_funcs, train_dataset, eval_dataset, beside=beside)
        else:
            check_text_settings(args, config)
        with trl_compat.reference_built(args, model, needed=args.needs_weight):
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        self.beta = args.beta
        keep_differentiable(self.model)
        self.policy = adapt(trl_compat.plain_model(self, self.model), self.processing_class)
        if is_image_model:
            self._prepare_image_policy()

    @staticmethod
    def _settings(args: Any, config: Any) -> GCPOConfig:
        """``args`` as a GCPOConfig: the defaults for None, plain GRPO for a GRPOConfig."""
        if args is None:
            name = getattr(config, "_name_or_path", "").rstrip("/").split("/")[-1] or config.model_type
            return GCPOConfig(f"{name}-GCPO")
        if not isinstance(args, GCPOConfig):
            logger.warning("args is a %s: training is plain GRPO; pass a GCPOConfig", type(args).__name__)
            return GCPOConfig.plain(args)
        return args

    def _prepare_image_policy(self) -> None:
        """Freeze what does not train, and score with the image head on policy and reference."""
        plain = trl_compat.plain_model(self, self.model)
        if plain is self.accelerator.unwrap_model(self.model):  # with PEFT the adapter decides what trains
            freeze_all_but(plain, self.policy, self.args.train_modules)
        if self.accelerator.is_main_process:
            logger.info("%s; %s", engine_report(self.accelerator), train_report(self.model))
        self.policy.attach_head(plain, self.temperature)
        self.policy.set_generation(self.args.rollout_guidance_scale)
        if self.ref_model is not None:
            self.policy.attach_head(trl_compat.plain_model(self, self.ref_model), self.temperature)
        self._image_log = ImageLog(self) if self.args.log_images else None

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> Any:
        """GRPOTrainer's training; one callback needs its trainer, which transformers does not pass."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, HeldOutCallback):
                callback.attach(self)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def create_model_card(self, model_name: Any = None, dataset_name: Any = None, tags: Any = None) -> None:
        """GRPOTrainer's card; for an image policy one that shows images and how to generate more."""
        if self.policy is None or not self.policy.generates_images:
            super().create_model_card(model_name, dataset_name, tags)
        elif self.is_world_process_zero():
            plain = trl_compat.plain_model(self, self.model)
            base = getattr(plain.config, "_name_or_path", "")
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            about = {"name": model_name, "repository": self.hub_model_id, "dataset": dataset_name, "tags": tags}
            adapter = plain is not self.accelerator.unwrap_model(self.model)
            write_card(Path(self.args.output_dir), self.args, self.state.log_history, base, adapter, about)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """GRPOTrainer's push, without its pickle."""
        with trl_compat.arguments_stay_here():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """GRPOTrainer's push of a checkpoint, without its pickle."""
        with trl_compat.arguments_stay_here():
            super()._push_from_checkpoint(checkpoint_folder)

    # weight and loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss on advantages that the weight multiplies, token by token."""
        inputs = dict(inputs)  # the rollout buffer is used again when num_iterations > 1
        self._in_loss = inputs
        loss = super()._compute_loss(model, inputs)
        if self.policy.generates_images and not torch.isfinite(loss):  # on text GRPOTrainer goes on, as with fp16
            where = first_non_finite(trl_compat.plain_model(self, self.model))
            raise FloatingPointError(f"step {self.state.global_step}: the loss is {loss.item()}; {where}")
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Inside the loss, TRL reads the advantages after this call, so the weight sees the current policy."""
        inputs, self._in_loss = self._in_loss, None
        if inputs is None:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with selected_only(self.policy, self.args, inputs, trl_compat.has_entropy_bonus(self)) as complete:
            scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        scores = (complete(scores[0]), *scores[1:])
        if self.args.own_divergence:
            inputs["per_token_logps"] = scores[0]
        if self.args.weight_form != "none":
            weight = self._weight(scores[0], inputs)
            # Here, because TRL's loss reads the advantages after it has scored: the first moment at which both the
            # current policy's log-probabilities are known and the advantages can still change.
            inputs["advantages"] = weighted_advantages(inputs["advantages"], weight)
            self._log_mean("gcpo/weight/mean", weight, loss_mask(inputs))
        return scores

    def _weight(self, logps: Tensor, inputs: dict[str, Any]) -> Tensor:
        """What multiplies the advantage of each token, ``(batch, seq)``."""
        valid = policy_mask(inputs)
        if self.args.weight_form == "stage":
            return stage_advantage_weight(inputs[OPPOSING], valid)
        return advantage_weight(
            logps,
            inputs["ref_per_token_logps"],
            valid,
            clip=self.args.weight_clip,
            form=self.args.weight_form,
            detach=self.args.weight_detach,
        )

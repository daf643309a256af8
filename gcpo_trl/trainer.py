"""GRPO on the critical tokens of images: `GCPOTrainer` overrides `trl.GRPOTrainer` and holds no algorithm.

    prompt -> rollout -> reward -> advantages -> critical tokens -> weight -> loss

`_generate` is the rollout, `_calculate_rewards` hands over pictures, `_generate_and_score_completions` picks the
critical tokens, `_get_per_token_logps_and_entropies` applies the weight; advantages and loss are TRL's.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from trl import GRPOTrainer

from . import trl_compat
from .checks import (
    check_dataset,
    check_engine,
    check_image_settings,
    check_processor,
    check_quantization,
    check_text_only,
    check_text_settings,
    engine_report,
    first_non_finite,
    load_config,
)
from .config import GCPOConfig
from .held_out import HeldOutCallback
from .image_log import ImageLog
from .model_card import write_card
from .modules import default_adapters, default_quantization, freeze_all_but, keep_differentiable, train_report
from .objective.selection import critical_tokens
from .objective.signals import Signals, SignalsOnDemand, group_similarity_from_ids
from .objective.weighting import advantage_weight
from .policies import adapt, family_of
from .resume import ExactResume
from .rewards import load_rewards, place_rewards, without_partly_scored
from .rollout import Rollout, Sampling, sample
from .selected import selected_only, with_rollout_logps
from .shapes.build import SHIPPED
from .timing import Timed

logger = logging.getLogger(__name__)

EVAL_SEED_OFFSET = 7_919  # keeps evaluation images apart from training images of the same seed


class GCPOTrainer(Timed, ExactResume, GRPOTrainer):
    """`trl.GRPOTrainer` that trains image (and text) policies on critical tokens with a dynamic advantage weight.

    Takes GRPOTrainer's arguments; ``args`` is a `GCPOConfig`. A plain `GRPOConfig` trains exactly as GRPOTrainer would.
    ``model`` may also be "shapes-janus", the tiny Janus that ships with the package.
    For an image policy the reward functions receive PIL images as ``completions`` and may return None for an image that
    they could not score.

    Source: Group Critical-token Policy Optimization, Eqs. 4 to 8.
    """

    _tag_names = ["trl", "gcpo"]
    _name = "GCPO"
    _paper = {"title": "Group Critical-token Policy Optimization for Autoregressive Image Generation"}

    # Class-level defaults: parts of TRL and its tests build trainers without __init__.
    policy: Any = None
    _rollout: Rollout | None = None
    _images: list[Any] | None = None
    _token_table: Tensor | None = None
    _rewards: Tensor | None = None
    _image_log: ImageLog | None = None
    _in_loss: dict[str, Any] | None = None
    _eval_samples = 0

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
        draws_images = family_of(config) != "text"
        args = self._settings(args, config)
        check_engine(args.distributed_state)
        place_rewards(args.reward_device)
        check_quantization(model, quantization_config, peft_config, args)
        if draws_images:
            args.max_completion_length = check_image_settings(args, config)  # dr_grpo divides by it
            check_text_only(tools=tools, rollout_func=rollout_func, environment_factory=environment_factory)
            check_processor(model, config, processing_class)
            check_dataset(train_dataset)
            check_dataset(eval_dataset)
            peft_config = default_adapters(peft_config, model, config, args)
            quantization_config = default_quantization(quantization_config, config, args)
            reward_funcs = load_rewards(reward_funcs, train_dataset, eval_dataset)
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
        self.policy = adapt(self._plain(self.model), self.processing_class)
        if draws_images:
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
        plain = self._plain(self.model)
        if plain is self.accelerator.unwrap_model(self.model):  # with PEFT the adapter decides what trains
            freeze_all_but(plain, self.policy, self.args.train_modules)
        if self.accelerator.is_main_process:
            logger.info("%s; %s", engine_report(self.accelerator), train_report(self.model))
        self.policy.attach_head(plain, self.temperature)
        self.policy.set_generation(self.args.rollout_guidance_scale)
        if self.ref_model is not None:
            self.policy.attach_head(self._plain(self.ref_model), self.temperature)
        self._image_log = ImageLog(self) if self.args.log_images else None

    def _plain(self, model: Any) -> Any:
        """The model without engine and without PEFT around it."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> Any:
        """GRPOTrainer's training; transformers does not tell a callback its trainer, which one that draws must know."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, HeldOutCallback):
                callback.attach(self)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def create_model_card(self, model_name: Any = None, dataset_name: Any = None, tags: Any = None) -> None:
        """GRPOTrainer's card; for an image policy one that shows pictures and how to draw more."""
        if self.policy is None or not self.policy.generates_images:
            super().create_model_card(model_name, dataset_name, tags)
        elif self.is_world_process_zero():
            plain = self._plain(self.model)
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

    # rollout

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Draw one image a prompt; TRL sees token ids and a label, the pictures wait for the rewards."""
        if self.policy is None:  # made without __init__
            return super()._generate(prompts)
        with self._timed("rollout"):
            return self._draw(prompts) if self.policy.generates_images else super()._generate(prompts)

    def _draw(self, prompts: list[Any]) -> tuple[Any, ...]:
        start = time.perf_counter()
        seed, indices = self._sample_indices(len(prompts))
        with trl_compat.generation_context(self):
            encoded = self.policy.encode(prompts)
            self._rollout = self._sample(prompts, seed, indices)
            self._images = self.policy.decode(self._rollout.tokens)
            # Read here, where ZeRO-3 has gathered the weights.
            self._token_table = self.policy.token_table(self.args.select_similarity_space).detach().clone()
        tokens = self._rollout.tokens
        self._log_mean("gcpo/entropy/all", self._rollout.entropy, torch.ones_like(tokens))
        self._log_ratio("gcpo/rollout/tokens_per_s", tokens.numel(), time.perf_counter() - start)
        labels = [f"image {index} of step {self.state.global_step}" for index in indices]
        ids = [encoded.row_ids(row) for row in range(len(prompts))]
        return trl_compat.eight_of_generate(ids, tokens.tolist(), labels)

    def _sample(self, prompts: list[Any], seed: int, indices: list[int]) -> Rollout:
        args = self.args
        sampling = Sampling(
            guidance_scale=args.rollout_guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            batch_size=args.rollout_batch_size,
            entropy_from=args.select_entropy_from,
            backend=args.rollout_backend,
        )
        progress = not args.disable_tqdm and self.accelerator.is_main_process
        try:
            return sample(self.policy, prompts, seed, indices, sampling, progress)
        except FloatingPointError as error:
            where = first_non_finite(self._plain(self.model))
            raise FloatingPointError(f"step {self.state.global_step}: {error}; {where}") from error

    def _sample_indices(self, count: int) -> tuple[int, list[int]]:
        """Seed and global indices of this rank's next ``count`` samples: no two samples of a run share both."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if self.model.training:
            seed, first = self.args.seed, self._step * count * world
        else:
            seed, first = self.args.seed + EVAL_SEED_OFFSET, self._eval_samples
            self._eval_samples += count * world
        return seed, list(range(first + rank * count, first + (rank + 1) * count))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """GRPOTrainer's evaluation; every call draws its images from the same seeds."""
        self._eval_samples = 0
        return super().evaluate(*args, **kwargs)

    # reward

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Rewards of pictures, not of their labels; ``(batch, functions)`` of all ranks, NaN where there is none."""
        if self._images is not None:
            completions = self._images
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, missing in zip(self.reward_func_names, rewards.isnan().float().mean(dim=0).tolist(), strict=True):
            metrics[f"gcpo/reward/{name}/missing"].append(missing)
        if (self.args.reward_missing or ("partial" if self._images is None else "skip")) == "skip":
            rewards = without_partly_scored(rewards, self.reward_weights.to(rewards.device))
        metrics["gcpo/reward/skipped"].append(rewards.isnan().all(dim=1).float().mean().item())
        self._rewards = rewards
        return rewards

    # critical tokens

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch, its loss mask narrowed to the critical tokens (before TRL shuffles groups apart)."""
        with trl_compat.reference_scored(self, needed=self.args.needs_weight):
            batch = super()._generate_and_score_completions(inputs)
        masks = {} if self.args.selects_everything else self._critical(batch)
        if self._image_log is not None and self.model.training:
            prompts = [row["prompt"] for row in inputs]
            self._image_log.show(self.state.global_step + 1, self._images, prompts, self._rewards, masks)
        if not masks:
            return batch
        batch = trl_compat.with_critical_mask(self, batch, masks["critical"], self._valid(batch))
        return with_rollout_logps(batch, self._rollout, self._plain(self.model), self.args)

    def _critical(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The mask of each strategy and their union, "critical"; ``(batch, seq)`` each."""
        masks = critical_tokens(
            self._signals(batch),
            strategies=self.args.select_strategies,
            fraction=self.args.select_fraction,
            combine=self.args.select_combine,
            window=tuple(self.args.select_window),
            complement=self.args.select_complement,
            least=0 if self.policy.generates_images else 1,
        )
        for name, mask in masks.items():
            self._log_mean(f"gcpo/select/{'fraction' if name == 'critical' else name}", mask, self._valid(batch))
        return masks

    def _signals(self, batch: dict[str, Any]) -> Signals:
        """What a strategy may read; entropy comes with an image, all else is computed if one does read it."""
        valid, rollout = self._valid(batch), self._rollout
        makers = {
            "entropy": partial(self._text_entropy, batch, valid) if rollout is None else lambda: rollout.entropy,
            "similarity": partial(self._similarity, batch, valid),
        }
        seed = (self.args.seed * 1_000_003 + self._step) * self.accelerator.num_processes
        generator = torch.Generator().manual_seed(seed + self.accelerator.process_index)
        return SignalsOnDemand(makers, valid, self.policy.grid, generator)

    def _valid(self, batch: dict[str, Any]) -> Tensor:
        """True on tokens that the policy drew, not padding nor a tool's answer; in the loss, on the critical ones."""
        return (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()

    def _similarity(self, batch: dict[str, Any], valid: Tensor) -> Tensor:
        """Group similarity of each position; token ids are gathered, because a group may span ranks."""
        mode = "train" if self.model.training else "eval"
        group = self.num_generations if mode == "train" else self.num_generations_eval
        accelerator, (rows, seq) = self.accelerator, valid.shape
        ids, alive = (
            accelerator.gather(accelerator.pad_across_processes(x.contiguous(), dim=1))
            for x in (batch["completion_ids"], valid.long())
        )
        used, ids = ids.unique(return_inverse=True)  # a text vocabulary is far larger than a batch
        similarity = group_similarity_from_ids(
            rearrange(ids, "(prompts group) seq -> prompts group seq", group=group),
            self._table_rows(used),
            rearrange(alive.bool(), "(prompts group) seq -> prompts group seq", group=group),
        ).repeat_interleave(group, dim=0)
        first = accelerator.process_index * rows
        return similarity[first : first + rows, :seq]

    def _table_rows(self, tokens: Tensor) -> Tensor:
        """Embeddings ``(tokens, dim)`` in which similarity is measured."""
        if self._token_table is not None:
            return self._token_table[tokens]
        with trl_compat.gathered(self, self.policy.model.get_input_embeddings()):
            return self.policy.token_table(self.args.select_similarity_space)[tokens]

    @torch.no_grad()
    def _text_entropy(self, batch: dict[str, Any], valid: Tensor) -> Tensor:
        """Entropy of each token under the policy; text is sampled by TRL, which keeps none."""
        _, entropy, _ = super()._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
            compute_entropy=True,
            **{key: batch[key] for key in trl_compat.MULTIMODAL if key in batch},
        )
        self._log_mean("gcpo/entropy/all", entropy, valid)
        return entropy

    # weight and loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss on advantages that the weight multiplies, token by token."""
        inputs = dict(inputs)  # the rollout buffer is used again when num_iterations > 1
        self._in_loss = inputs
        loss = super()._compute_loss(model, inputs)
        if self.policy.generates_images and not torch.isfinite(loss):  # on text GRPOTrainer goes on, as with fp16
            where = first_non_finite(self._plain(self.model))
            raise FloatingPointError(f"step {self.state.global_step}: the loss is {loss.item()}; {where}")
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Inside the loss, TRL reads the advantages after this call, so the weight sees the current policy."""
        inputs, self._in_loss = self._in_loss, None
        if inputs is None:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with selected_only(self.policy, self.args, inputs, self._entropy_bonus_enabled) as complete:
            scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        scores = (complete(scores[0]), *scores[1:])
        if self.args.needs_weight:
            valid = inputs["drawn_mask"] if "drawn_mask" in inputs else self._valid(inputs)
            weight = advantage_weight(
                scores[0],
                inputs["ref_per_token_logps"],
                valid,
                clip=self.args.weight_clip,
                form=self.args.weight_form,
                detach=self.args.weight_detach,
            )
            inputs["advantages"] = inputs["advantages"][:, None] * weight
            self._log_mean("gcpo/weight/mean", weight, self._valid(inputs))
        return scores

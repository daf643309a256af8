"""From prompts to rewarded images: the first half of `GCPOTrainer`'s step.

TRL sees token ids and a label for each image; the pictures wait here for the rewards, some of which are asked early.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .. import trl_compat
from ..config import sampling_of
from ..objective.diversity import token_disagreement
from ..rewards.loading import without_partly_scored
from ..rollout import Rollout, chunks, joined
from ..validation import first_non_finite
from .metrics import MetricsTrainer
from .overlap import EarlyRewards, decoded, decoding_stream, starts_early

EVAL_SEED_OFFSET = 7_919  # keeps evaluation images apart from training images of the same seed


class RolloutTrainer(MetricsTrainer):
    """Generates images with the policy and has them scored. Text passes through to TRL."""

    # Class-level defaults: parts of TRL and its tests build trainers without __init__.
    policy: Any = None
    _early_rewards: EarlyRewards | None = None
    _rollout: Rollout | None = None
    _images: list[Any] | None = None
    _token_table: Tensor | None = None
    _rewards: Tensor | None = None
    _eval_samples = 0

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's, with the dataset's rows kept for early rewards; ``_generate`` is told the prompts alone."""
        if self.policy is None or not (self.policy.generates_images and self.args.rollout_overlap):
            return super()._generate_and_score_completions(inputs)
        device = self.accelerator.device
        rewards = {place: reward for place, reward in enumerate(self.reward_funcs) if starts_early(reward, device)}
        early = EarlyRewards(rewards, inputs, self._group_size(), self.state, trl_compat.reward_loop(self))
        try:
            with early as self._early_rewards:
                return super()._generate_and_score_completions(inputs)
        finally:
            self._early_rewards = None

    def _group_size(self) -> int:
        """Completions per prompt, in training or in evaluation."""
        size: int = self.num_generations if self.model.training else self.num_generations_eval
        return size

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Generate one image per prompt; TRL sees token ids and a label, the pictures wait for the rewards."""
        if self.policy is None:  # made without __init__
            return super()._generate(prompts)
        with self._timed("rollout"):
            return self._generate_images(prompts) if self.policy.generates_images else super()._generate(prompts)

    def _generate_images(self, prompts: list[Any]) -> tuple[Any, ...]:
        start = time.perf_counter()
        seed, indices = self._sample_indices(len(prompts))
        with trl_compat.generation_context(self):
            encoded = self.policy.encode(prompts)
            self._rollout, self._images = self._decoded(self._chunks(prompts, seed, indices))
            # Read here, where ZeRO-3 has gathered the weights.
            self._token_table = self.policy.token_table(self.args.select_similarity_space).detach().clone()
        tokens = self._rollout.tokens
        self._log_mean("gcpo/entropy/all", self._rollout.entropy, torch.ones_like(tokens))
        self._log_disagreement(tokens)
        self._log_ratio("gcpo/rollout/tokens_per_s", tokens.numel(), time.perf_counter() - start)
        labels = [f"image {index} of step {self.state.global_step}" for index in indices]
        ids = [encoded.row_ids(row) for row in range(len(prompts))]
        return trl_compat.eight_of_generate(ids, tokens.tolist(), labels, self._rollout.valid)

    def _log_disagreement(self, tokens: Tensor) -> None:
        """How often two images of a prompt differ in a token; ids are gathered, because a group may span ranks."""
        group = self._group_size()
        if group > 1:
            disagreement = token_disagreement(self.accelerator.gather(tokens), group)
            self._log_mean("gcpo/diversity/disagreement", disagreement, torch.ones_like(disagreement))

    def _decoded(self, parts: Generator[Rollout, None, None]) -> tuple[Rollout, list[Any]]:
        """The whole rollout and its pictures, each part decoded, and offered to rewards, as it comes."""
        stream = decoding_stream(self.accelerator.device) if self.args.rollout_overlap else None
        sampled, pictures = [], []
        # Also on an error, the thread is waited for while the weights are whole.
        with contextlib.closing(parts), ThreadPoolExecutor(1, "pictures") as thread:
            for part in parts:
                sampled.append(part)
                pictures.append(decoded(self.policy, part.tokens, stream, thread))
                if self._early_rewards is not None:
                    self._early_rewards.add(part.tokens.tolist(), pictures[-1])
        return joined(sampled), [picture for chunk in pictures for picture in chunk.result()]

    def _chunks(self, prompts: list[Any], seed: int, indices: list[int]) -> Generator[Rollout, None, None]:
        """The chunks of a rollout, or with ``rollout_overlap=False`` the rollout as one."""
        args = self.args
        sampling = sampling_of(args, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        progress = not args.disable_tqdm and self.accelerator.is_main_process
        try:
            parts = chunks(self.policy, prompts, seed, indices, sampling, progress)
            yield from parts if args.rollout_overlap else [joined(list(parts))]
        except FloatingPointError as error:
            where = first_non_finite(trl_compat.plain_model(self, self.model))
            raise FloatingPointError(f"step {self.state.global_step}: {error}; {where}") from error

    def _sample_indices(self, count: int) -> tuple[int, list[int]]:
        """Seed and global indices of this rank's next ``count`` samples: no two samples of a run share both."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if self.model.training:
            seed, first = self.args.seed, trl_compat.micro_batches(self) * count * world
        else:
            seed, first = self.args.seed + EVAL_SEED_OFFSET, self._eval_samples
            self._eval_samples += count * world
        return seed, list(range(first + rank * count, first + (rank + 1) * count))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """GRPOTrainer's evaluation; every call generates its images from the same seeds."""
        self._eval_samples = 0
        return super().evaluate(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Rewards of pictures, not of their labels; ``(batch, functions)`` of all ranks, NaN where there is none."""
        if self._images is not None:
            completions = self._images
        with trl_compat.rewards_replaced(self, {} if self._early_rewards is None else self._early_rewards.answers()):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._early_rewards is not None:
            self._early_rewards.log(*trl_compat.reward_loggers(self))
        metrics = trl_compat.metrics(self)
        for name, missing in zip(self.reward_func_names, rewards.isnan().float().mean(dim=0).tolist(), strict=True):
            metrics[f"gcpo/reward/{name}/missing"].append(missing)
        if (self.args.reward_missing or ("partial" if self._images is None else "skip")) == "skip":
            rewards = without_partly_scored(rewards, self.reward_weights.to(rewards.device))
        metrics["gcpo/reward/skipped"].append(rewards.isnan().all(dim=1).float().mean().item())
        self._rewards = rewards
        return rewards

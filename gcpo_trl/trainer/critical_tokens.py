"""From rewarded images to a batch that trains: the critical tokens of `GCPOTrainer`, and the signals behind them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .. import trl_compat
from ..config import GCPOConfig
from ..monitoring.image_grids import ImageLog
from ..objective.selection import critical_tokens
from ..objective.signals import Signals, SignalsOnDemand, group_similarity_from_ids
from ..objective.stage import opposing_similarity
from .masks import policy_mask
from .rollouts import RolloutTrainer
from .selected_logps import with_rollout_logps

OPPOSING = "opposing_similarity"  # the key in TRL's batch, which is shuffled and split with the rest


def critical_masks(signals: Signals, args: GCPOConfig, least: int = 0) -> dict[str, Tensor]:
    """The mask of each strategy that ``args`` names and their union, "critical"; ``(batch, seq)`` bool each.

    least: tokens of a row that each strategy keeps in any case; 1 for texts, whose length differs.
    """
    return critical_tokens(
        signals,
        strategies=args.select_strategies,
        fraction=args.select_fraction,
        combine=args.select_combine,
        window=(args.select_window[0], args.select_window[1]),
        complement=args.select_complement,
        smoothing=args.select_smoothing,
        least=least,
    )


class CriticalTokenTrainer(RolloutTrainer):
    """Narrows the loss to the critical tokens."""

    _image_log: ImageLog | None = None

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch, its loss mask narrowed to the critical tokens (before TRL shuffles groups apart)."""
        with trl_compat.reference_scored(self, needed=self.args.needs_weight):
            batch = super()._generate_and_score_completions(inputs)
        if self.args.needs_opposing:
            batch = {**batch, OPPOSING: self._opposing_similarity(batch)}
        masks = {} if self.args.selects_everything else self._critical(batch)
        if self._image_log is not None and self.model.training:
            prompts = [row["prompt"] for row in inputs]
            self._image_log.show(self.state.global_step + 1, self._images or [], prompts, self._rewards, masks)
        if not masks:
            return batch
        batch = trl_compat.with_critical_mask(self, batch, masks["critical"], policy_mask(batch))
        return with_rollout_logps(batch, self._rollout, trl_compat.plain_model(self, self.model), self.args)

    def _critical(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The mask of each strategy and their union, "critical"; ``(batch, seq)`` each."""
        masks = critical_masks(self._signals(batch), self.args, least=0 if self.policy.generates_images else 1)
        for name, mask in masks.items():
            self._log_mean(f"gcpo/select/{'fraction' if name == 'critical' else name}", mask, policy_mask(batch))
        return masks

    def _signals(self, batch: dict[str, Any]) -> Signals:
        """What a strategy may read; entropy comes with an image, all else is computed if one does read it."""
        valid, rollout = policy_mask(batch), self._rollout
        makers = {
            "entropy": partial(self._text_entropy, batch, valid) if rollout is None else lambda: rollout.entropy,
            "similarity": partial(self._similarity, batch, valid),
        }
        seed = (self.args.seed * 1_000_003 + trl_compat.micro_batches(self)) * self.accelerator.num_processes
        generator = torch.Generator().manual_seed(seed + self.accelerator.process_index)
        return SignalsOnDemand(makers, valid, self.policy.layout, generator)

    def _similarity(self, batch: dict[str, Any], valid: Tensor) -> Tensor:
        """Group similarity of each position, ``(batch, seq)``."""
        ids, table, alive = self._groups(batch, valid)
        similarity = group_similarity_from_ids(ids, table, alive)
        return self._own_rows(similarity.repeat_interleave(ids.shape[1], dim=0), valid)

    def _opposing_similarity(self, batch: dict[str, Any]) -> Tensor:
        """Similarity of each token to those of the group's members of opposite advantage, ``(batch, seq)``."""
        valid = policy_mask(batch)
        ids, table, alive = self._groups(batch, valid)
        advantages = self.accelerator.gather(batch["advantages"].contiguous()).view(-1, ids.shape[1])
        similarity = opposing_similarity(ids, table, advantages, alive)
        return self._own_rows(rearrange(similarity, "prompts group seq -> (prompts group) seq"), valid)

    def _groups(self, batch: dict[str, Any], valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids ``(prompts, group, seq)`` of all ranks, as rows of a table of embeddings, and where they are valid.

        Ids are gathered, not embeddings, because a group may span ranks.
        """
        group, accelerator = self._group_size(), self.accelerator
        ids, alive = (
            rearrange(
                accelerator.gather(accelerator.pad_across_processes(x.contiguous(), dim=1)),
                "(prompts group) seq -> prompts group seq",
                group=group,
            )
            for x in (batch["completion_ids"], valid.long())
        )
        used, ids = ids.unique(return_inverse=True)  # a text vocabulary is far larger than a batch
        return ids, self._table_rows(used), alive.bool()

    def _own_rows(self, values: Tensor, valid: Tensor) -> Tensor:
        """This rank's part of ``values`` of all ranks, ``(all rows, seq)``."""
        rows, seq = valid.shape
        first = self.accelerator.process_index * rows
        return values[first : first + rows, :seq]

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

"""A divergence from the reference that TRL's loss does not know, added beside it.

TRL's loss is computed with beta 0, and beta times the divergence is added under the same mask and normaliser as TRL's
own KL, so every loss type stays available. With ``use_bias_correction_kl`` the divergence is multiplied by the
importance ratio, as TRL does with k3; the gradient of that product is the unbiased one, g - w g', times the ratio.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import trl_compat
from ..objective.divergence import divergence
from ..objective.stage import stage_divergence_weight
from .critical_tokens import OPPOSING, CriticalTokenTrainer
from .masks import loss_mask, policy_mask


class DivergenceTrainer(CriticalTokenTrainer):
    """Adds a divergence of our own to TRL's loss. Without one the loss is TRL's, to the bit."""

    beta: float

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss; ``inputs`` hold "per_token_logps", with gradient, once it is computed."""
        if not self.args.own_divergence:
            return super()._compute_loss(model, inputs)
        with trl_compat.temporary_beta(self, 0.0):
            loss = super()._compute_loss(model, inputs)
        return loss + self.beta * self._divergence(inputs)

    def _divergence(self, inputs: dict[str, Any]) -> Tensor:
        """The divergence of the policy from the reference, normalised over the tokens it is on."""
        args, logps, ref_logps = self.args, inputs["per_token_logps"], inputs["ref_per_token_logps"]
        mask, items = loss_mask(inputs), inputs["num_items_in_batch"]
        if args.divergence_on == "all":  # the second number is there once critical tokens are chosen
            mask, items = policy_mask(inputs), inputs.get("policy_items_in_batch", items)
        corrected = args.use_bias_correction_kl
        gradient = "pathwise" if corrected else args.divergence_gradient or "pathwise"
        penalty = divergence(
            args.divergence, logps, ref_logps, args.divergence_alpha, args.divergence_match, gradient=gradient
        )
        if corrected:
            penalty = penalty * trl_compat.importance_ratio(self, logps, mask, inputs)
        if args.divergence_weight == "stage":
            penalty = penalty * stage_divergence_weight(inputs[OPPOSING])
        for name in {args.divergence: None, "k3": None}:  # k3 too: a scale on which all of them compare
            plain = divergence(name, logps.detach(), ref_logps, args.divergence_alpha, match="value")
            self._log_mean(f"gcpo/divergence/{name}", plain, mask)
        return trl_compat.aggregate(self, penalty, mask, items)

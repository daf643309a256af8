"""Dynamic advantage weight: how far the policy has moved from the reference up to each token (GCPO Eq. 7).

    linear:  w_t = (1/t) sum_{j<=t} clip(logp_j - ref_logp_j, -clip, clip)          the paper, literally
    exp:     w_t = (1/t) sum_{j<=t} exp(clip(logp_j - ref_logp_j, -clip, clip))     the authors' code

The sum runs over all tokens up to t, not only over the critical ones.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_RATIO_CLIP = 0.5  # authors' JanusGCPOTrainer.compute_loss; their Table 5 says 0.5 to 1 by model and reward

FORMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "linear": torch.clone,
    "none": torch.ones_like,
}


def advantage_weight(
    logps: Float[Tensor, "batch seq"],
    ref_logps: Float[Tensor, "batch seq"],
    valid: Bool[Tensor, "batch seq"] | None = None,
    clip: float = LOG_RATIO_CLIP,
    form: str = "exp",
    detach: bool = True,
) -> Float[Tensor, "batch seq"]:
    """Running mean of the clipped log-ratio over the valid positions up to each one; 0 where not valid.

    Why `exp` by default, although Eq. 7 prints the difference: at step 0 the policy is the reference, so the linear
    weight is 0 for every token; detached, the whole gradient is then 0 (that of the KL term too) and training never
    starts, and later a negative mean turns the sign of the advantage around. exp starts at 1, which is GRPO, and
    stays in [exp(-clip), exp(clip)]. It is also what the authors run.

    Why `detach` by default, although the authors do not: undetached, token j also receives
    A exp(diff_j) sum_{t >= j, t critical} 1/t. With the first 57 and 114 more of 576 tokens critical, that doubles
    the gradient, puts a fifth of it on tokens that are not critical, and lets the first token count six-fold, while
    the paper keeps "only the policy gradients of critical tokens". detach=False reproduces the released code.

    The sum is in fp32 for any input: bf16 cannot count beyond 256.

    Gradient: none; with detach=False flows to logps, through every position up to t. Never to ref_logps.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; use one of {', '.join(FORMS)}")
    if clip <= 0:
        raise ValueError(f"clip={clip} must be positive; the authors use {LOG_RATIO_CLIP}")
    if detach:
        logps = logps.detach()
    valid = torch.ones_like(logps, dtype=torch.bool) if valid is None else valid
    difference = (logps.float() - ref_logps.detach().float()).clamp(-clip, clip)
    moved = torch.where(valid, FORMS[form](difference), 0.0)
    count = valid.cumsum(dim=-1).clamp(min=1)
    return torch.where(valid, moved.cumsum(dim=-1) / count, 0.0)

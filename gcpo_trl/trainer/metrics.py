"""Where the seconds of a step go, as metrics of every run.

    gcpo/time/rollout      generating the images, VQ decoding included
    gcpo/time/reference    scoring without gradient: the reference, and the policy itself where TRL asks for it
    gcpo/time/reward       waiting for the reward functions; what of them ran beside the two above is not in it
    gcpo/time/update       forward and backward of the loss, over all micro-batches of a step, and choosing its tokens

The first three are seconds per generation, the last is seconds per optimizer step; each is the mean over ranks. The
rest of TRL's ``step_time`` is bookkeeping.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import trl_compat
from .resume import ExactResume


class MetricsTrainer(ExactResume):
    """Logs means over all ranks, as sums over counts, and the seconds of each stage of a step."""

    _passes = _generating = _updating = 0.0  # seconds so far of what the names of the metrics say

    def _log_mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Mean over the True positions of ``mask``, on all ranks."""
        self._log_ratio(name, (values.detach().float() * mask).sum(), mask.sum())

    def _log_ratio(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """``total`` over ``count``, each summed over all ranks before; NaN, which TRL leaves out, where nothing counts.

        Ranks may count differently, so a mean of their means would be another number.
        """
        device = self.accelerator.device
        sums = torch.stack([torch.as_tensor(one, dtype=torch.float32, device=device) for one in (total, count)])
        above, below = self.accelerator.reduce(sums, reduction="sum").tolist()
        trl_compat.metrics(self)[name].append(above / below if below else float("nan"))

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Log the seconds inside as ``gcpo/time/<name>``."""
        start = now()
        yield
        self._log_ratio(f"gcpo/time/{name}", now() - start, 1)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self._timed("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        start, self._passes = now(), 0.0
        batch = super()._generate_and_score_completions(inputs)
        self._log_ratio("gcpo/time/reference", self._passes, 1)
        self._generating = now() - start
        return batch

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        start = now()
        scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._passes += now() - start
        return scores

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A micro-batch; what it spends on generating is not part of the update."""
        start, self._generating = now(), 0.0
        loss = super().training_step(*args, **kwargs)
        self._updating += now() - start - self._generating
        if trl_compat.micro_batches(self) % self.current_gradient_accumulation_steps == 0:
            self._log_ratio("gcpo/time/update", self._updating, 1)
            self._updating = 0.0
        return loss


def now() -> float:
    """Seconds, once the device has done what this thread gave it; rewards in their own streams are not waited for."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return time.perf_counter()

"""The image head and its gradient: at the critical tokens, at all of them, and by TRL's fused head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..policies.decoding.image_head import Scored, score_tokens
from ..trl_compat import fused_log_probs
from .measure import Report, interleave, peak_bytes

FRACTION = 0.3  # three strategies of a tenth


@dataclass(frozen=True)
class Size:
    """``rows`` images of ``seq`` tokens of ``codes`` kinds under a head of this width."""

    hidden: int
    codes: int
    rows: int
    seq: int


FULL = Size(hidden=1024, codes=16384, rows=2, seq=576)
QUICK = Size(hidden=32, codes=256, rows=2, seq=64)


def run(quick: bool, rounds: int) -> list[Report]:
    """One report."""
    size = QUICK if quick else FULL
    report, peers = Report("loss", asdict(size)), peers_of(size)
    interleave(report, peers, rounds)
    report.compare("all tokens", {f"{peer} over all tokens, time": peer for peer in peers if peer != "all tokens"})
    bytes_of = {name: peak_bytes(function) for name, function in peers.items()}
    report.ratios["selected over all tokens, peak memory"] = bytes_of["selected"] / bytes_of["all tokens"]
    report.counters |= {f"peak MB, {name}": number / 1e6 for name, number in bytes_of.items()}
    return [report]


def peers_of(size: Size) -> dict[str, Callable[[], Any]]:
    """Forward and backward to the hidden states; the head is frozen, as it is published."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = nn.Linear(size.hidden, size.codes, device=device).requires_grad_(False)
    hidden = torch.randn(size.rows, size.seq, size.hidden, device=device, requires_grad=True)
    tokens = torch.randint(size.codes, (size.rows, size.seq), device=device)
    chosen = torch.rand(size.rows, size.seq, device=device) < FRACTION

    def ours(scored: Scored) -> Callable[[], Any]:
        def once() -> Any:
            log_probs, _ = score_tokens(head, hidden, tokens, 1.0, scored=scored)
            return torch.autograd.grad((log_probs * chosen).sum(), hidden)

        return once

    def trl(where: torch.Tensor | slice) -> Callable[[], Any]:
        def once() -> Any:
            log_probs = fused_log_probs(hidden[where].flatten(0, -2), head, tokens[where].flatten())
            return torch.autograd.grad(log_probs.sum(), hidden)

        return once

    return {
        "selected": ours(Scored(chosen, rest=False, entropy_gradient=False)),
        "selected, the rest without gradient": ours(Scored(chosen, rest=True, entropy_gradient=False)),
        "all tokens": ours(Scored(entropy_gradient=False)),
        "TRL, all": trl(slice(None)),
        "TRL, selected": trl(chosen),
    }

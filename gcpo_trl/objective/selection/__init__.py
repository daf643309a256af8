"""Critical tokens (GCPO sec. 5.1, Eq. 6): the union of what each strategy picks.

    Z_select = Z_init | Z_struct | Z_sim,   |Z_*| = floor(fraction * N)

A strategy is a file here that defines `select(signals, eligible, count) -> critical`; its name is the file name.
`eligible` (batch, seq) marks the positions it may pick, `count` how many a row: an int or (batch,).
It may also take `window`, the shares of the sequence between which to look, or `smoothing`, whether the entropy map is
averaged first, and then receives those of the call.
"""

import difflib
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from gcpo_trl.objective.selection._ranking import Count, as_ratio, first, floor_share, highest, lowest
from gcpo_trl.objective.selection.complement import complement as all_but
from gcpo_trl.objective.signals import Signals

__all__ = ["Count", "Select", "critical_tokens", "first", "floor_share", "highest", "load", "lowest"]

Select = Callable[..., Tensor]
Fractions = float | Sequence[float] | Mapping[str, float]

PAPER = ("initial", "entropy_gradient", "similarity")
COMBINE = ("disjoint", "union")
NOT_STRATEGIES = ("_ranking", "complement")


def critical_tokens(
    signals: Signals,
    strategies: str | Select | Sequence[str | Select] = PAPER,
    fraction: Fractions = 0.1,
    combine: str = "disjoint",
    window: tuple[float, float] = (0.1, 0.9),
    complement: bool = False,
    least: int = 0,
    smoothing: bool = True,
) -> dict[str, Bool[Tensor, "batch seq"]]:
    """The mask of each strategy under its name, and their union under "critical"; True means: trains.

    strategies  file names here, "package.module:attribute", or callables
    fraction    share of a row's valid tokens that each strategy picks, rounded down: one for all, one each, or by name
    combine     "disjoint": each strategy picks among what the ones before it left, so every row trains on exactly the
                sum of the counts; default, because it is what the authors run and keeps the budget the same for
                every image. "union": each picks from all tokens and they may overlap, as Eq. 6 is printed
    window      for strategies that take one; (0, 1) is the paper, (0.1, 0.9) the authors' code
    complement  "critical" is the valid tokens that were not picked
    least       tokens a strategy picks at least where a row has them: 1 for texts, which may be short. With 0, as
                published for images of one size, a row shorter than 1 / fraction gets none from that strategy
    smoothing   for strategies that take it; False leaves out Eq. 4 (Table 9)

    Rows count their own valid tokens.

    Gradient: none.
    """
    if combine not in COMBINE:
        raise ValueError(f"combine={combine!r} is unknown; use one of {', '.join(COMBINE)}")
    plan = _plan(strategies, fraction, combine)
    tokens = signals.valid.sum(dim=-1)
    eligible = signals.valid
    given = {"window": window, "smoothing": smoothing}
    masks: dict[str, Tensor] = {}
    for name, select, share in plan:
        asked = inspect.signature(select).parameters
        options = {key: value for key, value in given.items() if key in asked}
        picked = select(signals, eligible, floor_share(share, tokens).clamp(min=least), **options)
        masks[name] = _checked(name, picked, share, signals.valid, least)
        if combine == "disjoint":
            eligible = eligible & ~picked
    critical = torch.stack(list(masks.values())).any(dim=0) & signals.valid
    return {**masks, "critical": all_but(critical, signals.valid) if complement else critical}


def load(strategy: str | Select) -> Select:
    """The function behind a file name here, behind "package.module:attribute", or the callable itself."""
    if callable(strategy):
        return strategy
    module, _, attribute = strategy.partition(":")
    if not attribute:
        known = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in NOT_STRATEGIES)
        if strategy not in known:
            near = difflib.get_close_matches(strategy, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown selection strategy {strategy!r}; {hint}use one of {', '.join(known)}, "
                'or "package.module:attribute" for one of your own'
            )
        module, attribute = f"{__name__}.{strategy}", "select"
    try:
        found: Select = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"cannot load the selection strategy {strategy!r}: {error}") from error
    return found


def _plan(
    strategies: str | Select | Sequence[str | Select], fraction: Fractions, combine: str
) -> list[tuple[str, Select, float]]:
    """(name, function, fraction) in order, or a ValueError that says what to change."""
    entries = [strategies] if isinstance(strategies, str) or callable(strategies) else list(strategies)
    names = [_name(entry) for entry in entries]
    if not names:
        raise ValueError("strategies is empty; name at least one, such as 'everything' for plain GRPO")
    if len({*names, "critical"}) <= len(names):
        raise ValueError(f"strategies {names} need names that differ from each other and from 'critical'")
    fractions = _fractions(names, fraction)
    for name, share in zip(names, fractions, strict=True):
        if not 0 < share <= 1:
            raise ValueError(f"fraction={share} of {name!r} is not a share; it needs 0 < fraction <= 1")
    if combine == "disjoint" and sum(map(as_ratio, fractions)) > 1:
        raise ValueError(
            f"fractions {dict(zip(names, fractions, strict=True))} sum to {sum(fractions):g} > 1, which disjoint sets "
            "cannot fill; lower them or use combine='union'"
        )
    return [(name, load(entry), share) for name, entry, share in zip(names, entries, fractions, strict=True)]


def _name(strategy: str | Select) -> str:
    """The key of a strategy's mask: its name as given; for a function called `select`, that of its module."""
    if isinstance(strategy, str):
        return strategy
    name: str = getattr(strategy, "__name__", type(strategy).__name__)
    return strategy.__module__.rpartition(".")[-1] if name == "select" else name


def _fractions(names: list[str], fraction: Fractions) -> list[float]:
    if isinstance(fraction, Mapping):
        if set(fraction) != set(names):
            raise ValueError(f"fraction names {sorted(fraction)}, but the strategies are {sorted(names)}")
        return [fraction[name] for name in names]
    if isinstance(fraction, Sequence):
        if len(fraction) != len(names):
            raise ValueError(f"fraction={list(fraction)} needs one entry for each of the strategies {names}")
        return list(fraction)
    return [fraction] * len(names)


def _checked(
    name: str, picked: Any, share: float, valid: Bool[Tensor, "batch seq"], least: int
) -> Bool[Tensor, "batch seq"]:
    """`picked` if it is a mask and, where even a full row would get no token, is not empty all the same."""
    if not isinstance(picked, Tensor) or picked.dtype != torch.bool or picked.shape != valid.shape:
        seen = f"{picked.dtype} {tuple(picked.shape)}" if isinstance(picked, Tensor) else type(picked).__name__
        raise ValueError(f"strategy {name!r} returned {seen}; it must return a bool mask of shape {tuple(valid.shape)}")
    seq = valid.shape[-1]
    # Looks into the masks only then, since that waits for the device. Not an error: `everything`, a batch of padding.
    if max(least, floor_share(share, seq)) == 0 and valid.any() and not picked.any():
        enough = math.ceil(1e6 / seq) / 1e6
        raise ValueError(f"fraction={share} of {name!r} keeps 0 of {seq} tokens; raise it to at least {enough:g}")
    return picked

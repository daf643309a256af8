"""Which codes a position may hold, for families whose images follow a grammar: row ends, image codes among text ids."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Constraint:
    """Which codes each position of the sequence may hold: row ends that must come, text ids that may not.

    Where one code alone is allowed the policy has no choice: the token is sampled all the same, because the model reads
    it, and never trains.

    Args:
        kinds: for each position the row of ``allowed`` that holds there, ``(seq,)``.
        allowed: True on the codes that a kind of position may hold, ``(kinds, vocab)``.

    Raises:
        ValueError: if a kind allows no code.

    Example:
        >>> import torch
        >>> allowed = torch.tensor([[True, True, False], [False, False, True]])  # a code; the end of a row
        >>> Constraint(torch.tensor([0, 0, 1]), allowed).chosen().tolist()
        [True, True, False]
    """

    kinds: Tensor
    allowed: Tensor

    def __post_init__(self) -> None:
        if not bool(self.allowed.any(dim=-1).all()):
            empty = (~self.allowed.any(dim=-1)).nonzero()[:, 0].tolist()
            raise ValueError(f"kinds {empty} of the constraint allow no code; allow at least one")

    def chosen(self) -> Tensor:
        """True where the policy has a choice, ``(seq,)``."""
        return self.allowed.sum(dim=-1)[self.kinds] > 1

    def at(self, positions: Tensor) -> Tensor:
        """True on the codes allowed at some positions, ``(positions, vocab)``."""
        return self.allowed.index_select(0, self.kinds.index_select(0, positions))

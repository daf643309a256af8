"""Where the tokens of a sequence lie: on one grid, on several, or on a line.

An image in raster order is one grid, height and width in tokens. A next-scale image is several grids, the coarsest
first. A plan followed by an image is a line, which is a grid of height 1, and a grid. A text has no layout: None.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The grids on which the tokens of a sequence lie, in the order in which they are sampled.

    Args:
        grids: height and width of each grid, in tokens, at least 1 each.

    Raises:
        ValueError: if there is no grid, or one that holds no token.

    Source: GCPO sec. 5.1 for one grid; VAR (Tian et al., 2024), sec. 3.2, for several.

    Example:
        >>> layout = Layout(((1, 1), (2, 2)))
        >>> layout.tokens, layout.sizes
        (5, (1, 4))
        >>> layout.scale_of().tolist()
        [0, 1, 1, 1, 1]
    """

    grids: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.grids or any(len(grid) != 2 or min(grid) < 1 for grid in self.grids):
            raise ValueError(
                f"layout {self.grids} needs at least one grid, each a height and a width of at least 1; give such as "
                "((24, 24),)"
            )

    @classmethod
    def raster(cls, height: int, width: int) -> "Layout":
        """One grid, row by row.

        Args:
            height: rows of tokens.
            width: tokens per row.

        Returns:
            The layout of that grid alone.

        Example:
            >>> Layout.raster(2, 3).tokens
            6
        """
        return cls(((height, width),))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens on each grid."""
        return tuple(height * width for height, width in self.grids)

    @property
    def tokens(self) -> int:
        """Tokens on all grids, which is the length of the sequence."""
        return sum(self.sizes)

    def maps(self, values: Shaped[Tensor, "batch seq"]) -> list[Shaped[Tensor, "batch _height _width"]]:
        """The values of each grid as a map.

        Args:
            values: one value per token, ``(batch, seq)``.

        Returns:
            One tensor ``(batch, height, width)`` per grid, views of ``values``.

        Raises:
            ValueError: if the sequence is not as long as the layout.

        Example:
            >>> [tuple(part.shape) for part in Layout(((1, 1), (2, 2))).maps(torch.zeros(3, 5))]
            [(3, 1, 1), (3, 2, 2)]
        """
        self.check(values.shape[-1])
        parts = values.split(self.sizes, dim=-1)
        return [part.unflatten(-1, grid) for part, grid in zip(parts, self.grids, strict=True)]

    def joined(self, maps: Sequence[Shaped[Tensor, "batch _height _width"]]) -> Shaped[Tensor, "batch seq"]:
        """The inverse of `maps`.

        Args:
            maps: one tensor ``(batch, height, width)`` per grid.

        Returns:
            The values in the order in which the tokens are sampled, ``(batch, seq)``.

        Raises:
            ValueError: if the maps are not those of the layout's grids.

        Example:
            >>> layout = Layout(((1, 1), (2, 2)))
            >>> values = torch.arange(5.0)[None]
            >>> torch.equal(layout.joined(layout.maps(values)), values)
            True
        """
        if tuple(tuple(part.shape[-2:]) for part in maps) != self.grids:
            raise ValueError(f"maps of shapes {[tuple(part.shape) for part in maps]} do not lie on grids {self.grids}")
        return torch.cat([part.flatten(-2) for part in maps], dim=-1)

    def scale_of(self, device: torch.device | str | None = None) -> Int[Tensor, " seq"]:
        """The index of the grid on which each token lies, ``(seq,)``.

        Args:
            device: where the tensor is made; None is torch's default.

        Returns:
            0 for tokens on the first grid, 1 for those on the second, and so on.

        Example:
            >>> Layout(((1, 2), (1, 1))).scale_of().tolist()
            [0, 0, 1]
        """
        sizes = torch.tensor(self.sizes, device=device)
        return torch.arange(len(self.grids), device=device).repeat_interleave(sizes)

    def check(self, seq: int) -> None:
        """Raise ValueError unless a sequence of ``seq`` tokens fits the layout."""
        if seq != self.tokens:
            sizes = " + ".join(f"{height} x {width}" for height, width in self.grids)
            raise ValueError(
                f"layout {self.grids} has {sizes} = {self.tokens} cells, but the signals have seq={seq} tokens; pass "
                "the layout of these tokens, or layout=None for a one-dimensional sequence"
            )

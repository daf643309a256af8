"""Where the entropy map changes most: the structure of the image (GCPO sec. 4.2, Z_struct of sec. 5.1).

map -> causal local mean (Eq. 4) -> central difference -> largest magnitudes
"""

from jaxtyping import Bool
from torch import Tensor

from gcpo_trl.objective.layout import Layout
from gcpo_trl.objective.selection._ranking import Count, floor_share, highest
from gcpo_trl.objective.signals import Signals
from gcpo_trl.objective.spatial import causal_neighborhood_mean, gradient_magnitude

# The authors' code looks only between the first and the last tenth of the tokens; the paper looks everywhere, (0, 1).
WINDOW = (0.1, 0.9)


def select(
    signals: Signals,
    eligible: Bool[Tensor, "batch seq"],
    count: Count,
    window: tuple[float, float] = WINDOW,
    smoothing: bool = True,
) -> Bool[Tensor, "batch seq"]:
    """The `count` eligible positions inside the window with the largest gradient magnitude; ties: lower index.

    A row gets fewer than `count` where the window holds fewer eligible positions. Each grid of the layout has a map and
    a gradient of its own. A sequence without a layout is a grid of one row, in which padding does not exist. Without
    `smoothing` the gradient is that of the entropy itself.

    Gradient: none.
    """
    layout = signals.layout or Layout.raster(1, signals.entropy.shape[-1])
    magnitudes = []
    for entropy, valid in zip(layout.maps(signals.entropy), layout.maps(signals.valid), strict=True):
        surface = causal_neighborhood_mean(entropy, valid) if smoothing else entropy
        magnitudes.append(gradient_magnitude(surface, valid))
    return highest(layout.joined(magnitudes), eligible & inside(window, signals.valid), count)


def inside(window: tuple[float, float], valid: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Valid positions from the share window[0] to window[1] of a row's N tokens. Gradient: none.

    [floor(low N), floor(low N) + floor((high - low) N)), as in the authors' code: [57, 517) of 576.
    """
    low, high = window
    if not 0 <= low < high <= 1:
        raise ValueError(f"window={window} is not a range of shares; it needs 0 <= low < high <= 1, such as {WINDOW}")
    tokens = valid.sum(dim=-1, keepdim=True)
    start = floor_share(low, tokens)
    position = valid.cumsum(dim=-1) - 1
    return valid & (position >= start) & (position < start + floor_share(high - low, tokens))

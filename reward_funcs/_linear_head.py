"""The head of LAION's aesthetic predictor, which ImageReward and aesthetic v2.5 took over: five linear layers.

    features -> 1024 -> 128 -> 64 -> 16 -> 1, no activation between

Dropout stands between them in training only, so the layers' numbers in a state dict have gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reward_funcs._weights import check_keys

if TYPE_CHECKING:
    from torch import Tensor


def linear_head(what: str, state: Mapping[str, Tensor], names: Sequence[str]) -> Any:
    """The layers `names` of `state` one after the other, float32, (batch, features) -> (batch, 1)."""
    from torch import nn

    check_keys(what, state, [f"{name}.{part}" for name in names for part in ("weight", "bias")])
    head = nn.Sequential()
    for name in names:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        head.append(layer)
    return head.eval()

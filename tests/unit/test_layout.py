"""Where tokens lie: one grid, several, or a line; and a gradient for each grid of its own."""

import pytest
import torch

from gcpo_trl.objective.layout import Layout
from gcpo_trl.objective.selection.entropy_gradient import select
from gcpo_trl.objective.signals import Signals

TWO = Layout(((1, 2), (2, 2)))


def test_maps_are_the_grids_in_the_order_sampled_and_joined_is_the_inverse():
    values = torch.arange(12.0).view(2, 6)
    line, square = TWO.maps(values)
    assert line.tolist() == [[[0, 1]], [[6, 7]]]
    assert square.tolist() == [[[2, 3], [4, 5]], [[8, 9], [10, 11]]]
    assert torch.equal(TWO.joined([line, square]), values)
    assert (TWO.tokens, TWO.sizes, TWO.scale_of().tolist()) == (6, (2, 4), [0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("grids", [(), ((2, 0),)])
def test_a_layout_without_tokens_is_refused(grids):
    with pytest.raises(ValueError, match="needs at least one grid"):
        Layout(grids)


def test_what_does_not_fit_says_what_was_seen():
    with pytest.raises(ValueError, match=r"1 x 2 \+ 2 x 2 = 6 cells.*seq=5"):
        TWO.maps(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"\(1, 2, 2\).* do not lie on grids"):
        TWO.joined([torch.zeros(1, 2, 2)])


def test_each_grid_has_a_gradient_of_its_own():
    # Line [0, 8]: differences 8, 8. Square of 5: no difference. Read as one line of 6 there would be steps at 8 -> 5.
    entropy = torch.tensor([[0.0, 8, 5, 5, 5, 5]])
    valid = torch.ones(1, 6, dtype=torch.bool)
    signals = Signals(entropy, entropy, valid, TWO)
    assert select(signals, valid, 2, window=(0, 1), smoothing=False).tolist() == [[True, True] + [False] * 4]
    flat = Signals(entropy, entropy, valid, None)
    # Central differences of the line: 8, 2.5, -1.5, 0, 0, 0.
    assert select(flat, valid, 3, window=(0, 1), smoothing=False).tolist() == [[True] * 3 + [False] * 3]

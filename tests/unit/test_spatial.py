"""Local mean and gradient of the entropy map, by hand and against the plain loops."""

import math

import pytest
import torch
from torch.testing import assert_close

from gcpo_trl.objective.spatial import causal_neighborhood_mean, gradient_magnitude

# One bump in a 4 x 4 map, and its local mean.
BUMP = torch.tensor([[[0.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]])
# (1,1) itself 5/5; (1,2) has it on the left 5/5; (2,0) has it upper-right among three {self, up, upper-right} 5/3;
# (2,1) up 5/5; (2,2) upper-left 5/5
BUMP_MEAN = torch.tensor([[[0.0, 0, 0, 0], [0, 1, 1, 0], [5 / 3, 1, 1, 0], [0, 0, 0, 0]]])


def plain_mean(values, valid):
    """Self, left, upper-left, up, upper-right: those that exist, added in this order, divided by their number."""
    batch, height, width = values.shape
    out = torch.zeros(batch, height, width)
    for b in range(batch):
        for row in range(height):
            for column in range(width):
                around = [(0, 0), (0, -1), (-1, -1), (-1, 0), (-1, 1)]
                cells = [(row + dr, column + dc) for dr, dc in around]
                cells = [(r, c) for r, c in cells if r >= 0 and 0 <= c < width and valid[b, r, c]]
                if valid[b, row, column]:
                    total = torch.tensor(0.0)
                    for r, c in cells:
                        total = total + values[b, r, c]
                    out[b, row, column] = total / len(cells)
    return out


def plain_magnitude(values, valid):
    """Central difference where both neighbours exist, one-sided where one does, 0 where none does."""
    batch, height, width = values.shape
    out = torch.zeros(batch, height, width)

    def exists(b, row, column):
        return 0 <= row < height and 0 <= column < width and bool(valid[b, row, column])

    for b in range(batch):
        for row in range(height):
            for column in range(width):
                if not valid[b, row, column]:
                    continue
                squares = torch.tensor(0.0)
                for dr, dc in ((0, 1), (1, 0)):
                    after, before = (row + dr, column + dc), (row - dr, column - dc)
                    here = values[b, row, column]
                    high = values[b, after[0], after[1]] if exists(b, *after) else here
                    low = values[b, before[0], before[1]] if exists(b, *before) else here
                    steps = exists(b, *after) + exists(b, *before)
                    slope = (high - low) / max(steps, 1)
                    squares = squares + slope * slope
                out[b, row, column] = torch.sqrt(squares)
    return out


def test_mean_of_a_bump_over_the_neighbours_that_exist():
    assert_close(causal_neighborhood_mean(BUMP), BUMP_MEAN, rtol=0, atol=1e-6)


def test_mean_divides_by_the_number_that_exists_at_every_border():
    # All ones stay ones only if each border divides by its own count: 1, 2, 3, 4 or 5.
    ones = torch.ones(1, 3, 3)
    assert_close(causal_neighborhood_mean(ones), ones, rtol=0, atol=0)
    # Row 0: 1, (1+2)/2, (2+4)/2. Row 1: (8 + 1 + 2)/3, (16 + 8 + 1 + 2 + 4)/5, (32 + 16 + 2 + 4)/4
    values = torch.tensor([[[1.0, 2, 4], [8, 16, 32]]])
    expected = torch.tensor([[[1, 1.5, 3], [11 / 3, 31 / 5, 54 / 4]]])
    assert_close(causal_neighborhood_mean(values), expected, rtol=0, atol=1e-6)


def test_gradient_of_the_smoothed_bump():
    root_half = math.sqrt(0.5)
    expected = torch.tensor(
        [
            # (0,1): columns (0-0)/2, rows one-sided 1-0
            [0, 1, 1, 0],
            # (1,0): columns one-sided 1-0, rows (5/3-0)/2 -> sqrt(1 + 25/36); (1,1): (1-0)/2 and (1-0)/2
            [math.sqrt(61 / 36), root_half, root_half, 1],
            # (2,0): 1-5/3 and 0; (2,1): (1-5/3)/2 and (0-1)/2 -> sqrt(1/9 + 1/4); (2,2): (0-1)/2 and (0-1)/2
            [2 / 3, math.sqrt(13 / 36), root_half, 1],
            # (3,0): columns 0, rows one-sided 0-5/3
            [5 / 3, 1, 1, 0],
        ]
    )
    assert_close(gradient_magnitude(BUMP_MEAN), expected[None], rtol=0, atol=1e-6)


def test_border_differences_are_not_halved():
    # A ramp of 3 a column and 4 a row has slope (3, 4), length 5, everywhere, borders included.
    ramp = 4 * torch.arange(3.0)[:, None] + 3 * torch.arange(4.0)[None, :]
    assert_close(gradient_magnitude(ramp[None]), torch.full((1, 3, 4), 5.0), rtol=0, atol=0)


def test_an_axis_of_size_one_has_derivative_zero():
    # 1, 3, 9: one-sided 2, central (9-1)/2, one-sided 6; the other axis adds nothing
    line, slope = torch.tensor([1.0, 3, 9]), torch.tensor([2.0, 4, 6])
    assert_close(gradient_magnitude(line.view(1, 1, 3)), slope.view(1, 1, 3), rtol=0, atol=0)
    assert_close(gradient_magnitude(line.view(1, 3, 1)), slope.view(1, 3, 1), rtol=0, atol=0)
    assert_close(gradient_magnitude(torch.full((1, 1, 1), 7.0)), torch.zeros(1, 1, 1), rtol=0, atol=0)
    # Height 1: {self, left}. Width 1: {self, up}.
    mean = torch.tensor([1.0, 2, 6])
    assert_close(causal_neighborhood_mean(line.view(1, 1, 3)), mean.view(1, 1, 3), rtol=0, atol=0)
    assert_close(causal_neighborhood_mean(line.view(1, 3, 1)), mean.view(1, 3, 1), rtol=0, atol=0)


def test_padding_does_not_leak_into_its_neighbours():
    # Three valid tokens 1, 3, 9 and two of padding with absurd values. Mean: 1, (1+3)/2, (3+9)/2.
    values = torch.tensor([[[1.0, 3, 9, 1e9, math.nan]]])
    valid = torch.tensor([[[True, True, True, False, False]]])
    mean = causal_neighborhood_mean(values, valid)
    assert_close(mean, torch.tensor([[[1.0, 2, 6, 0, 0]]]), rtol=0, atol=0)
    # Magnitude of 1, 3, 9: the last valid position is one-sided, 9 - 3.
    assert_close(gradient_magnitude(values, valid), torch.tensor([[[2.0, 4, 6, 0, 0]]]), rtol=0, atol=0)


def test_left_padding_and_a_lone_token():
    # Padding first: 9 has no left neighbour that exists. A lone token has no difference at all.
    values = torch.tensor([[[1e9, 9.0, 5]], [[1e9, 7, 1e9]]])
    valid = torch.tensor([[[False, True, True]], [[False, True, False]]])
    assert_close(causal_neighborhood_mean(values, valid), torch.tensor([[[0.0, 9, 7]], [[0, 7, 0]]]), rtol=0, atol=0)
    assert_close(gradient_magnitude(values, valid), torch.tensor([[[0.0, 4, 4]], [[0, 0, 0]]]), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 1, 9), (2, 9, 1), (1, 2, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_fast_form_equals_the_plain_loop_to_the_bit(shape, masked):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    valid = torch.rand(shape, generator=generator) > 0.3 if masked else torch.ones(shape, dtype=torch.bool)
    argument = valid if masked else None
    assert torch.equal(causal_neighborhood_mean(values, argument), plain_mean(values, valid))
    assert torch.equal(gradient_magnitude(values, argument), plain_magnitude(values, valid))


def test_bf16_is_averaged_in_fp32():
    # bf16 steps by 1/32 at 4, so it cannot hold the mean (4 + 4.03125) / 2 = 4.015625.
    values = torch.tensor([[[4.0, 4.03125]]], dtype=torch.bfloat16)
    mean = causal_neighborhood_mean(values)
    assert mean.dtype == torch.float32
    assert_close(mean, torch.tensor([[[4.0, 4.015625]]]), rtol=0, atol=0)
    assert_close(gradient_magnitude(values), torch.tensor([[[0.03125, 0.03125]]]), rtol=0, atol=0)


@pytest.mark.parametrize("function", [causal_neighborhood_mean, gradient_magnitude])
def test_no_gradient_and_no_writing(function):
    values = BUMP.clone().requires_grad_()
    assert not function(values).requires_grad
    assert torch.equal(values.detach(), BUMP)

"""One sampling step by hand: guidance, temperature, top-k, top-p, the inverse CDF, and whose numbers are whose."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import TopKLogitsWarper, TopPLogitsWarper

from gcpo_trl.rollout.sampling import guide, sample_from_logits, uniforms, warp

QUARTERS = torch.tensor([[0.5, 0.25, 0.25]]).log()
BELOW_ONE = math.nextafter(1.0, 0.0)


def kept(logits):
    """Indices that a warp left possible, row by row."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_guidance_goes_from_the_unconditional_through_the_conditional():
    conditional, unconditional = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    # 0 + 3 (1 - 0) = 3; 4 + 3 (2 - 4) = -2
    assert_close(guide(conditional, unconditional, 3.0), torch.tensor([[3.0, -2.0]]), rtol=0, atol=0)
    assert_close(guide(conditional, unconditional, 0.0), unconditional, rtol=0, atol=0)
    assert_close(guide(conditional, unconditional, 1.0), conditional, rtol=0, atol=0)
    assert_close(guide(conditional, None, 3.0), conditional, rtol=0, atol=0)


def test_guidance_is_computed_in_fp32():
    # 256 + 1.5 (258 - 256) = 259, between 258 and 260, which bf16 knows
    conditional, unconditional = torch.tensor([[258.0]]).bfloat16(), torch.tensor([[256.0]]).bfloat16()
    guided = guide(conditional, unconditional, 1.5)
    assert guided.dtype == torch.float32
    assert_close(guided, torch.tensor([[259.0]]), rtol=0, atol=0)
    assert guide(conditional, None, 1.0).dtype == torch.float32


def test_warp_divides_by_the_temperature():
    assert_close(warp(torch.tensor([[2.0, 4.0]]), 2.0), torch.tensor([[1.0, 2.0]]), rtol=0, atol=0)


def test_top_k_keeps_the_k_best():
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    assert kept(warp(logits, 1.0, top_k=2)) == [[1, 2]]
    assert kept(warp(logits, 1.0, top_k=0)) == kept(warp(logits, 1.0, top_k=9)) == [[0, 1, 2, 3]]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    # 0.5 alone reaches 0.5; for 0.6 one more is needed; the best one stays whatever p.
    logits = torch.tensor([[0.25, 0.5, 0.15, 0.1]]).log()
    assert kept(warp(logits, 1.0, top_p=0.45)) == [[1]]
    assert kept(warp(logits, 1.0, top_p=0.6)) == [[0, 1]]
    assert kept(warp(logits, 1.0, top_p=0.8)) == [[0, 1, 2]]
    assert kept(warp(logits, 1.0, top_p=1e-9)) == [[1]]


def test_top_p_sees_what_top_k_left():
    # After top-k 2 the masses are 2/3 and 1/3, so the first alone reaches 0.6, which of 0.5 and 0.25 it would not.
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert kept(warp(logits, 1.0, top_k=2, top_p=0.6)) == [[0]]
    assert kept(warp(logits, 1.0, top_k=0, top_p=0.6)) == [[0, 1]]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.9), (0, 0.31), (7, 0.7), (1, 0.5)])
def test_warp_equals_transformers(temperature, top_k, top_p):
    logits = torch.randn(16, 40) * 3
    expected = logits / temperature
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert_close(warp(logits, temperature, top_k, top_p), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 0), (0.49, 0), (0.5, 1), (0.74, 1), (0.75, 2), (0.99, 2), (BELOW_ONE, 2)],
)
def test_draw_is_the_inverse_cdf(uniform, token):
    # cumulative 0.5, 0.75, 1: the first token whose cumulative probability exceeds the number
    assert sample_from_logits(QUARTERS, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_rows_are_drawn_by_their_own_number():
    logits = QUARTERS.repeat(3, 1)
    assert sample_from_logits(logits, torch.tensor([0.9, 0.1, 0.6])).tolist() == [2, 0, 1]


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.5, 0.999999, BELOW_ONE])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert sample_from_logits(logits, torch.tensor([uniform], dtype=torch.float64)).item() in (1, 3)


def test_the_last_possible_token_is_drawn_also_where_fp32_sums_fall_short():
    # 16,384 probabilities do not sum to 1 in fp32; the largest number below 1 must still give a token that is possible.
    logits = torch.randn(4, 16384)
    logits[:, 9000:] = -torch.inf
    assert (
        sample_from_logits(logits, torch.full((4,), torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)))) < 9000
    ).all()


def test_draw_follows_the_distribution():
    # 4,000 evenly spaced numbers hit each token in proportion to its probability, up to one number a border.
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    numbers = (torch.arange(4000) + 0.5) / 4000
    counts = torch.bincount(sample_from_logits(probabilities.log().expand(4000, 4), numbers), minlength=4)
    assert_close(counts.float(), 4000 * probabilities, rtol=0, atol=1.0)


def test_random_numbers_belong_to_the_sample_and_not_to_the_batch():
    together = uniforms(seed=3, indices=[0, 1, 2, 7], count=5)
    assert torch.equal(together[2:], uniforms(seed=3, indices=[2, 7], count=5))
    assert torch.equal(together[[1]], uniforms(seed=3, indices=[1], count=5))
    assert (together >= 0).all() and (together < 1).all()


def test_random_numbers_differ_between_samples_and_between_seeds():
    numbers = uniforms(seed=0, indices=list(range(100)), count=4)
    assert len({tuple(row) for row in numbers.tolist()}) == 100
    assert not torch.equal(uniforms(seed=1, indices=[0], count=4), numbers[:1])
    # Neighbouring seeds do not share samples that are shifted by an index.
    assert not torch.equal(uniforms(seed=1, indices=[0], count=4), numbers[1:2])


def test_random_numbers_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    uniforms(seed=5, indices=[0, 1], count=3)
    assert torch.equal(torch.rand(1), expected)

"""The dynamic advantage weight, by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from gcpo_trl.objective.weighting import advantage_weight

LOGPS = torch.tensor([[-0.8, -2.0, -1.0, -0.7]])
REF = torch.full((1, 4), -1.0)


def plain_weight(logps, ref_logps, valid, clip, function):
    """Eq. 7 as a loop: the mean of function(clipped log-ratio) over the valid positions so far."""
    out = torch.zeros(logps.shape)
    for row in range(len(logps)):
        seen = []
        for t in range(logps.shape[1]):
            if valid[row, t]:
                seen.append(function(max(-clip, min(clip, float(logps[row, t] - ref_logps[row, t])))))
                out[row, t] = sum(seen) / len(seen)
    return out


def test_exp_is_a_running_mean():
    # exp([0, ln2, ln4]) = [1, 2, 4]; running means 1, 3/2, 7/3
    logps = torch.tensor([[0.0, math.log(2), math.log(4)]])
    weight = advantage_weight(logps, torch.zeros(1, 3), clip=2.0)
    assert_close(weight, torch.tensor([[1, 3 / 2, 7 / 3]]), rtol=0, atol=1e-6)


def test_both_forms_on_one_example():
    # differences .2, -1, 0, .3, clipped at .5: .2, -.5, 0, .3
    # exp: 1.221403, .606531, 1, 1.349859; running means
    exp = torch.tensor([[1.221403, 0.913967, 0.942644, 1.044448]])
    assert_close(advantage_weight(LOGPS, REF), exp, rtol=0, atol=1e-6)
    # linear: .2, -.3/2, -.3/3, 0/4
    linear = torch.tensor([[0.2, -0.15, -0.1, 0.0]])
    assert_close(advantage_weight(LOGPS, REF, form="linear"), linear, rtol=0, atol=1e-6)


def test_clip_holds_on_both_sides():
    # .8 -> .5, -.8 -> -.5, .1; exp: 1.648721, .606531, 1.105171; linear: .5, 0/2, .1/3
    logps = torch.tensor([[0.8, -0.8, 0.1]])
    zeros = torch.zeros(1, 3)
    expected = torch.tensor([[1.648721, 1.127626, 1.120141]])
    assert_close(advantage_weight(logps, zeros), expected, rtol=0, atol=1e-6)
    assert_close(advantage_weight(logps, zeros, form="linear"), torch.tensor([[0.5, 0, 0.1 / 3]]), rtol=0, atol=1e-6)


def test_at_step_zero_exp_is_one_and_linear_is_zero():
    assert torch.equal(advantage_weight(REF, REF), torch.ones(1, 4))
    assert torch.equal(advantage_weight(REF, REF, form="linear"), torch.zeros(1, 4))


def test_none_is_exactly_one_wherever_the_policy_went():
    weight = advantage_weight(torch.randn(2, 700), torch.randn(2, 700), form="none")
    assert torch.equal(weight, torch.ones(2, 700))


def test_only_valid_positions_count_and_padding_cannot_poison():
    # Right padding: linear means of .2, .4 are .2, .3, then nothing. A hole: .2, -, .4 -> .2, 0, .3. Left: -, .2, .4.
    nan = math.nan
    logps = torch.tensor([[0.2, 0.4, nan], [0.2, nan, 0.4], [nan, 0.2, 0.4]], requires_grad=True)
    valid = ~logps.detach().isnan()
    weight = advantage_weight(logps, torch.zeros(3, 3), valid, form="linear")
    assert_close(weight, torch.tensor([[0.2, 0.3, 0], [0.2, 0, 0.3], [0, 0.2, 0.3]]), rtol=0, atol=1e-6)
    advantage_weight(logps, torch.zeros(3, 3), valid, detach=False).sum().backward()
    # d/dlogp_j of sum_t w_t = exp(diff_j) * sum_{t >= j} 1/t: e^.2 (1 + 1/2), e^.4 / 2, and 0 on padding
    first, second = 1.5 * math.exp(0.2), 0.5 * math.exp(0.4)
    expected = torch.tensor([[first, second, 0], [first, 0, second], [0, first, second]])
    assert_close(logps.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("form", "function"), [("exp", math.exp), ("linear", float)])
def test_fast_form_equals_the_plain_loop(form, function):
    generator = torch.Generator().manual_seed(0)
    logps, ref = torch.randn(3, 40, generator=generator), torch.randn(3, 40, generator=generator)
    valid = torch.rand(3, 40, generator=generator) > 0.3
    expected = plain_weight(logps, ref, valid, 0.6, function)
    assert_close(advantage_weight(logps, ref, valid, clip=0.6, form=form), expected, rtol=0, atol=1e-6)


def test_bf16_logps_are_counted_in_fp32():
    # 1000 equal log-ratios of 1/4 average to exp(1/4) at every position; a bf16 running sum stops growing long before.
    logps = torch.full((1, 1000), -0.75, dtype=torch.bfloat16)
    weight = advantage_weight(logps, torch.full_like(logps, -1.0))
    assert weight.dtype == torch.float32
    assert_close(weight, torch.full((1, 1000), math.exp(0.25)), rtol=0, atol=1e-4)
    # and the difference is taken in fp32: bf16 would round 1/256 - 300 to -300
    small = advantage_weight(
        torch.full((1, 1), 1 / 256, dtype=torch.bfloat16), torch.full((1, 1), -300.0), clip=1e3, form="linear"
    )
    assert_close(small, torch.full((1, 1), 300 + 1 / 256), rtol=0, atol=1e-4)


def test_detached_by_default():
    logps = LOGPS.clone().requires_grad_()
    assert not advantage_weight(logps, REF).requires_grad
    assert not advantage_weight(logps, REF.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("form", ["exp", "linear"])
def test_undetached_gradient_reaches_every_earlier_token_inside_the_clip(form):
    # w_3 = mean of f(d_1), f(d_2), f(d_3): 1/3 f'(d_j) each; d = .2, -1 (clipped: 0), 0; the fourth token comes later.
    logps = LOGPS.clone().requires_grad_()
    ref = REF.clone().requires_grad_()
    advantage_weight(logps, ref, form=form, detach=False)[0, 2].backward()
    slope = math.exp(0.2) if form == "exp" else 1.0
    assert_close(logps.grad, torch.tensor([[slope / 3, 0, 1 / 3, 0]]), rtol=0, atol=1e-6)
    assert ref.grad is None


def test_bad_arguments_say_what_to_use():
    with pytest.raises(ValueError, match=r"'expo'.*exp, linear, none"):
        advantage_weight(LOGPS, REF, form="expo")
    with pytest.raises(ValueError, match="clip=0"):
        advantage_weight(LOGPS, REF, clip=0.0)

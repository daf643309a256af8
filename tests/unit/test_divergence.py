"""Each divergence by hand: values, both gradients, their limits, and log-ratios that have run away."""

import math

import pytest
import torch
from torch.testing import assert_close

from gcpo_trl.objective.divergence import DIVERGENCES, divergence, shaping

NAMES = ("reverse_kl", "forward_kl", "jensen_shannon")
# logp - ref_logp: value and pathwise coefficient of each of NAMES, as printed.
VECTORS = {
    0.0: [(0, 0), (0, 0), (0, 0)],
    math.log(2): [(0.193147, 0.5), (0.153426, 0.346574), (0.042475, 0.101366)],
    -math.log(2): [(0.306853, -1), (0.386294, -1.386294), (0.084950, -0.287682)],
    math.log(4): [(0.636294, 0.75), (0.403426, 0.346574), (0.120465, 0.114536)],
    3.0: [(2.049787, 0.950213), (0.800852, 0.149361), (0.263645, 0.058635)],
    -3.0: [(16.085537, -19.085537), (41.171074, -60.256611), (5.295445, -6.473165)],
}
EVERY = [(name, 0.5) for name in DIVERGENCES] + [("alpha", a) for a in (0.0, 1e-6, 0.2, 0.8, 1 - 1e-6, 1.0)]


def at(moved, dtype=torch.float32):
    """Log-probabilities that lie ``moved`` above those of the reference, and the reference's, as leaves."""
    moved = torch.tensor([moved], dtype=dtype)
    ref = torch.full_like(moved, -1.0).requires_grad_()
    return (moved + ref.detach()).requires_grad_(), ref


@pytest.mark.parametrize("column", range(3), ids=NAMES)
def test_values_and_gradients_by_hand(column):
    logps, ref = at(list(VECTORS))
    value = divergence(NAMES[column], logps, ref, match="value")
    value.sum().backward()
    expected = torch.tensor([[row[column] for row in VECTORS.values()]])
    assert_close(value, expected[..., 0], rtol=1e-6, atol=2e-6)
    assert_close(logps.grad, expected[..., 1], rtol=1e-6, atol=2e-6)
    assert ref.grad is None


def test_near_the_reference_each_is_half_a_square_and_jensen_shannon_an_eighth():
    # logp - ref_logp = .1
    logps, ref = at([0.1])
    found = [divergence(name, logps, ref, match="value").item() for name in NAMES]
    assert_close(found, [0.004837, 0.004679, 0.001189], rtol=0, atol=1e-6)


def test_k3_is_trls():
    logps, ref = at([-0.8, 0.0, 0.3, 2.0])
    expected = torch.exp(ref - logps) - (ref - logps) - 1
    assert_close(divergence("k3", logps, ref), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "alpha"), EVERY)
@pytest.mark.parametrize("match", ["value", "curvature"])
def test_the_pathwise_gradient_is_the_derivative_of_the_value(name, alpha, match):
    # Also beyond the bound of 20, where value and gradient are those of the tangent; not on the bend itself.
    moved = [-23.0, -19.0, -4.0, -0.5, -1e-2, 1e-2, 0.7, 6.0, 18.0, 30.0]
    logps, ref = at(moved, torch.float64)
    value = divergence(name, logps, ref, alpha, match)
    value.sum().backward()
    assert_close(logps.grad, shaping(name, logps, ref, alpha, match), rtol=0, atol=0)
    step = 1e-5
    up, down = (divergence(name, logps.detach() + way * step, ref, alpha, match) for way in (1, -1))
    # Rounding of values of 1e-16 times the value, over twice the step.
    noise = 1e-15 * value.detach().abs() / step
    error = (logps.grad - (up - down) / (2 * step)).abs()
    assert (error <= 1e-9 + 1e-8 * logps.grad.abs() + noise).all(), error


def expectations(name, alpha, gradient):
    """Gradient of E_policy[g] by the logits, as autograd of the sum over all tokens has it, and as samples have it."""
    generator = torch.Generator().manual_seed(1)
    logits, other = torch.randn(2, 1, 7, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    logps, ref = logits.log_softmax(-1), other.log_softmax(-1)
    chances = logps.detach().exp()
    value = divergence(name, logps, ref, alpha, match="value")
    g = DIVERGENCES[name].value(ref - logps, alpha)
    (exact,) = torch.autograd.grad((logps.exp() * g).sum(), logits, retain_graph=True)
    coefficient = shaping(name, logps, ref, alpha, "value", gradient)
    (sampled,) = torch.autograd.grad((chances * coefficient * logps).sum(), logits)
    assert_close(value.detach(), g.detach(), rtol=1e-10, atol=1e-12)
    return exact, sampled, logits, ref


@pytest.mark.parametrize(("name", "alpha"), EVERY)
def test_the_unbiased_gradient_has_the_expectation_it_claims(name, alpha):
    exact, sampled, *_ = expectations(name, alpha, "unbiased")
    assert_close(sampled, exact, rtol=1e-9, atol=1e-11)
    logps, ref = at([-1.3, 0.4], torch.float64)
    divergence(name, logps, ref, alpha, "value", "unbiased").sum().backward()
    assert_close(logps.grad, shaping(name, logps, ref, alpha, "value", "unbiased"), rtol=0, atol=0)


def test_the_pathwise_gradient_of_k3_is_that_of_the_forward_kl():
    # E_policy[(1 - w) grad log pi] = -E_ref[grad log pi]
    exact, sampled, logits, ref = expectations("k3", 0.5, "pathwise")
    forward = (ref.exp() * (ref - logits.log_softmax(-1))).sum()
    (expected,) = torch.autograd.grad(forward, logits)
    assert_close(sampled, expected, rtol=1e-9, atol=1e-11)
    assert (sampled - exact).abs().max() > 0.04


def test_unbiased_coefficients_by_hand():
    # policy half the reference: w = 2, u = ln 2; -u, 1 - w, -log((1 + w) / 2) / 2, -(sqrt w - 1) / (1/2)
    logps, ref = at([-math.log(2)])
    found = [shaping(name, logps, ref, 0.5, "value", "unbiased").item() for name in (*NAMES, "alpha")]
    expected = [-math.log(2), -1.0, -math.log(3 / 2) / 2, -(math.sqrt(2) - 1) / 0.5]
    assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["pathwise", "unbiased"])
def test_alpha_ends_at_the_two_kls(gradient):
    logps, ref = at([-3.0, -0.4, 0.0, 0.9, 12.0])
    for end, name in ((0.0, "reverse_kl"), (1.0, "forward_kl")):
        for alpha in (end, abs(end - 1e-7)):
            # fp32: a millionth of the value
            one, other = (divergence(what, logps, ref, alpha) for what in ("alpha", name))
            assert_close(one, other, rtol=2e-6, atol=2e-6)
            one, other = (shaping(what, logps, ref, alpha, gradient=gradient) for what in ("alpha", name))
            assert_close(one, other, rtol=2e-6, atol=2e-6)


def test_alpha_of_a_half_is_twice_the_squared_hellinger_distance():
    # w = 1/4 and 4: 2 (sqrt w - 1)^2 = .5, 2
    logps, ref = at([math.log(4), -math.log(4)])
    assert_close(divergence("alpha", logps, ref).detach(), torch.tensor([[0.5, 2.0]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "alpha"), EVERY)
def test_matched_by_curvature_all_bend_alike(name, alpha):
    # u^2 / 2 at u = -.01: 5e-5, and the third derivative adds less than 1% of it
    logps, ref = at([0.01], torch.float64)
    assert_close(divergence(name, logps, ref, alpha).item(), 5e-5, rtol=1e-2, atol=0)
    scale = 4 if name == "jensen_shannon" else 1
    assert_close(divergence(name, logps, ref, alpha), scale * divergence(name, logps, ref, alpha, "value"))


@pytest.mark.parametrize(("name", "alpha"), EVERY)
@pytest.mark.parametrize("gradient", ["pathwise", "unbiased"])
def test_a_runaway_token_is_still_pulled_back(name, alpha, gradient):
    # Below the reference: up (negative). Above it: down, though forward_kl and jensen_shannon let go there (w -> 0).
    moved = [-300.0, -88.0, -20.0, -19.9, 19.9, 20.0, 88.0, 300.0]
    logps, ref = at(moved)
    value = divergence(name, logps, ref, alpha, gradient=gradient)
    value.sum().backward()
    assert value.isfinite().all() and logps.grad.isfinite().all()
    assert (value >= 0).all() and (value[0].diff()[:3] < 0).all()  # the farther below, the larger
    assert (logps.grad[0, :4] < -0.3).all() and (logps.grad[0, 4:] > 0).all()
    assert torch.equal(logps.grad[0, :3], logps.grad[0, 2].expand(3))  # the slope of the bound


def test_the_tangent_is_the_reverse_kl_itself_where_the_token_was_raised():
    # w = e^-50 = 0 in fp32: w - u - 1 = 49, gradient 1
    logps, ref = at([50.0])
    value = divergence("reverse_kl", logps, ref)
    value.backward()
    assert_close([value.item(), logps.grad.item()], [49.0, 1.0], rtol=0, atol=1e-4)


def test_bf16_is_computed_in_fp32():
    # u = 1/16: exp(u) - u - 1 = .001994; in bf16 exp(u) rounds to 1.0625 and the estimate to 0
    logps = torch.full((1, 1), -1.0625, dtype=torch.bfloat16)
    value = divergence("k3", logps, torch.full((1, 1), -1.0, dtype=torch.bfloat16))
    assert_close(value, torch.full((1, 1), math.exp(1 / 16) - 1 / 16 - 1), rtol=0, atol=1e-7)


def test_tiny_steps_are_not_lost_to_cancellation():
    # u = 2^-20 exactly in fp32: coefficients -u, -u, -u/4 up to u^2
    logps, ref = at([-(2.0**-20)])
    for name, part in zip(NAMES, (1, 1, 0.25), strict=True):
        for gradient in ("pathwise", "unbiased"):
            found = shaping(name, logps, ref, match="value", gradient=gradient).item()
            assert_close(found, -part * 2.0**-20, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "js"}, r"divergence='js'.*k3, reverse_kl, forward_kl, jensen_shannon, alpha"),
        ({"match": "beta"}, r"match='beta'.*curvature, value"),
        ({"gradient": "score"}, r"gradient='score'.*pathwise, unbiased"),
        ({"alpha": -0.1}, r"alpha=-0.1 must lie in \[0, 1\]"),
    ],
)
def test_a_wrong_argument_says_what_exists(changes, words):
    with pytest.raises(ValueError, match=words):
        divergence(**({"name": "alpha", "logps": torch.zeros(1, 1), "ref_logps": torch.zeros(1, 1)} | changes))

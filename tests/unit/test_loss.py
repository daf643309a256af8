"""Eq. 8 by hand: values, and the gradients that a detached and an undetached weight give."""

import math

import pytest
import torch
from torch.testing import assert_close

from gcpo_trl.objective.loss import LossInputs, gcpo_loss
from gcpo_trl.objective.weighting import advantage_weight

REF = torch.full((1, 4), -1.0)
CRITICAL = torch.tensor([[True, False, True, False]])
MOVED = [-0.8, -2.0, -1.0, -0.7]
START = [-1.0, -1.0, -1.0, -1.0]


def loss_and_gradient(logps, form, detach, **options):
    """One image, advantage 1, tokens 0 and 2 critical, beta .04, clip .5."""
    logps = torch.tensor([logps], requires_grad=True)
    weight = advantage_weight(logps, REF, clip=0.5, form=form, detach=detach)
    settings = {"advantages": torch.ones(1), "critical": CRITICAL, "weight": weight, "beta": 0.04, **options}
    loss = gcpo_loss(LossInputs(logps=logps, ref_logps=REF, **settings)).loss
    loss.backward()
    return loss.detach(), logps.grad


@pytest.mark.parametrize(
    ("logps", "form", "detach", "loss", "gradient"),
    [
        # w = 1.221403, .., .942644: -((1.221403 - .04 * .018731) + .942644) / 2.
        # Detached: token 0 is -(1.221403 - .04 (1 - e^-.2)) / 2, token 2 is -.942644 / 2.
        (MOVED, "exp", True, -1.081649, [-0.607076, 0, -0.471322, 0]),
        # Undetached adds -e^.2 (1 + 1/3) / 2 to token 0 and -(1/3) / 2 to token 2; token 1 is outside the clip.
        (MOVED, "exp", False, -1.081649, [-1.421345, 0, -0.637989, 0]),
        # w = .2, .., -.1: the sign of token 2 has turned around.
        (MOVED, "linear", True, -0.049625, [-0.096375, 0, 0.05, 0]),
        (MOVED, "linear", False, -0.049625, [-0.763041, 0, -0.116667, 0]),
        # At step 0 w = 1 and no divergence: -1/2 each. Undetached adds -(1 + 1/3)/2, -(1/3)/2, -(1/3)/2:
        # token 1 is not critical and trains all the same.
        (START, "exp", True, -1.0, [-0.5, 0, -0.5, 0]),
        (START, "exp", False, -1.0, [-1.166667, -0.166667, -0.666667, 0]),
        # Linear and detached: no gradient at all, training never starts.
        (START, "linear", True, 0.0, [0.0, 0, 0, 0]),
        (START, "linear", False, 0.0, [-0.666667, -0.166667, -0.166667, 0]),
    ],
)
def test_loss_and_gradient_of_one_image(logps, form, detach, loss, gradient):
    seen, seen_gradient = loss_and_gradient(logps, form, detach)
    assert_close(seen, torch.tensor(loss), rtol=0, atol=1e-6)
    assert_close(seen_gradient, torch.tensor([gradient]), rtol=0, atol=1e-6)


def test_normalizers():
    # Row 0: weights 1 and 3 critical, advantage 2 -> 2 + 6 = 8 over 2 critical of 4 tokens.
    # Row 1: weight 5, advantage -1 -> -5 over 1 critical of 2 valid tokens.
    logps = torch.zeros(2, 4)
    inputs = {
        "logps": logps,
        "ref_logps": logps,
        "advantages": torch.tensor([2.0, -1.0]),
        "critical": torch.tensor([[True, False, True, False], [True, False, False, False]]),
        "weight": torch.tensor([[1.0, 9, 3, 9], [5, 9, 9, 9]]),
        "valid": torch.tensor([[True, True, True, True], [True, True, False, False]]),
    }
    # selected: -(8 - 5) / 3
    out = gcpo_loss(LossInputs(**inputs))
    assert_close(out.loss, torch.tensor(-1.0), rtol=0, atol=1e-6)
    # sequence: -(8/4 - 5/2) / 2
    assert_close(gcpo_loss(LossInputs(**inputs, normalizer="sequence")).loss, torch.tensor(0.25), rtol=0, atol=1e-6)
    # 3 critical of 6 valid; mean weight (1 + 3 + 5) / 3
    assert_close(out.metrics["gcpo/select/fraction"], torch.tensor(0.5), rtol=0, atol=0)
    assert_close(out.metrics["gcpo/weight/mean"], torch.tensor(3.0), rtol=0, atol=1e-6)
    assert_close(out.metrics["gcpo/divergence/k3"], torch.tensor(0.0), rtol=0, atol=0)
    assert_close(out.metrics["gcpo/policy/clipped_fraction"], torch.tensor(0.0), rtol=0, atol=0)


def test_ratio_is_clipped_on_the_side_that_helps():
    # Ratios 1.5, 1.5, .5, .5 with advantages 1, -1, 1, -1 and epsilon .2:
    # min(1.5, 1.2) = 1.2; min(-1.5, -1.2) = -1.5; min(.5, .8) = .5; min(-.5, -.8) = -.8. Mean -.6/4.
    logps = torch.log(torch.tensor([[1.5], [1.5], [0.5], [0.5]])).requires_grad_()
    inputs = LossInputs(
        logps=logps,
        ref_logps=logps.detach(),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        critical=torch.ones(4, 1, dtype=torch.bool),
        weight=torch.ones(4, 1),
        old_logps=torch.zeros(4, 1),
        beta=0.0,
        epsilon=0.2,
    )
    out = gcpo_loss(inputs)
    assert_close(out.loss, torch.tensor(0.6 / 4), rtol=0, atol=1e-6)
    assert_close(out.metrics["gcpo/policy/clipped_fraction"], torch.tensor(0.5), rtol=0, atol=0)
    # A clipped token gets no gradient; the others -A * ratio / 4.
    out.loss.backward()
    assert_close(logps.grad, torch.tensor([[0.0], [1.5 / 4], [-0.5 / 4], [0.0]]), rtol=0, atol=1e-6)


def test_divergence_is_inside_the_indicator_and_not_weighted():
    # Token 0 critical with weight 0: only -beta k3 = -.1 * .018731 is left. Token 1's .718282 does not appear.
    loss, gradient = loss_and_gradient(
        MOVED, "none", True, weight=torch.zeros(1, 4), critical=torch.tensor([[True, False, False, False]]), beta=0.1
    )
    assert_close(loss, torch.tensor(0.1 * 0.0187308), rtol=0, atol=1e-7)
    assert_close(gradient, torch.tensor([[0.1 * (1 - math.exp(-0.2)), 0, 0, 0]]), rtol=0, atol=1e-7)


def test_no_critical_token_gives_zero_not_nan():
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    for normalizer in ("selected", "sequence"):
        loss, gradient = loss_and_gradient(MOVED, "exp", True, critical=nothing, valid=nothing, normalizer=normalizer)
        assert torch.equal(loss.abs(), torch.tensor(0.0))
        assert torch.equal(gradient.abs(), torch.zeros(1, 4))


def test_unknown_normalizer_says_which_exist():
    with pytest.raises(ValueError, match=r"'tokens'.*selected, sequence"):
        loss_and_gradient(MOVED, "exp", True, normalizer="tokens")


@pytest.mark.parametrize(
    ("settings", "loss", "gradient"),
    [
        # Forward KL: token 0 has u = -.2, w = .818731: w u - w + 1 = .017523, gradient -w u = .163746; token 2 has 0.
        ({"divergence": "forward_kl"}, 0.1 * 0.017523 / 2, [0.1 * 0.163746 / 2, 0, 0, 0]),
        # Unbiased: 1 - w = .181269 at token 0.
        (
            {"divergence": "forward_kl", "divergence_gradient": "unbiased"},
            0.1 * 0.017523 / 2,
            [0.1 * 0.181269 / 2, 0, 0, 0],
        ),
        # On all: k3 = .018731, .718282, 0, .040818 over 4 tokens; gradients 1 - w.
        (
            {"divergence_on": "all"},
            0.1 * 0.777831 / 4,
            [0.1 * 0.181269 / 4, -0.1 * 1.718282 / 4, 0, 0.1 * 0.259182 / 4],
        ),
        # Half of it at token 0, all at the others.
        ({"divergence_weight": torch.tensor([[0.5, 1, 1, 1]])}, 0.1 * 0.018731 / 4, [0.1 * 0.181269 / 4, 0, 0, 0]),
    ],
)
def test_the_divergence_of_one_image(settings, loss, gradient):
    seen, seen_gradient = loss_and_gradient(MOVED, "none", True, weight=torch.zeros(1, 4), beta=0.1, **settings)
    assert_close(seen, torch.tensor(loss), rtol=0, atol=1e-7)
    assert_close(seen_gradient, torch.tensor([gradient]), rtol=0, atol=1e-7)


def test_the_metric_is_the_divergence_itself_over_the_tokens_it_is_on():
    logps = torch.tensor([MOVED])
    inputs = LossInputs(
        logps=logps,
        ref_logps=REF,
        advantages=torch.ones(1),
        critical=CRITICAL,
        weight=torch.ones(1, 4),
        divergence="jensen_shannon",
        divergence_on="all",
    )
    # (w u - (1 + w) log((1 + w) / 2)) / 2 at u = -.2, 1, 0, -.3: .004524, .206261, 0, .009683;
    # their mean, and not times 4
    found = gcpo_loss(inputs).metrics["gcpo/divergence/jensen_shannon"]
    u = [-0.2, 1.0, 0.0, -0.3]
    expected = sum(math.exp(x) * x - (1 + math.exp(x)) * math.log((1 + math.exp(x)) / 2) for x in u) / 2 / 4
    assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_an_unknown_place_of_the_divergence_says_which_exist():
    with pytest.raises(ValueError, match=r"'some'.*critical, all"):
        loss_and_gradient(MOVED, "exp", True, divergence_on="some")

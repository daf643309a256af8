"""Scoring in tiles equals the plain formulas on the whole ``(batch, seq, vocab)``, values and gradients."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gcpo_trl.policies.decoding.image_head import Scored, score_tokens

BATCH, SEQ, DIM, VOCAB = 3, 5, 4, 7


@pytest.fixture
def case():
    """A head, hidden states that require gradients, and tokens."""
    head = nn.Sequential(nn.Linear(DIM, 6), nn.GELU(), nn.Linear(6, VOCAB))
    return head, torch.randn(BATCH, SEQ, DIM, requires_grad=True), torch.randint(VOCAB, (BATCH, SEQ))


def plain(head, hidden, tokens, temperature):
    """The same two numbers from all logits at once."""
    log_probs = (head(hidden) / temperature).log_softmax(-1)
    return log_probs.gather(-1, tokens[..., None])[..., 0], -(log_probs.exp() * log_probs).sum(-1)


def gradients(head, hidden, outputs):
    """Gradients of a sum that weighs every output differently."""
    total = sum((torch.linspace(-1, 2, x.numel()).view_as(x) * x).sum() for x in outputs)
    return torch.autograd.grad(total, [hidden, *head.parameters()])


def test_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4; entropy = 1/4 ln 4 + 3/4 ln 4/3 = 0.562335
    logits = torch.tensor([[[0.0, 1.0986123], [0.0, 1.0986123]]])
    log_probs, entropies = score_tokens(nn.Identity(), logits, torch.tensor([[0, 1]]), temperature=1.0)
    assert_close(log_probs.exp(), torch.tensor([[0.25, 0.75]]), rtol=0, atol=1e-6)
    assert_close(entropies, torch.tensor([[0.562335, 0.562335]]), rtol=0, atol=1e-6)
    # at temperature 0.5 the logits double: 1/10 and 9/10
    log_probs, _ = score_tokens(nn.Identity(), logits, torch.tensor([[0, 1]]), temperature=0.5)
    assert_close(log_probs.exp(), torch.tensor([[0.1, 0.9]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 15, 2048])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_tiles_equal_the_whole(case, chunk, temperature):
    head, hidden, tokens = case
    expected = plain(head, hidden, tokens, temperature)
    scores = score_tokens(head, hidden, tokens, temperature, chunk)
    assert_close(scores, expected, rtol=0, atol=1e-6)
    assert_close(gradients(head, hidden, scores), gradients(head, hidden, expected), rtol=0, atol=1e-6)


def test_a_tile_is_recomputed_in_the_backward_pass(case):
    # Tiles of 4 positions, 15 in all: 4 forward calls, and 4 more when the gradient needs their logits again.
    head, hidden, tokens = case
    rows = []
    head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    log_probs, _ = score_tokens(head, hidden, tokens, 1.0, chunk=4)
    assert rows == [4, 4, 4, 3]
    log_probs.sum().backward()
    assert sorted(rows) == [3, 3, 4, 4, 4, 4, 4, 4]


def test_scores_are_fp32_also_from_bf16(case):
    head, hidden, tokens = case
    log_probs, entropies = score_tokens(head.bfloat16(), hidden.bfloat16(), tokens, 1.0)
    assert log_probs.dtype == entropies.dtype == torch.float32


# only some positions

CHOSEN = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 1]]).bool()


@pytest.mark.parametrize("chunk", [4, 2048])
@pytest.mark.parametrize("rest", [True, False])
def test_chosen_positions_have_the_gradient_of_all_masked(case, chunk, rest):
    head, hidden, tokens = case
    whole = score_tokens(head, hidden, tokens, 0.8, chunk)
    part = score_tokens(head, hidden, tokens, 0.8, chunk, Scored(CHOSEN, rest))
    for one, other in zip(part, whole, strict=True):
        assert_close(one, other if rest else other * CHOSEN, rtol=0, atol=1e-6)
    masked = [x * CHOSEN for x in whole]
    assert_close(gradients(head, hidden, part), gradients(head, hidden, masked), rtol=0, atol=1e-6)
    assert (gradients(head, hidden, score_tokens(head, hidden, tokens, 0.8))[0][~CHOSEN] != 0).any()


@pytest.mark.parametrize(("rest", "expected"), [(False, [2, 2, 1, 1]), (True, [2, 2, 1, 1, 3, 2, 2, 2])])
def test_the_head_is_called_equally_often_however_many_are_chosen(case, rest, expected):
    # 15 positions in tiles of 4 are 4 calls on every rank, for 6 chosen ones as for none.
    head, hidden, tokens = case
    rows = []
    head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    score_tokens(head, hidden, tokens, 1.0, 4, Scored(CHOSEN, rest))
    assert rows == expected
    rows.clear()
    none = score_tokens(head, hidden, tokens, 1.0, 4, Scored(torch.zeros_like(CHOSEN), rest=False))
    assert rows == [0] * 4 and none[0].requires_grad and (none[0] == 0).all()


def test_an_entropy_without_gradient_is_the_same_number(case):
    head, hidden, tokens = case
    with_gradient = score_tokens(head, hidden, tokens, 1.0)
    without = score_tokens(head, hidden, tokens, 1.0, scored=Scored(entropy_gradient=False))
    assert torch.equal(without[1], with_gradient[1])
    assert with_gradient[1].requires_grad and not without[1].requires_grad and without[0].requires_grad


def test_a_logit_of_minus_infinity_has_no_entropy():
    # probabilities 0, 1/4, 3/4: entropy 0.562335
    logits = torch.tensor([[[-torch.inf, 0.0, 1.0986123]]], requires_grad=True)
    _, entropies = score_tokens(nn.Identity(), logits, torch.tensor([[1]]), 1.0)
    assert_close(entropies, torch.tensor([[0.562335]]), rtol=0, atol=1e-6)

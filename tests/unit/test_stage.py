"""STAGE's similarity and weights, by hand and against the pairs written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gcpo_trl.objective.stage import distinctness, opposing_similarity, stage_advantage_weight, stage_divergence_weight

SIMILARITY = torch.tensor([[0.6, -1.0, 1.0]])


def plain_similarity(ids, table, advantages, valid):
    """For each token, the mean cosine with its position in the members j != i with A_i A_j <= 0; 0 without one."""
    prompts, group, seq = ids.shape
    out = torch.zeros(prompts, group, seq)
    for p in range(prompts):
        for i in range(group):
            for t in range(seq):
                opposite = [j for j in range(group) if j != i and advantages[p, i] * advantages[p, j] <= 0]
                near = [
                    F.cosine_similarity(table[ids[p, i, t]], table[ids[p, j, t]], dim=0)
                    for j in opposite
                    if valid[p, j, t]
                ]
                if near and valid[p, i, t]:
                    out[p, i, t] = torch.stack(near).mean()
    return out


def test_weights_by_hand():
    # (1 - s) / 2 of .6, -1, 1 = .2, 1, 0; 1/2 + (1 + s) / 2 cut at 1: 1, .5, 1
    assert_close(distinctness(SIMILARITY), torch.tensor([[0.2, 1.0, 0.0]]), rtol=0, atol=1e-6)
    assert_close(stage_divergence_weight(SIMILARITY), torch.tensor([[1.0, 0.5, 1.0]]), rtol=0, atol=1e-6)
    # between -1 and 0 it falls: s = -.5 gives .75
    assert_close(stage_divergence_weight(torch.tensor([[-0.5]])), torch.tensor([[0.75]]), rtol=0, atol=1e-6)


def test_the_advantage_weight_has_mean_one_over_the_sequence():
    # .2, 1, 0 sum to 1.2 over 3 tokens: times 3 / 1.2
    assert_close(stage_advantage_weight(SIMILARITY), torch.tensor([[0.5, 2.5, 0.0]]), rtol=0, atol=1e-6)
    # padding does not count: .2 and 0 over 2 tokens, times 2 / .2
    valid = torch.tensor([[True, False, True]])
    assert_close(stage_advantage_weight(SIMILARITY, valid), torch.tensor([[2.0, 0.0, 0.0]]), rtol=0, atol=1e-6)
    # nothing sets this sequence apart; rows do not mix
    both = stage_advantage_weight(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(both, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


def test_opposing_similarity_by_hand():
    # Codes 0 = (1, 0), 1 = (0, 3), 2 = (-2, 0). Advantages 1, 1, -2: members 0 and 1 oppose 2 and not each other.
    table = torch.tensor([[1.0, 0], [0, 3], [-2, 0]])
    ids = torch.tensor([[[0, 0], [1, 2], [2, 0]]])
    found = opposing_similarity(ids, table, torch.tensor([[1.0, 1.0, -2.0]]))
    # position 0: 0 against 2 = -1; 1 against 2 = 0; 2 against 0 and 1: (-1 + 0) / 2
    # position 1: 0 against 0 = 1; 2 against 0 = -1; 0 against 0 and 2: (1 - 1) / 2
    assert_close(found, torch.tensor([[[-1.0, 1.0], [0.0, -1.0], [-0.5, 0.0]]]), rtol=0, atol=1e-6)


def test_a_member_of_advantage_zero_opposes_everyone():
    table = torch.eye(2)
    ids = torch.tensor([[[0], [0], [1]]])
    # member 1 is at 0: it opposes 0 (same code) and 2 (another): (1 + 0) / 2; member 0 opposes 1 and 2 alike
    found = opposing_similarity(ids, table, torch.tensor([[1e-30, 0.0, -1e-30]]))
    assert_close(found, torch.tensor([[[0.5], [0.5], [0.0]]]), rtol=0, atol=1e-6)
    # members 0 and 1 agree, however small their advantages: each meets member 2 alone
    found = opposing_similarity(ids, table, torch.tensor([[1e-30, 1e-30, -2e-30]]))
    assert torch.equal(found, torch.zeros(1, 3, 1))


@pytest.mark.parametrize("advantages", [torch.tensor([[1.0]]), torch.tensor([[2.0, 3.0]])])
def test_without_an_opposite_stage_is_grpo(advantages):
    group = advantages.shape[1]
    ids = torch.zeros(1, group, 4, dtype=torch.long)
    similarity = opposing_similarity(ids, torch.ones(1, 2), advantages)
    assert torch.equal(similarity, torch.zeros(1, group, 4))
    assert torch.equal(stage_advantage_weight(similarity[0]), torch.ones(group, 4))
    assert torch.equal(stage_divergence_weight(similarity[0]), torch.ones(group, 4))


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_pairs_written_out(padded):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, (3, 5, 7), generator=generator)
    table = torch.randn(6, 4, generator=generator)
    advantages = torch.randn(3, 5, generator=generator)
    advantages[0, 1] = 0.0
    advantages[2] = 0.0
    valid = torch.rand(3, 5, 7, generator=generator) < 0.6 if padded else torch.ones(3, 5, 7, dtype=torch.bool)
    expected = plain_similarity(ids, table, advantages, valid)
    found = opposing_similarity(ids.masked_fill(~valid, 10**6), table, advantages, valid)
    assert_close(found, expected, rtol=0, atol=1e-6)


def test_no_gradient():
    table = torch.randn(3, 2, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0]], requires_grad=True)
    similarity = opposing_similarity(torch.tensor([[[0, 1], [1, 2]]]), table, advantages)
    assert not similarity.requires_grad
    graded = similarity[0].requires_grad_()
    assert not stage_advantage_weight(graded).requires_grad and not stage_divergence_weight(graded).requires_grad

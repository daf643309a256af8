"""Entropy and group similarity, by hand and against the pairs written out."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gcpo_trl.objective.layout import Layout
from gcpo_trl.objective.signals import Signals, SignalsOnDemand, entropy, group_similarity, group_similarity_from_ids


def plain_similarity(embeddings, valid):
    """Eq. 5: for each position, the mean over pairs j < k of members that are valid there; 1 without a pair."""
    prompts, group, seq, _ = embeddings.shape
    out = torch.ones(prompts, seq)
    for p in range(prompts):
        for t in range(seq):
            members = [j for j in range(group) if valid[p, j, t]]
            pairs = [
                F.cosine_similarity(embeddings[p, j, t], embeddings[p, k, t], dim=0)
                for j, k in combinations(members, 2)
            ]
            if pairs:
                out[p, t] = torch.stack(pairs).mean()
    return out


def test_entropy_of_known_distributions():
    # uniform over 4: ln 4. (1/2, 1/4, 1/4): 1/2 ln 2 + 2/4 ln 4 = 3/2 ln 2. A certain token: 0.
    logits = torch.tensor([[0.0, 0, 0, 0], [math.log(2), 0, 0, -math.inf], [0, -math.inf, -math.inf, -math.inf]])
    expected = torch.tensor([math.log(4), 1.5 * math.log(2), 0])
    assert_close(entropy(logits), expected, rtol=0, atol=1e-6)
    # a constant added to the logits changes nothing, and axes before the last one are kept
    assert_close(entropy(logits.view(3, 1, 4) + 50), expected.view(3, 1), rtol=0, atol=1e-5)


def test_entropy_of_bf16_logits_is_fp32():
    # 300 equal logits: ln 300 = 5.703782; bf16 would give 5.6875 or 5.71875
    value = entropy(torch.zeros(1, 300, dtype=torch.bfloat16))
    assert value.dtype == torch.float32
    assert_close(value, torch.tensor([math.log(300)]), rtol=0, atol=1e-5)


def test_entropy_gradient_flows_to_logits_and_survives_minus_infinity():
    # dH/dlogit_k = -p_k (log p_k + H). p = (3/4, 1/4, 0), H = 2 ln 2 - 3/4 ln 3.
    logits = torch.tensor([[math.log(3), 0, -math.inf]], requires_grad=True)
    entropy(logits).sum().backward()
    h = 2 * math.log(2) - 0.75 * math.log(3)
    expected = torch.tensor([[-0.75 * (math.log(0.75) + h), -0.25 * (math.log(0.25) + h), 0]])
    assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def test_similarity_is_the_mean_over_pairs():
    # (1,0).(0,1) = 0; (1,0).(1,1)/sqrt2 = (0,1).(1,1)/sqrt2 = .707107; mean 1.414214 / 3 = .471405
    embeddings = torch.tensor([[1.0, 0], [0, 1], [1, 1]]).view(1, 3, 1, 2)
    expected = torch.tensor([[math.sqrt(2) / 3]])
    assert_close(group_similarity(embeddings), expected, rtol=0, atol=1e-6)
    # lengths do not matter
    scaled = embeddings * torch.tensor([0.01, 100, 3]).view(1, 3, 1, 1)
    assert_close(group_similarity(scaled), expected, rtol=0, atol=1e-6)


def test_identical_opposite_and_zero_embeddings():
    # same vector three times: 1. Two opposite: -1. A zero vector has cosine 0 with all: pairs (1, 0, 0) -> 1/3.
    same = torch.tensor([3.0, 4]).expand(1, 3, 1, 2)
    assert_close(group_similarity(same), torch.ones(1, 1), rtol=0, atol=1e-6)
    opposite = torch.tensor([[1.0, 2], [-1, -2]]).view(1, 2, 1, 2)
    assert_close(group_similarity(opposite), -torch.ones(1, 1), rtol=0, atol=1e-6)
    with_zero = torch.tensor([[1.0, 2], [2, 4], [0, 0]]).view(1, 3, 1, 2)
    assert_close(group_similarity(with_zero), torch.full((1, 1), 1 / 3), rtol=0, atol=1e-6)


def test_a_group_of_one_has_similarity_one():
    embeddings, ids = torch.randn(2, 1, 3, 4), torch.zeros(2, 1, 3, dtype=torch.long)
    assert torch.equal(group_similarity(embeddings), torch.ones(2, 3))
    assert torch.equal(group_similarity_from_ids(ids, embeddings[0, 0]), torch.ones(2, 3))


def test_padded_members_do_not_count():
    # Members (1,0), (0,1), (1,1) at three positions. All alive: sqrt2/3. Without the third: 0. Only the first: 1.
    table = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    ids = torch.tensor([[[0, 0, 0], [1, 1, -100], [2, 999, 2]]])
    valid = torch.tensor([[[True, True, True], [True, True, False], [True, False, False]]])
    expected = torch.tensor([[math.sqrt(2) / 3, 0, 1]])
    assert_close(group_similarity_from_ids(ids, table, valid), expected, rtol=0, atol=1e-6)
    embeddings = table[ids.clamp(0, 2)].masked_fill(~valid[..., None], math.nan)
    assert_close(group_similarity(embeddings, valid), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_both_fast_forms_equal_the_pairs_written_out(masked):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(11, 6, generator=generator)
    table[3] = 0
    ids = torch.randint(11, (2, 5, 8), generator=generator)
    valid = torch.rand(ids.shape, generator=generator) > 0.5 if masked else torch.ones_like(ids, dtype=torch.bool)
    expected = plain_similarity(table[ids], valid)
    argument = valid if masked else None
    assert_close(group_similarity(table[ids], argument), expected, rtol=0, atol=1e-6)
    assert_close(group_similarity_from_ids(ids, table, argument), expected, rtol=0, atol=1e-6)


def test_similarity_of_bf16_embeddings_is_summed_in_fp32():
    # (1, 1/16) twice and (1, 0): cosines 1, c, c with c = 1/sqrt(1 + 1/256) = .998053. bf16 has only .996 and 1.
    table = torch.tensor([[1, 1 / 16], [1, 0]], dtype=torch.bfloat16)
    ids = torch.tensor([[[0], [0], [1]]])
    expected = torch.tensor([[(1 + 2 / math.sqrt(1 + 1 / 256)) / 3]])
    for value in (group_similarity(table[ids]), group_similarity_from_ids(ids, table)):
        assert value.dtype == torch.float32
        assert_close(value, expected, rtol=0, atol=1e-6)


def test_similarity_carries_no_gradient():
    table = torch.randn(4, 3, requires_grad=True)
    ids = torch.tensor([[[0, 1], [2, 3]]])
    assert not group_similarity(table[ids]).requires_grad
    assert not group_similarity_from_ids(ids, table).requires_grad


def test_a_grid_that_does_not_fit_says_what_was_seen():
    flat = torch.zeros(1, 6)
    Signals(flat, flat, flat == 0, layout=Layout.raster(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 4\).*8 cells.*seq=6"):
        Signals(flat, flat, flat == 0, layout=Layout.raster(2, 4))


def test_signals_on_demand_are_made_when_first_read_and_once():
    made, flat = [], torch.zeros(1, 6)

    def maker(name):
        return lambda: made.append(name) or torch.full((1, 6), float(len(made)))

    layout = Layout.raster(2, 3)
    signals = SignalsOnDemand({name: maker(name) for name in ("entropy", "similarity")}, flat == 0, layout)
    assert isinstance(signals, Signals) and signals.layout == layout and signals.valid.all() and made == []
    assert torch.equal(signals.similarity, flat + 1) and made == ["similarity"]
    assert torch.equal(signals.entropy, flat + 2) and torch.equal(signals.similarity, flat + 1)
    assert made == ["similarity", "entropy"]
    with pytest.raises(AttributeError, match="no 'colour'; it makes entropy, similarity"):
        _ = signals.colour
    with pytest.raises(ValueError, match=r"8 cells.*seq=6"):
        SignalsOnDemand({}, flat == 0, layout=Layout.raster(2, 4))

"""How much the images of a prompt differ, in numbers a reader can redo."""

import math
from itertools import combinations, permutations

import pytest
import torch
from torch.testing import assert_close

from gcpo_trl.objective.diversity import feature_distance, token_disagreement, vendi_score


def groups(*vectors):
    """One group of features."""
    return torch.tensor([vectors], dtype=torch.float64)


# tokens


def test_disagreement_by_hand():
    # Pairs of three: 7 7 7 none differ; 1 2 1 two of three; 1 2 3 all. The second group: 0 0 0, 4 4 5, 9 8 8.
    tokens = torch.tensor([[7, 1, 1], [7, 2, 2], [7, 1, 3], [0, 4, 9], [0, 4, 8], [0, 5, 8]])
    expected = torch.tensor([[0, 2 / 3, 1], [0, 2 / 3, 2 / 3]])
    assert_close(token_disagreement(tokens, 3), expected, rtol=0, atol=1e-7)
    # Pairs of two: one of one.
    assert_close(token_disagreement(tokens[:2], 2), torch.tensor([[0.0, 1, 1]]), rtol=0, atol=0)


def test_disagreement_is_that_of_the_pairs_written_out():
    tokens = torch.randint(0, 4, (3 * 7, 50), generator=torch.Generator().manual_seed(0))
    plain = torch.stack(
        [torch.stack([(a != b).float() for a, b in combinations(group, 2)]).mean(0) for group in tokens.split(7)]
    )
    assert_close(token_disagreement(tokens, 7), plain, rtol=0, atol=1e-6)


def test_disagreement_asks_for_whole_groups_with_pairs():
    with pytest.raises(ValueError, match="4 rows in groups of 3 make no pairs; give whole groups of at least 2"):
        token_disagreement(torch.zeros(4, 2, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="4 rows in groups of 1"):
        token_disagreement(torch.zeros(4, 2, dtype=torch.long), 1)


# features


def test_vendi_counts_the_images_that_differ():
    same, other = [3.0, 4, 0, 0], [0.0, 0, 2, 0]
    # Equal ones count once however long; orthogonal ones count all.
    assert_close(vendi_score(groups(same, same)), torch.tensor([1.0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(vendi_score(groups(same, other)), torch.tensor([2.0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(vendi_score(torch.eye(5)[None] * 7), torch.tensor([5.0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert vendi_score(groups(*[same] * 6)).item() == pytest.approx(1, abs=1e-12)
    # Two images at 60 degrees: eigenvalues (1 +- 1/2) / 2 = 3/4 and 1/4, whose entropy is 2 ln 2 - 3/4 ln 3.
    tilted = groups([1.0, 0], [0.5, math.sqrt(3) / 2])
    assert vendi_score(tilted).item() == pytest.approx(4 / 3**0.75, abs=1e-12)
    # Three, two of them equal: eigenvalues 2/3 and 1/3.
    assert vendi_score(groups(same, other, same)).item() == pytest.approx(3 / 2 ** (2 / 3), abs=1e-12)


def test_distance_is_the_mean_over_pairs():
    # Cosines of (1, 0), (0, 1), (1, 1): 0, 1/sqrt 2, 1/sqrt 2.
    features = groups([1.0, 0], [0, 1], [5, 5])
    assert feature_distance(features).item() == pytest.approx(1 - math.sqrt(2) / 3, abs=1e-12)
    assert feature_distance(groups([0.1, 0.7], [0.1, 0.7])).item() == pytest.approx(0, abs=1e-12)
    assert feature_distance(groups([0.1, 0.7], [0.1, 0.7])).item() >= 0
    with pytest.raises(ValueError, match="groups of 1 make no pairs"):
        feature_distance(groups([1.0, 0]))


def test_groups_are_measured_one_by_one():
    features = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    for measure in (vendi_score, feature_distance):
        assert measure(features).tolist() == pytest.approx([measure(one[None]).item() for one in features], abs=1e-12)


def test_the_order_of_the_images_does_not_matter():
    features = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 3, (4, 20), generator=torch.Generator().manual_seed(1))
    for order in map(list, permutations(range(4))):
        assert vendi_score(features[:, order]).item() == pytest.approx(vendi_score(features).item(), abs=1e-12)
        assert feature_distance(features[:, order]).item() == pytest.approx(
            feature_distance(features).item(), abs=1e-12
        )
        assert torch.equal(token_disagreement(tokens[order], 4), token_disagreement(tokens, 4))


def test_nothing_has_a_gradient():
    features = torch.randn(1, 3, 2, requires_grad=True)
    assert not vendi_score(features).requires_grad and not feature_distance(features).requires_grad

"""Which tokens are critical: each criterion by hand, and together against the released procedure as a loop."""

import math
from functools import partial

import pytest
import torch

from gcpo_trl.objective.layout import Layout
from gcpo_trl.objective.selection import (
    critical_tokens,
    entropy_gradient,
    everything,
    highest,
    initial,
    lowest,
    similarity,
    top_entropy,
)
from gcpo_trl.objective.selection import random as random_strategy
from gcpo_trl.objective.selection._ranking import floor_share
from gcpo_trl.objective.selection.complement import complement
from gcpo_trl.objective.signals import Signals
from gcpo_trl.objective.spatial import causal_neighborhood_mean, gradient_magnitude

BUMP = torch.tensor([[0.0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])  # 4 x 4, its gradient is in test_spatial


def signals_of(entropy, similarity=None, valid=None, layout=None, generator=None):
    similarity = torch.ones_like(entropy) if similarity is None else similarity
    valid = torch.ones_like(entropy, dtype=torch.bool) if valid is None else valid
    return Signals(entropy, similarity, valid, layout, generator)


def picks(mask):
    """Indices of the chosen tokens of each row."""
    return [row.nonzero().flatten().tolist() for row in mask]


def test_highest_and_lowest_break_ties_by_index():
    scores = torch.tensor([[1.0, 2, 2, 0, 2, 0]])
    eligible = torch.ones(1, 6, dtype=torch.bool)
    assert picks(highest(scores, eligible, 2)) == [[1, 2]]
    assert picks(lowest(scores, eligible, 1)) == [[3]]
    assert picks(lowest(scores, eligible, 3)) == [[0, 3, 5]]
    # zero and minus zero tie
    signed = torch.tensor([[0.0, -0.0, -0.0, 0.0]])
    assert picks(lowest(signed, eligible[:, :4], 2)) == picks(highest(signed, eligible[:, :4], 2)) == [[0, 1]]
    # 300 equal scores, more than any sort keeps in order by accident
    assert picks(highest(torch.zeros(1, 300), torch.ones(1, 300, dtype=torch.bool), 3)) == [[0, 1, 2]]


def test_infinite_and_nan_scores_still_give_the_count():
    scores = torch.tensor([[math.inf, math.nan, math.inf, 1.0, -math.inf]])
    eligible = torch.tensor([[True, True, True, False, True]])
    assert picks(lowest(scores, eligible, 2)) == [[0, 4]]
    assert picks(lowest(scores, eligible, 3)) == [[0, 2, 4]]
    assert picks(highest(scores, eligible, 3)) == [[0, 2, 4]]
    assert picks(highest(scores, eligible, 9)) == [[0, 1, 2, 4]]


def test_count_may_differ_by_row():
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]])
    eligible = torch.ones(3, 3, dtype=torch.bool)
    assert picks(lowest(scores, eligible, torch.tensor([0, 1, 2]))) == [[], [2], [1, 2]]


def test_floor_share_means_the_decimal_that_was_written():
    assert [floor_share(0.1, n) for n in (256, 576, 1024, 4096)] == [25, 57, 102, 409]
    assert floor_share(0.3, 10) == 3
    assert int(0.29 * 100) == 28
    assert floor_share(0.29, 100) == 29
    assert floor_share(1 / 3, 9) == 3
    assert floor_share(0.29, torch.tensor([100, 99, 0])).tolist() == [29, 28, 0]
    tokens = torch.arange(2000)
    for percent in range(1, 101):
        assert torch.equal(floor_share(percent / 100, tokens), tokens * percent // 100)


def test_entropy_gradient_looks_inside_the_window():
    # Magnitudes (rounded): 0 1 1 0 | 1.30 .71 .71 1 | .67 .60 .71 1 | 1.67 1 1 0. N=16: window [1, 1 + 12).
    signals, every = signals_of(BUMP, layout=Layout.raster(4, 4)), torch.ones(1, 16, dtype=torch.bool)
    assert picks(entropy_gradient.select(signals, every, 1)) == [[12]]
    assert picks(entropy_gradient.select(signals, every, 2)) == [[4, 12]]
    # Here the steepest cell, 14 with 3.104835, is outside; inside it is 11 with 2.125.
    steep = torch.tensor([[1.0, 2, 3, 4, 2, 4, 6, 8, 1, 1, 1, 1, 9, 1, 1, 1]])
    signals = signals_of(steep, layout=Layout.raster(4, 4))
    assert picks(entropy_gradient.select(signals, every, 1)) == [[11]]
    assert picks(entropy_gradient.select(signals, every, 1, window=(0.0, 1.0))) == [[14]]


@pytest.mark.parametrize(("seq", "start", "stop"), [(256, 25, 229), (576, 57, 517), (16, 1, 13)])
def test_window_ends_where_the_released_code_ends_it(seq, start, stop):
    inside = entropy_gradient.inside((0.1, 0.9), torch.ones(1, seq, dtype=torch.bool))
    assert picks(inside) == [list(range(start, stop))]


def test_window_counts_the_valid_tokens_of_each_row():
    # 10 valid of 12: [1, 1 + 8). 10 valid after 2 of padding: shifted by 2.
    valid = torch.tensor([[True] * 10 + [False] * 2, [False] * 2 + [True] * 10])
    assert picks(entropy_gradient.inside((0.1, 0.9), valid)) == [list(range(1, 9)), list(range(3, 11))]
    assert torch.equal(entropy_gradient.inside((0.0, 1.0), valid), valid)


@pytest.mark.parametrize("window", [(0.9, 0.1), (-0.1, 0.5), (0.5, 1.2), (0.5, 0.5)])
def test_a_window_that_is_not_a_range_is_refused(window):
    with pytest.raises(ValueError, match="window="):
        critical_tokens(signals_of(BUMP, layout=Layout.raster(4, 4)), window=window)


def test_text_is_a_grid_of_one_row_and_padding_does_not_exist():
    # Valid 0 0 0 8 8 8 8 8 8 8, means 0 0 0 4 8 8 .., slopes at 2, 3, 4: (4-0)/2, (8-0)/2, (8-4)/2.
    # The step from 8 to the padding's 100 must not count.
    entropy = torch.tensor([[0.0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 100, 100]])
    valid = torch.tensor([[True] * 10 + [False] * 2])
    signals = signals_of(entropy, valid=valid)
    assert picks(entropy_gradient.select(signals, valid, 1)) == [[3]]
    assert picks(entropy_gradient.select(signals, valid, 3)) == [[2, 3, 4]]
    assert picks(entropy_gradient.select(signals, valid, 1, window=(0.0, 1.0))) == [[3]]
    # Padding first: valid 2 2 2 2 3, means 2 2 2 2 2.5, slopes 0 0 0 .25 .5; neither mean nor slope sees the 100.
    entropy = torch.tensor([[100.0, 100, 2, 2, 2, 2, 3]])
    valid = torch.tensor([[False] * 2 + [True] * 5])
    signals = signals_of(entropy, valid=valid)
    assert picks(entropy_gradient.select(signals, valid, 2, window=(0.0, 1.0))) == [[5, 6]]


def test_initial_similarity_top_entropy_everything():
    entropy, alike = torch.tensor([[1.0, 5, 3, 4]]), torch.tensor([[0.9, 0.1, 0.5, 0.2]])
    signals, eligible = signals_of(entropy, alike), torch.tensor([[False, True, True, True]])
    assert picks(initial.select(signals, eligible, 2)) == [[1, 2]]
    assert picks(similarity.select(signals, eligible, 2)) == [[1, 3]]
    assert picks(top_entropy.select(signals, eligible, 2)) == [[1, 3]]
    assert picks(top_entropy.select(signals, eligible, 1)) == [[1]]
    assert picks(everything.select(signals, eligible, 1)) == [[1, 2, 3]]
    assert picks(complement(torch.tensor([[True, True, False, False]]), eligible)) == [[2, 3]]


def test_random_is_the_generator_whatever_the_chunks():
    every = torch.ones(4, 50, dtype=torch.bool)

    def draw(rows, generator):
        return random_strategy.select(signals_of(torch.zeros(rows, 50), generator=generator), every[:rows], 5)

    whole = draw(4, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(whole, torch.cat([draw(1, generator), draw(3, generator)]))
    assert not torch.equal(whole, draw(4, torch.Generator().manual_seed(4)))
    # 4 rows x 5 of 50, 500 times: each position is drawn 200 times on average, with a deviation of sqrt(180) = 13.4
    tally = sum(draw(4, generator).sum(dim=0) for _ in range(500))
    assert tally.min() > 130
    assert tally.max() < 270
    with pytest.raises(ValueError, match=r"signals.generator.*torch.Generator"):
        draw(4, None)


def test_disjoint_sets_step_aside_and_union_may_overlap():
    # Struct is {12}, init {0}. Similarity is lowest at 0, then 12, then 15.
    alike = torch.ones(1, 16)
    alike[0, 0], alike[0, 12], alike[0, 15] = 0.0, 0.1, 0.2
    signals = signals_of(BUMP, alike, layout=Layout.raster(4, 4))
    masks = critical_tokens(signals)
    assert list(masks) == ["initial", "entropy_gradient", "similarity", "critical"]
    assert {name: picks(mask)[0] for name, mask in masks.items()} == {
        "initial": [0],
        "entropy_gradient": [12],
        "similarity": [15],  # the last tenth is open to it
        "critical": [0, 12, 15],
    }
    masks = critical_tokens(signals, combine="union")
    assert picks(masks["similarity"]) == [[0]]
    assert picks(masks["critical"]) == [[0, 12]]
    rest = critical_tokens(signals, complement=True)
    assert picks(rest["critical"]) == [[i for i in range(16) if i not in (0, 12, 15)]]
    assert picks(rest["similarity"]) == [[15]]


@pytest.mark.parametrize(("side", "total"), [(16, 75), (24, 171), (32, 306), (64, 1227)])
def test_every_image_trains_on_three_floored_tenths(side, total):
    generator = torch.Generator().manual_seed(side)
    entropy = torch.rand(3, side * side, generator=generator).round(decimals=1)  # many ties
    alike = torch.rand(3, side * side, generator=generator)
    masks = critical_tokens(signals_of(entropy, alike, layout=Layout.raster(side, side)))
    assert masks["critical"].sum(dim=1).tolist() == [total] * 3
    assert [int(masks[name].sum()) for name in ("initial", "entropy_gradient", "similarity")] == [total] * 3


def released_selection(entropy, alike, side):
    """One image, in plain Python: the first K, the K steepest in the window, the K least similar of the rest."""
    seq = side * side
    k = int(0.1 * seq)
    steep = gradient_magnitude(causal_neighborhood_mean(entropy.view(1, side, side))).flatten().tolist()
    init = set(range(k))
    window = range(int(0.1 * seq), int(0.1 * seq) + int(0.8 * seq))
    struct = set(sorted(window, key=lambda i: (-steep[i], i))[:k])
    rest = [i for i in range(seq) if i not in init | struct]
    return sorted(init), sorted(struct), sorted(sorted(rest, key=lambda i: (float(alike[i]), i))[:k])


def test_equals_the_released_procedure_row_by_row():
    generator = torch.Generator().manual_seed(1)
    entropy = torch.rand(5, 144, generator=generator).round(decimals=1)
    alike = torch.rand(5, 144, generator=generator).round(decimals=1)
    masks = critical_tokens(signals_of(entropy, alike, layout=Layout.raster(12, 12)))
    for row in range(5):
        expected = released_selection(entropy[row], alike[row], 12)
        seen = tuple(picks(masks[name])[row] for name in ("initial", "entropy_gradient", "similarity"))
        assert seen == expected


def test_rows_of_different_length_select_from_their_own_tokens():
    # N = 20, 10, 5, 0: floor(.1 N) = 2, 1, 0, 0 for each of three strategies, and nothing on padding.
    lengths = torch.tensor([20, 10, 5, 0])
    valid = torch.arange(20)[None, :] < lengths[:, None]
    generator = torch.Generator().manual_seed(0)
    entropy, alike = torch.rand(4, 20, generator=generator), torch.rand(4, 20, generator=generator)
    # Padding offers the most attractive values; none may be taken.
    signals = signals_of(entropy.masked_fill(~valid, 99.0), alike.masked_fill(~valid, -99.0), valid)
    masks = critical_tokens(signals)
    assert masks["critical"].sum(dim=1).tolist() == [6, 3, 0, 0]
    assert not (masks["critical"] & ~valid).any()
    # A row selects the same tokens as when it comes alone, without its padding.
    alone = critical_tokens(signals_of(entropy[1:2, :10], alike[1:2, :10]))
    assert picks(alone["critical"])[0] == picks(masks["critical"])[1]
    rest = critical_tokens(signals, complement=True)["critical"]
    assert torch.equal(rest, valid & ~masks["critical"])


def test_without_smoothing_the_gradient_is_that_of_the_entropy_itself():
    # a 4 x 4 map, zero but for 8 at index 5. Central differences: (8 - 0) / 2 = 4 at its neighbours, of which 1 and 4
    # lie on a border, where the difference is one-sided: 1 has 8 - 0 = 8 down, 4 has 8 - 0 = 8 to the right.
    peak = signals_of(torch.zeros(1, 16).index_fill(1, torch.tensor([5]), 8.0), layout=Layout.raster(4, 4))
    raw = critical_tokens(peak, "entropy_gradient", 2 / 16, window=(0, 1), smoothing=False)
    assert picks(raw["critical"]) == [[1, 4]]
    # smoothed, the peak is spread over the cells drawn after it, and the steepest ones are others
    smooth = critical_tokens(peak, "entropy_gradient", 2 / 16, window=(0, 1))
    steepness = gradient_magnitude(causal_neighborhood_mean(peak.entropy.view(1, 4, 4))).flatten()
    assert picks(smooth["critical"]) == [sorted(steepness.argsort(descending=True, stable=True)[:2].tolist())]
    assert picks(smooth["critical"]) != picks(raw["critical"])


def test_fractions_by_strategy():
    signals = signals_of(torch.rand(1, 10), torch.arange(10.0)[None])
    names = ("initial", "similarity")
    for fraction in ([0.3, 0.2], {"similarity": 0.2, "initial": 0.3}):
        masks = critical_tokens(signals, names, fraction)
        assert (picks(masks["initial"]), picks(masks["similarity"])) == ([[0, 1, 2]], [[3, 4]])
    # 33 + 56 + 11 hundredths are exactly one, although .33 + .56 + .11 = 1.0000000000000002
    hundred = signals_of(torch.rand(1, 100))
    masks = critical_tokens(hundred, ("initial", "top_entropy", "similarity"), [0.33, 0.56, 0.11])
    assert masks["critical"].all()
    with pytest.raises(ValueError, match="one entry for each"):
        critical_tokens(signals, names, [0.3])
    with pytest.raises(ValueError, match="fraction names"):
        critical_tokens(signals, names, {"initial": 0.3})


def last_token(signals, eligible, count):
    """A strategy from outside: the last position of each row."""
    picked = torch.zeros_like(eligible)
    picked[:, -1] = True
    return picked


def test_strategies_by_name_path_and_callable():
    signals = signals_of(torch.rand(1, 10))
    assert picks(critical_tokens(signals, "everything")["critical"]) == [list(range(10))]
    masks = critical_tokens(signals, ("initial", last_token))
    assert picks(masks["last_token"]) == [[9]]
    assert picks(masks["critical"]) == [[0, 9]]
    # one that picks padding does not make it critical
    padded = signals_of(torch.rand(1, 11), valid=torch.tensor([[True] * 10 + [False]]))
    assert picks(critical_tokens(padded, ("initial", last_token))["critical"]) == [[0]]
    path = "gcpo_trl.objective.selection.initial:select"
    assert picks(critical_tokens(signals, path)[path]) == [[0]]
    assert picks(critical_tokens(signals, (initial.select,))["initial"]) == [[0]]
    # `everything` keeps tokens of a row too short for the fraction
    assert critical_tokens(signals_of(torch.rand(1, 3)), "everything")["critical"].all()


def test_a_short_text_keeps_as_many_tokens_a_strategy_as_asked():
    # rows of 25, 9, 2 and 0 tokens: a tenth of them is 2, 0, 0 and 0
    valid = torch.arange(25)[None] < torch.tensor([25, 9, 2, 0])[:, None]
    signals = signals_of(torch.rand(4, 25), torch.rand(4, 25), valid)
    masks = critical_tokens(signals, least=1)
    assert masks["initial"].sum(1).tolist() == masks["similarity"].sum(1).tolist() == [2, 1, 1, 0]
    assert masks["entropy_gradient"].sum(1).tolist() == [2, 1, 0, 0]  # of two tokens its window holds the first
    assert masks["critical"].sum(1).tolist() == [6, 3, 2, 0]
    assert critical_tokens(signals)["critical"].sum(1).tolist() == [6, 0, 0, 0]
    # eight tokens in the longest row: an error unless one is kept all the same
    short = signals_of(torch.rand(1, 8))
    with pytest.raises(ValueError, match="keeps 0 of 8 tokens"):
        critical_tokens(short)
    assert critical_tokens(short, least=1)["critical"].sum() == 3


def test_a_strategy_that_takes_a_window_receives_it():
    signals = signals_of(torch.tensor([[1.0, 2, 3, 4, 2, 4, 6, 8, 1, 1, 1, 1, 9, 1, 1, 1]]), layout=Layout.raster(4, 4))
    assert picks(critical_tokens(signals, "entropy_gradient")["critical"]) == [[11]]
    assert picks(critical_tokens(signals, "entropy_gradient", window=(0.0, 1.0))["critical"]) == [[14]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(critical_tokens, strategies=("simlarity",)), r"'simlarity'; did you mean 'similarity'\?"),
        (partial(critical_tokens, strategies=("complement",)), "unknown selection strategy 'complement'"),
        (partial(critical_tokens, strategies=("no_such_package:select",)), "no_such_package"),
        (partial(critical_tokens, strategies=("gcpo_trl.objective.signals:selekt",)), "selekt"),
        (partial(critical_tokens, strategies=()), "empty"),
        (partial(critical_tokens, strategies=("initial", "initial")), "differ from each other"),
        (
            partial(critical_tokens, strategies=lambda signals, eligible, count: eligible.float()),
            "returned torch.float32",
        ),
        (partial(critical_tokens, combine="both"), "'both'.*disjoint, union"),
        (partial(critical_tokens, fraction=0.0), "0 < fraction <= 1"),
        (partial(critical_tokens, fraction=1.5), "0 < fraction <= 1"),
        (partial(critical_tokens, fraction=0.4), "sum to 1.2 > 1"),
        (partial(critical_tokens, fraction=0.05), r"keeps 0 of 16 tokens; raise it to at least 0.0625"),
    ],
)
def test_errors_say_what_to_change(call, message):
    with pytest.raises(ValueError, match=message):
        call(signals_of(BUMP, layout=Layout.raster(4, 4)))


def test_the_advice_of_the_error_works():
    # 1/576 = .0017361..; rounded down it would again keep nothing
    signals = signals_of(torch.rand(1, 576))
    with pytest.raises(ValueError, match=r"at least 0\.001737"):
        critical_tokens(signals, "initial", fraction=0.001)
    assert critical_tokens(signals, "initial", fraction=0.001737)["critical"].sum() == 1


def test_a_batch_of_padding_only_is_not_an_error():
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert not critical_tokens(signals_of(torch.rand(2, 4), valid=nothing))["critical"].any()

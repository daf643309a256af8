"""Every file in gcpo_trl/objective/selection keeps the contract of a strategy. A new file is picked up by itself."""

import importlib
import inspect

import pytest
import torch

from gcpo_trl.objective.layout import Layout
from gcpo_trl.objective.signals import Signals
from gcpo_trl.plugins import available

PACKAGE = "gcpo_trl.objective.selection"
WRAPPERS = {"complement"}  # takes a selection, is not one
COUNTLESS = {"everything"}  # ignores `count` by definition
UNRANKED = {"random"}  # has no ties; its draw is tested in test_selection.py
LAYOUTS = [None, Layout.raster(5, 8), Layout(((1, 1), (2, 3), (3, 11)))]
NAMES = sorted(set(available(PACKAGE)) - WRAPPERS)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def select(name):
    return importlib.import_module(f"{PACKAGE}.{name}").select


def make_signals(layout=None):
    """Three rows of 40; with a layout, images; without one, texts of 40, 30 and 20 tokens."""
    generator = torch.Generator().manual_seed(7)
    entropy, similarity = torch.rand(3, 40, generator=generator), torch.rand(3, 40, generator=generator)
    lengths = torch.tensor([40, 40, 40] if layout else [40, 30, 20])
    valid = torch.arange(40)[None, :] < lengths[:, None]
    return Signals(entropy.requires_grad_(), similarity.requires_grad_(), valid, layout, generator)


def eligible_in(signals):
    """Every other valid token between the first and the last tenth, where a strategy with a window looks too."""
    position = torch.arange(40)[None, :]
    tokens = signals.valid.sum(dim=-1, keepdim=True)
    return signals.valid & (position >= tokens // 10) & (position < tokens * 9 // 10) & (position % 2 == 0)


def expected_count(name, count, eligible):
    there = eligible.sum(dim=-1)
    return there if name in COUNTLESS else torch.minimum(torch.as_tensor(count).expand(3), there)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [0, 1, 5, 39, [5, 0, 39]])
def test_exactly_count_and_only_eligible_tokens(name, select, layout, count):
    signals = make_signals(layout)
    eligible = eligible_in(signals)
    count = torch.tensor(count) if isinstance(count, list) else count
    critical = select(signals, eligible, count)
    assert critical.dtype == torch.bool
    assert critical.shape == (3, 40)
    assert not (critical & ~eligible).any()
    assert critical.sum(dim=-1).tolist() == expected_count(name, count, eligible).tolist()


def test_nothing_eligible_gives_nothing(select):
    signals = make_signals()
    assert not select(signals, torch.zeros_like(signals.valid), 5).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic_without_gradient_and_without_writing(select, layout):
    first, second = make_signals(layout), make_signals(layout)
    eligible = eligible_in(first)
    before = eligible.clone()
    critical = select(first, eligible, 5)
    assert torch.equal(critical, select(second, eligible, 5))
    assert not critical.requires_grad
    assert critical.data_ptr() != eligible.data_ptr()
    assert torch.equal(eligible, before)
    assert torch.equal(first.entropy, second.entropy)
    assert torch.equal(first.similarity, second.similarity)
    assert torch.equal(first.valid, second.valid)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNRANKED], indirect=True)
def test_ties_go_to_the_lower_index(name, select):
    signals = make_signals()
    flat = torch.zeros(3, 40)
    signals = Signals(flat, flat, signals.valid)
    eligible = eligible_in(signals)
    critical = select(signals, eligible, 2)
    chosen = [row.nonzero().flatten().tolist() for row in critical]
    there = [row.nonzero().flatten().tolist() for row in eligible]
    assert chosen == [row if name in COUNTLESS else row[:2] for row in there]


def test_the_arguments_are_named_as_the_contract_names_them(select):
    assert list(inspect.signature(select).parameters)[:3] == ["signals", "eligible", "count"]


def test_the_paper_and_the_controls_are_here():
    paper, controls = {"initial", "entropy_gradient", "similarity"}, {"random", "everything", "top_entropy"}
    assert paper | controls <= set(NAMES)

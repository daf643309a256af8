"""The benchmarks run, and what they count is what is there."""

import json

import pytest
import torch

from gcpo_trl.bench import loss, rollout, selection
from gcpo_trl.bench.measure import Operations, Report, Timing, interleave, peak_bytes
from gcpo_trl.bench.naive import select
from gcpo_trl.cli.main import main
from gcpo_trl.objective.layout import Layout
from gcpo_trl.objective.selection import critical_tokens
from gcpo_trl.objective.signals import Signals, group_similarity


def test_medians_and_ratios():
    report = Report("sums", {})
    report.timings = {"ours": Timing([3.0, 1.0, 2.0], [9.0] * 3), "peer": Timing([5.0, 4.0, 90.0], [9.0] * 3)}
    report.compare("ours", {"peer over ours": "peer"})
    assert report.ratios == {"peer over ours": 2.5} and report.timings["ours"].spread == (1.0, 3.0)
    report.load = [0.5, 1.5]
    assert "| peer over ours" not in report.table() and "| ratio: peer over ours | 2.5 |" in report.table()


def test_rounds_are_interleaved_after_one_that_does_not_count():
    calls, report = [], Report("order", {})
    interleave(report, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert all(len(timing.cpu) == 2 for timing in report.timings.values()) and len(report.load) == 2


def test_operations_are_counted_and_views_are_not():
    x = torch.arange(6.0).view(2, 3)
    with Operations() as seen:
        y = (x.t() @ x).view(9)  # one product
        y.add_(1)
        y.sum().item()  # a sum, and one wait
        y[y > 0]  # a comparison, an index, and another wait
        kept, _ = torch.zeros(4, 7), torch.zeros(4, 7) + 1
    assert (seen.kernels["mm"], seen.kernels["add_"], seen.kernels["sum"], seen.kernels["index"]) == (1, 1, 1, 1)
    assert seen.kernels["t"] == seen.kernels["view"] == 0 and seen.syncs == 2
    assert seen.alive(7) == 2 * kept.nbytes and seen.alive(8) == 0


def test_the_peak_is_over_the_floor():
    floor = torch.zeros(1_000_000)

    def work():
        one = floor + 1  # 4 MB
        two = one + 1  # 8 MB at once
        del one
        return (two[:250_000] + 1).sum()  # 5 MB

    assert peak_bytes(work) == pytest.approx(8e6, rel=0.01)


def test_a_token_costs_no_more_than_the_gate():
    # 24 layers; what is counted does not depend on their width.
    [size] = rollout.QUICK.values()
    counted = rollout.counters(rollout.build_policy(size), size)
    assert size.layers == 24 and counted["kernels a token"] <= 650  # 634
    assert counted["kernels a token"] < counted["kernels a token, reference"]
    assert counted["host syncs a token"] == counted["bytes of stored logits"] == 0
    assert counted["host syncs a token, plain loop"] >= 1 and counted["bytes of stored logits, plain loop"] > 0


def test_cell_by_cell_selects_what_the_strategies_select():
    group, side = 3, 5
    entropy, embeddings = torch.rand(group, side, side), torch.randn(group, side * side, 4)
    similarity = group_similarity(embeddings[None]).expand(group, -1)
    valid = torch.ones(group, side * side, dtype=torch.bool)
    signals = Signals(entropy.flatten(1), similarity, valid, Layout.raster(side, side))
    expected = critical_tokens(signals, fraction=0.2, window=(0.0, 1.0))["critical"]
    assert torch.equal(select(entropy, embeddings, 0.2), expected)


def test_selected_positions_need_less_memory():
    [report] = loss.run(quick=True, rounds=1)
    assert report.ratios["selected over all tokens, peak memory"] <= 0.5
    assert selection.run(quick=True, rounds=1)[0].ratios["cell by cell"] > 1


def test_the_command_writes_tables_and_json(tmp_path, capsys):
    assert main(["bench", "selection", "scale", "--quick", "--rounds", "1", "--json", str(tmp_path / "b.json")]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    names = [report["name"] for report in found["reports"]]
    assert names == ["selection", "scale, group", "scale, grid", "scale, codes"]
    out = capsys.readouterr().out
    assert "| cell by cell |" in out and "| ratio: group 4 over 2 |" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["speed"], "no benchmark 'speed'; choose from rollout"), (["loss", "--rounds", "0"], "at least 1")],
)
def test_a_mistake_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err

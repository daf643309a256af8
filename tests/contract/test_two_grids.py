"""A layout of two grids trains: each has an entropy gradient of its own, and cells are tinted in their own size."""

import dataclasses

import numpy as np
import torch
from PIL import Image
from tiny import TOKENS, janus_trainer, record

from gcpo_trl.monitoring.overlays import COLORS, OVERLAY_SHARE, overlay
from gcpo_trl.objective.layout import Layout
from gcpo_trl.objective.selection._ranking import highest
from gcpo_trl.objective.spatial import gradient_magnitude
from gcpo_trl.rollout import joined

TWO = Layout(((3, 3), (8, 9)))


def test_it_trains_on_gradients_within_each_grid(tiny_janus, tmp_path, monkeypatch):
    assert TWO.tokens == TOKENS
    monkeypatch.setattr("gcpo_trl.policies.janus.image_layout", lambda config: TWO)
    changes = {"select_strategies": ["entropy_gradient"], "select_window": [0.0, 1.0], "select_smoothing": False}
    trainer = janus_trainer(tiny_janus, tmp_path, select_fraction=[0.2], log_images=1, **changes)
    kept = record(trainer)
    trainer.train()
    entropy = trainer._rollout.entropy
    coarse, fine = entropy[:, :9].view(-1, 3, 3), entropy[:, 9:].view(-1, 8, 9)
    steep = torch.cat([gradient_magnitude(part).flatten(1) for part in (coarse, fine)], dim=1)
    expected = highest(steep, torch.ones_like(steep, dtype=torch.bool), 16)  # floor(0.2 * 81)
    assert torch.equal(kept.batches[0]["tool_mask"].bool(), expected) and expected[:, :9].any()
    assert all(torch.isfinite(gradient).all() for gradient in kept.gradients[0].values())
    assert (tmp_path / "images" / "step-000001.png").is_file()


def test_each_grid_tints_cells_of_its_own_size():
    # One coarse cell over the whole picture, and the lower right of 2 x 2 fine ones.
    masks = {"one": torch.tensor([[True, False, False, False, True]])}
    tinted = np.asarray(overlay(Image.new("RGB", (4, 4)), masks, Layout(((1, 1), (2, 2))), 0, tile=4), dtype=float)
    once = OVERLAY_SHARE / 2 * np.array(COLORS[0])
    twice = once + OVERLAY_SHARE / 2 * (np.array(COLORS[0]) - once)
    assert np.abs(tinted[:2, :2] - once).max() <= 0.5 and np.abs(tinted[2:, 2:] - twice).max() <= 0.5


def test_tokens_without_a_choice_never_train(tiny_janus, tmp_path, monkeypatch):
    # As a constraint would leave them: the last column of the 9 x 9 grid.
    ends = torch.arange(TOKENS) % 9 == 8
    monkeypatch.setattr(
        "gcpo_trl.trainer.rollouts.joined",
        lambda parts: dataclasses.replace(joined(parts), valid=(~ends).expand(4, -1)),
    )
    for strategies, trained in ((["everything"], 72), (["initial"], 7)):  # floor(0.1 * 72) = 7
        trainer = janus_trainer(tiny_janus, tmp_path, select_strategies=strategies)
        kept = record(trainer)
        trainer.train()
        mask = kept.batches[0]["tool_mask"].bool()
        assert not mask[:, ends].any() and (mask.sum(1) == trained).all()
        assert kept.batches[0]["num_items_in_batch"] == 4 * trained

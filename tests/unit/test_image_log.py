"""Grids of generated pictures: what is shown, how it is laid out, and what travels between ranks."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from gcpo_trl.monitoring import image_grids as image_log
from gcpo_trl.monitoring.image_grids import (
    ImageLog,
    Shown,
    due,
    fitted,
    placed,
    prompt_line,
    reward_line,
    save,
    send,
    sheet,
    shown_count,
)
from gcpo_trl.monitoring.overlays import enlarge, shrink
from gcpo_trl.objective.layout import Layout

RED = (255, 0, 0)


def solid(width, height, color=RED):
    return Image.new("RGB", (width, height), color)


def shown(masks=None, color=RED):
    return Shown(np.asarray(solid(10, 10, color)), "a photo", "reward 1.000", masks or {})


# when, and how many


def test_a_grid_is_due_once_at_each_multiple():
    assert [step for step in range(1, 8) if due(step, step - 1, every=3)] == [3, 6]
    assert all(due(step, step - 1, every=1) for step in (1, 2, 3))
    assert not due(3, 3, every=3)  # the second generation of one optimizer step


def test_a_grid_follows_late_where_a_step_draws_nothing():
    # Images are drawn for steps 1, 3, 5 and 7 only; 2, 4 and 6 are due.
    assert [step for step in (3, 5, 7) if due(step, step - 2, every=2)] == [3, 5, 7]
    assert [step for step in (3, 5, 7) if due(step, step - 2, every=4)] == [5]


@pytest.mark.parametrize(
    ("rows", "group", "count", "expected"),
    [
        (64, 4, 8, 8),  # two groups
        (64, 4, 7, 4),  # the second does not fit
        (4, 4, 8, 4),  # there is one
        (64, 16, 8, 8),  # half a group
    ],
)
def test_whole_groups_are_shown_and_never_more_than_asked(rows, group, count, expected):
    assert shown_count(rows, group, count) == expected


# pictures


def test_pictures_shrink_to_their_longest_side_and_keep_their_shape():
    assert shrink(solid(300, 200), 256).size == (256, 171)  # 200 x 256 / 300 = 170.7
    assert shrink(solid(384, 384), 256).size == (256, 256)
    assert shrink(solid(1000, 1), 100).size == (100, 1)
    small = solid(36, 36)
    assert shrink(small, 256) is small


def test_shrinking_averages():
    checks = Image.fromarray(np.array([[0, 200], [100, 100]], dtype=np.uint8))
    assert np.asarray(shrink(checks, 1)).tolist() == [[100]]


def test_enlarging_repeats_pixels():
    line = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
    assert np.asarray(enlarge(line, 4)).tolist() == [[7, 7, 9, 9]] * 2


# texts


def test_prompts_become_one_short_line():
    assert prompt_line("a photo\n of  a cat") == "a photo of a cat"
    long = prompt_line("x" * 500)
    assert long == "x" * 197 + "..."
    talk = [{"role": "system", "content": "draw"}, {"role": "user", "content": [{"type": "text", "text": "a cat"}]}]
    assert prompt_line(talk) == "a cat"
    assert prompt_line([{"role": "user", "content": "a dog"}]) == "a dog"


def test_rewards_are_weighted_and_none_is_left_out():
    nan = float("nan")
    assert reward_line(["a"], [0.5], [2.0]) == "reward 1.000"
    assert reward_line(["a", "b"], [0.5, 0.25], [1.0, 2.0]) == "reward 1.000: a 0.500, b 0.250"
    assert reward_line(["a", "b"], [nan, 0.25], [1.0, 2.0]) == "reward 0.500: a none, b 0.250"
    assert reward_line(["a"], [nan], [1.0]) == "reward none"


def test_a_line_is_cut_to_its_picture():
    draw = ImageDraw.Draw(solid(10, 10))
    assert fitted(draw, "short", 100) == "short"
    cut = fitted(draw, "w" * 100, 80)
    assert cut.endswith("w...") and draw.textlength(cut) <= 80 < draw.textlength("w" + cut)
    assert fitted(draw, "ein 猫", 100) == "ein ?"


# layout


def test_each_group_starts_a_new_line():
    # cells of 100 x 50, 6 apart; a group of 3 in 2 columns takes two lines, the group of 1 a third
    size, corners = placed([3, 1], (100, 50), columns=2)
    assert corners == [(6, 6), (112, 6), (6, 62), (6, 118)]
    assert size == (6 + 2 * 106, 6 + 3 * 56)


def test_columns_that_no_group_fills_take_no_room():
    assert placed([1], (100, 50), columns=4)[0] == (112, 62)


def test_a_sheet_shows_each_picture_beside_its_critical_tokens():
    first = np.array([True, False, False, False])
    rows = [shown({"initial": first}), shown({"initial": first}), shown({"initial": ~first}, (0, 0, 255))]
    page = sheet(rows, group=2, layout=Layout.raster(2, 2))
    # Tiles of 144; a cell is two of them 6 apart under two lines of 14: 294 x 172. Two lines; a legend of 2 x 16.
    assert page.size == (6 + 2 * 300, 6 + 2 * 178 + 32)
    assert page.getpixel((10, 6 + 28 + 4)) == RED
    # Luminance of red is 76; 0.4 x 76 + 0.6 x (230, 159, 0) in the upper left quarter, and nothing in the lower right.
    left, top = 6 + 150, 6 + 28
    assert page.getpixel((left + 4, top + 4)) == (168, 126, 30)
    assert page.getpixel((left + 140, top + 140)) == (76, 76, 76)
    assert page.getpixel((10, 6 + 178 + 28 + 4)) == (0, 0, 255)  # the second group, on a line of its own
    assert page.getpixel((310, 6 + 178 + 28 + 4)) == (255, 255, 255)


def test_without_critical_tokens_there_are_only_pictures():
    page = sheet([shown(), shown()], group=2, layout=Layout.raster(2, 2))
    assert page.size == (6 + 2 * 150, 6 + 178)


# what travels between ranks


def offered(monkeypatch, tmp_path, rank, group, count, complement=False):
    """What one of two ranks hands to the gather: 4 images each, of 32 x 16 pixels and 4 tokens."""
    gathered = []
    monkeypatch.setattr(image_log, "gather_object", lambda rows: gathered.extend(rows) or rows)
    args = SimpleNamespace(
        output_dir=str(tmp_path),
        log_images=1,
        log_images_count=count,
        log_images_size=8,
        select_complement=complement,
        report_to=[],
    )
    accelerator = SimpleNamespace(num_processes=2, process_index=rank, is_main_process=False)
    trainer = SimpleNamespace(
        args=args,
        accelerator=accelerator,
        num_generations=group,
        reward_func_names=["a"],
        reward_weights=torch.tensor([1.0]),
    )
    log = ImageLog(trainer)
    rewards = torch.arange(8.0)[:, None]
    critical = torch.tensor([[True, False, False, False]]).expand(4, -1)
    masks = {"initial": ~critical, "critical": critical}
    log.show(1, [solid(32, 16)] * 4, [f"prompt {rank} {row}" for row in range(4)], rewards, masks)
    log.show(1, [solid(32, 16)] * 4, ["again"] * 4, rewards, masks)  # a second generation of the step is not shown
    return gathered


@pytest.mark.parametrize(("group", "count", "expected"), [(4, 6, [4, 0]), (2, 6, [4, 2]), (8, 6, [4, 2])])
def test_ranks_send_only_what_is_shown(monkeypatch, tmp_path, group, count, expected):
    assert [len(offered(monkeypatch, tmp_path, rank, group, count)) for rank in (0, 1)] == expected


def test_what_is_sent_is_small_and_knows_its_place(monkeypatch, tmp_path):
    rows = offered(monkeypatch, tmp_path, rank=1, group=2, count=6)
    assert [(row.prompt, row.reward) for row in rows] == [
        ("prompt 1 0", "reward 4.000"),
        ("prompt 1 1", "reward 5.000"),
    ]
    for row in rows:
        assert type(row.picture) is np.ndarray and row.picture.dtype == np.uint8 and row.picture.shape == (4, 8, 3)
        assert {name: mask.tolist() for name, mask in row.masks.items()} == {"initial": [False, True, True, True]}
    assert list(tmp_path.iterdir()) == []  # another process writes


def test_under_the_complement_the_tokens_that_train_are_tinted(monkeypatch, tmp_path):
    row = offered(monkeypatch, tmp_path, rank=0, group=2, count=2, complement=True)[0]
    assert {name: mask.tolist() for name, mask in row.masks.items()} == {"complement": [True, False, False, False]}


# files and trackers


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "images" / "step-000001.png"
    save(solid(4, 4), path)
    before = path.read_bytes()
    assert Image.open(path).size == (4, 4)

    def broken(part, format):
        Path(part).write_bytes(b"half a file")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save(SimpleNamespace(save=broken), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["step-000001.png"]


class Tracker:
    """Stands for the module of wandb or trackio."""

    def __init__(self, run):
        self.run, self.logged = run, []
        self.Image, self.log = (lambda page: ("image", page.size)), self.logged.append


def test_every_tracker_in_use_gets_the_page(monkeypatch):
    wandb, trackio, added = Tracker(run="run"), Tracker(run=None), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    writer = SimpleNamespace(add_image=lambda name, array, step, dataformats: added.append((name, array.shape, step)))
    send(solid(6, 4), 12, ["wandb", "trackio"], writer)
    expected = [{"gcpo/images": ("image", (6, 4)), "train/global_step": 12}]
    assert wandb.logged == trackio.logged == expected
    assert added == [("gcpo/images", (4, 6, 3), 12)]
    wandb.run = None  # switched off by WANDB_DISABLED
    send(solid(6, 4), 13, ["wandb"], None)
    send(solid(6, 4), 13, [], None)
    assert wandb.logged == trackio.logged == expected

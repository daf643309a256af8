"""The card of a trained image policy: what it says, and that it says it of this run."""

from types import SimpleNamespace

from huggingface_hub import ModelCard
from PIL import Image

from gcpo_trl.monitoring.model_card import SETTINGS, measures, usage, write_card

ABOUT = {"name": "mine", "repository": "me/mine", "dataset": "shapes", "tags": ["art"]}
HISTORY = [
    {"reward": 0.25, "loss": 3.0, "gcpo/held_out/shapes": 0.5},
    {"reward": 0.5},
    {"reward": 0.75, "gcpo/held_out/shapes": 0.625, "gcpo/held_out/sharpness": 12.0},
]


def settings(**changes):
    return SimpleNamespace(**{key: key.upper() for key in SETTINGS} | {"rollout_guidance_scale": 5.0} | changes)


def test_a_card_names_method_settings_and_measures(tmp_path):
    (tmp_path / "images").mkdir()
    for step, colour in ((1, "red"), (12, "blue")):
        Image.new("RGB", (2, 2), colour).save(tmp_path / "images" / f"step-{step:06d}.png")
    file = write_card(tmp_path, settings(), HISTORY, "deepseek/Janus", False, ABOUT)
    card = ModelCard.load(file)
    assert (card.data.base_model, card.data.library_name, card.data.pipeline_tag) == (
        "deepseek/Janus",
        "transformers",
        "text-to-image",
    )
    assert card.data.tags == ["art", "gcpo", "trl"] and card.data.datasets == "shapes"
    assert "# mine" in card.content and "Fine-tuned from `deepseek/Janus` on shapes" in card.content
    assert "| `weight_clip` | `WEIGHT_CLIP` |" in card.content
    assert "| `reward` | 0.25 | 0.75 |" in card.content
    assert "![samples of the last logged step](samples.png)" in card.content
    assert Image.open(tmp_path / "samples.png").getpixel((0, 0)) == (0, 0, 255)
    assert not list(tmp_path.glob("*.partial"))


def test_an_adapter_is_drawn_with_on_its_base(tmp_path):
    about = ABOUT | {"repository": None, "dataset": None}
    card = ModelCard.load(write_card(tmp_path / "out", settings(), [], "base", True, about))
    assert card.data.library_name == "peft" and "A LoRA adapter of `base` with Group" in card.content
    assert f"gcpo sample --model base --adapter {tmp_path / 'out'} --guidance-scale 5 --prompt" in card.content
    assert "Nothing was logged." in card.content and "samples.png" not in card.content


def test_measures_are_the_first_and_the_last_that_were_logged():
    lines = measures(HISTORY).splitlines()[2:]
    assert lines == [
        "| `gcpo/held_out/shapes` | 0.5 | 0.625 |",
        "| `gcpo/held_out/sharpness` | 12 | 12 |",
        "| `reward` | 0.25 | 0.75 |",
    ]


def test_the_command_draws_with_the_guidance_of_training():
    assert "gcpo sample --model me/mine --guidance-scale 1.5 --prompt" in usage("me/mine", "base", False, 1.5)

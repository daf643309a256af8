"""A mistake is an error before any weight is loaded, and says what was seen and what to write instead."""

import pytest
import trl.trainer.grpo_trainer as grpo
from datasets import Dataset
from tiny import PROMPTS, build_janus, build_processor, digits, janus_trainer, load_janus, settings, shape_prompts
from transformers import CLIPConfig, JanusConfig, JanusForConditionalGeneration
from trl import GRPOConfig

from gcpo_trl import GCPOTrainer


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a model is an error of the test."""

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded before the mistake was seen")

    monkeypatch.setattr(grpo, "create_model_from_path", load)


CAPTIONS = Dataset.from_dict({"caption": PROMPTS})
PICTURES = Dataset.from_dict({"prompt": PROMPTS, "images": ["a.png", "b.png"]})
CATS, UNICORNS = (
    Dataset.from_dict(
        {
            "prompt": PROMPTS,
            "metadata": [f'{{"tag": "counting", "include": [{{"class": "{name}", "count": 1}}]}}', None],
        }
    )
    for name in ("cat", "unicorn")
)
MISTAKES = [
    ({"dataset": CAPTIONS}, ValueError, "columns .'caption'. but no 'prompt'; rename"),
    ({"dataset": PICTURES}, ValueError, "column 'images'.*'reference_image'"),
    ({"evaluated": CAPTIONS}, ValueError, "no 'prompt'"),
    ({"use_vllm": True}, ValueError, "use_vllm=True, but janus draws images.*set it to False"),
    ({"mask_truncated_completions": True}, ValueError, "mask_truncated_completions=True.*set it to False"),
    ({"select_fraction": 0.01}, ValueError, "select_fraction=0.01 keeps 0 of 81 tokens; raise it to at least 0.0123"),
    ({"log_images": -1}, ValueError, "log_images=-1 must be >= 0"),
    ({"log_images": True}, TypeError, "log_images=True is no whole number; write the steps"),
    ({"reward": "shape"}, ValueError, "no 'shape'; did you mean 'shapes'"),
    ({"reward": [digits, "genevl"]}, ValueError, "no 'genevl'; did you mean 'geneval'"),
    ({"reward": None}, TypeError, "pass a name, a path or a function"),
    ({"reward": "ocr"}, ValueError, "quotes no text; put what the picture should say in double quotes"),
    ({"reward": "reward_funcs.geneval:strict", "dataset": UNICORNS}, ValueError, "class='unicorn' is unknown"),
    ({"reward": "geneval", "dataset": CATS, "evaluated": {"cats": CATS, "rare": UNICORNS}}, ValueError, "'unicorn'"),
    (
        {"reward": "geneval", "dataset": Dataset.from_dict({"prompt": PROMPTS})},
        ValueError,
        "reads the column 'metadata'",
    ),
    ({"num_generations": 3}, ValueError, "divisible"),
    ({"select_strategies": ["initail"]}, ValueError, "'initail'; did you mean 'initial'"),
]


@pytest.mark.parametrize(("change", "error", "words"), MISTAKES, ids=lambda value: str(value)[:50])
def test_a_mistake_is_seen_before_weights_are_loaded(tiny_janus, tmp_path, no_weights, change, error, words):
    with pytest.raises(error, match=words):
        janus_trainer(tiny_janus, tmp_path, **change)


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_features_of_conversations_are_refused(tiny_janus, tmp_path, no_weights, name):
    with pytest.raises(ValueError, match=f"{name} is for text models"):
        GCPOTrainer(tiny_janus, digits, settings(tmp_path), shape_prompts(), **{name: [print]})


def test_a_folder_that_does_not_exist_is_named(tmp_path, no_weights):
    with pytest.raises(OSError, match="no_such_model"):
        janus_trainer(str(tmp_path / "no_such_model"), tmp_path)


def test_a_checkpoint_of_another_class_is_named(tmp_path, no_weights):
    CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a CLIPModel, which generates nothing; give a Janus"):
        janus_trainer(str(tmp_path), tmp_path)


def test_a_grid_that_contradicts_the_decoder_is_refused(tiny_janus, tmp_path, no_weights):
    config = JanusConfig.from_pretrained(tiny_janus)
    config.vision_config.num_image_tokens = 80
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"80 image tokens .* 9x9 grid; set vision_config.num_image_tokens"):
        janus_trainer(str(tmp_path), tmp_path)


def test_something_that_is_no_model_is_refused(tmp_path, no_weights):
    with pytest.raises(TypeError, match="model is a dict; pass a path, a hub id or a transformers model"):
        janus_trainer({}, tmp_path)


def test_a_model_in_memory_needs_its_processor(tmp_path):
    with pytest.raises(ValueError, match=r"never saved.*pass processing_class"):
        janus_trainer(build_janus(), tmp_path)


def test_a_tokenizer_in_place_of_the_processor_is_refused(tmp_path):
    with pytest.raises(TypeError, match="an image policy needs the whole processor"):
        janus_trainer(build_janus(), tmp_path, processor=build_processor().tokenizer)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ([1.0], ValueError, "'made_up' returned 1 rewards for 4 images"),
        ([1.0, "good", 0.0, 0.0], TypeError, "'made_up' gave 'good' for image 1"),
        ([1.0, float("nan"), 0.0, 0.0], ValueError, "'made_up' gave nan for image 1"),
    ],
)
def test_a_reward_that_answers_nonsense_stops_the_first_step(tiny_janus, tmp_path, answer, error, words):
    def made_up(prompts, completions, **columns):
        return answer

    trainer = janus_trainer(tiny_janus, tmp_path, reward=made_up)
    with pytest.raises(error, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


def test_without_settings_the_run_is_named_after_the_model(tiny_janus, tmp_path, monkeypatch):
    # The defaults ask for bf16, which a CPU has not; where they come from is what matters here.
    monkeypatch.setattr("gcpo_trl.trainer.gcpo_trainer.GCPOConfig", lambda name: settings(tmp_path / name))
    trainer = GCPOTrainer(tiny_janus, digits, train_dataset=shape_prompts())
    assert trainer.args.output_dir == str(tmp_path / "tiny-janus-GCPO")


def test_a_plain_config_trains_images_on_all_tokens(tiny_janus, tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = GCPOTrainer(tiny_janus, digits, args, shape_prompts())
    trainer.train()
    log = trainer.state.log_history[0]
    assert trainer.ref_model is None and not any(key.startswith(("gcpo/select", "gcpo/weight")) for key in log)
    assert float(log["grad_norm"]) > 0


def test_a_trained_model_loads_as_any_janus(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    model, processor = load_janus(str(tmp_path / "final"))
    assert isinstance(model, JanusForConditionalGeneration) and processor.num_image_tokens == 81
    saved, kept = model.state_dict(), trainer.model.state_dict()
    assert all((saved[name] == kept[name]).all() for name in kept)

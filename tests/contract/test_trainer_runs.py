"""GCPOTrainer around the loss: what moves, evaluation, text, checkpoints, logs, and broken numbers."""

import importlib

import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import (
    PROMPTS,
    TOKENS,
    build_janus,
    digits,
    janus_trainer,
    load_janus,
    record,
    redness,
    settings,
    shape_prompts,
    text_prompts,
)
from torch.testing import assert_close
from transformers import AutoProcessor, JanusForConditionalGeneration, TrainerCallback

from gcpo_trl import GCPOTrainer
from gcpo_trl.rollout import Sampling, chunks, sample
from gcpo_trl.runs.build import build_trainer
from gcpo_trl.runs.recipe import parse
from gcpo_trl.shapes.build import build_processor


def moved(model, path):
    """First two parts of the name of every parameter that is not as it was saved."""
    before, after = load_janus(path)[0].state_dict(), model.state_dict()
    return {".".join(name.split(".")[:2]) for name in before if not torch.equal(before[name], after[name])}


def images_of(kept):
    """The images of a run as tuples of tokens, batch by batch."""
    return [[tuple(row) for row in batch["completion_ids"].tolist()] for batch in kept.batches]


class Poison(TrainerCallback):
    """Breaks a parameter before an update."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan


# what trains


def test_only_the_language_model_moves(tiny_janus, tmp_path, caplog):
    caplog.set_level("INFO", logger="gcpo_trl")
    trainer = janus_trainer(tiny_janus, tmp_path)
    count = sum(p.numel() for p in trainer.model.model.language_model.parameters())
    assert f"training {count:,} of" in caplog.text and f"(language_model {count:,})" in caplog.text
    assert "vision_model" in caplog.text.partition("frozen: ")[2]
    trainer.train()
    assert moved(trainer.model, tiny_janus) == {"model.language_model"}
    assert moved(trainer.ref_model, tiny_janus) == set()


def test_named_modules_move(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, train_modules=["generation_head", "generation_aligner"])
    trainer.train()
    assert moved(trainer.model, tiny_janus) == {"model.generation_head", "model.generation_aligner"}


def test_dr_grpo_divides_by_the_tokens_of_an_image(tiny_janus, tmp_path):
    # TRL's dr_grpo normaliser is max_completion_length, 256 by default, which is no image's length.
    trainer = janus_trainer(tiny_janus, tmp_path, loss_type="dr_grpo")
    assert trainer.max_completion_length == TOKENS


def test_an_unknown_module_gives_the_nearest(tiny_janus, tmp_path):
    with pytest.raises(
        ValueError, match=r"train_modules has 'language'; did you mean 'language_model'.*generation_head"
    ):
        janus_trainer(tiny_janus, tmp_path, train_modules=["language"])


def test_a_model_in_memory_has_its_reference_copied(tmp_path):
    model = build_janus(seed=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = janus_trainer(model, tmp_path, processor=build_processor(), max_steps=2)
    assert trainer.model is model and trainer.ref_model is not model
    kept = record(trainer)
    trainer.train()
    after, reference = model.state_dict(), trainer.ref_model.state_dict()
    assert all(torch.equal(reference[name], before[name]) for name in before)
    assert not torch.equal(after["model.language_model.norm.weight"], before["model.language_model.norm.weight"])
    assert all(torch.tensor(kept.losses).isfinite())
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_rewards_see_pictures_prompts_and_columns(tiny_janus, tmp_path):
    seen = {}

    def look(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return redness(prompts, completions)

    trainer = janus_trainer(tiny_janus, tmp_path, reward=[look, "shapes"], reward_weights=[1.0, 0.0])
    trainer.train()
    assert all(isinstance(image, Image.Image) and image.size == (36, 36) for image in seen["completions"])
    assert sorted(seen["prompts"]) == sorted(PROMPTS * 2)
    assert all("include" in described for described in seen["columns"]["metadata"])
    log = trainer.state.log_history[0]
    assert_close(log["rewards/look/mean"], sum(redness(None, seen["completions"])) / 4, rtol=0, atol=1e-6)
    assert 0 <= log["rewards/shapes/mean"] <= 1


# evaluation and seeds


@pytest.mark.parametrize("start", ["trainer", "recipe"])
def test_rewards_are_placed_before_one_loads(tiny_janus, tmp_path, monkeypatch, start):
    monkeypatch.setenv("GCPO_REWARD_DEVICE", "cuda:7")  # which the setting overrules
    lines = ["from reward_funcs.runtime import reward_device", "DEVICE = reward_device('auto')", "reward = len"]
    (tmp_path / f"of_{start}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    if start == "trainer":
        janus_trainer(tiny_janus, tmp_path, reward=f"of_{start}:reward", reward_device="cpu")
    else:
        words = ["--model_name_or_path", tiny_janus, "--output_dir", str(tmp_path), "--reward_device", "cpu"]
        batch = ["--per_device_train_batch_size", "4", "--num_generations", "2", "--dataset_size", "8"]
        run = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--reward_funcs", f"of_{start}:reward"]
        build_trainer(*parse([*words, *batch, *run]))
    assert importlib.import_module(f"of_{start}").DEVICE == "cpu"


def test_evaluation_draws_the_same_images_every_time(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, evaluated=shape_prompts(3), num_generations_eval=2)
    kept = record(trainer)
    first, second = trainer.evaluate(), trainer.evaluate()
    images = images_of(kept)
    assert len(images) == 4 and images[:2] == images[2:]
    assert first["eval_reward"] == second["eval_reward"] and first["eval_loss"] == second["eval_loss"]
    assert len({*images[0], *images[1]}) == 6  # 3 prompts, 2 images each, none twice
    assert trainer.model.training is False


def test_training_images_do_not_depend_on_evaluation(tiny_janus, tmp_path, monkeypatch):
    drawn = []

    def draw_and_tell(policy, prompts, seed, indices, sampling, progress):
        drawn.append([(seed, index) for index in indices])
        return chunks(policy, prompts, seed, indices, sampling)

    monkeypatch.setattr("gcpo_trl.trainer.rollouts.chunks", draw_and_tell)
    alone = record(first := janus_trainer(tiny_janus, tmp_path / "a", max_steps=2))
    first.train()
    between = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2}
    second = janus_trainer(tiny_janus, tmp_path / "b", max_steps=2, evaluated=shape_prompts(2), **between)
    kept = record(second)
    second.train()
    train, _, train_again, _ = images_of(kept)
    assert [train, train_again] == images_of(alone)
    numbers = drawn[2:]  # of the second run: step, evaluation, step, evaluation
    assert numbers[1] == numbers[3]
    assert len({*numbers[0], *numbers[1], *numbers[2]}) == 12  # nothing shares its random numbers


def test_resuming_at_a_step_is_the_same_run(tiny_janus, tmp_path):
    whole = janus_trainer(tiny_janus, tmp_path / "whole", max_steps=2)
    whole.train()
    first = janus_trainer(tiny_janus, tmp_path / "parts", max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    again = janus_trainer(tiny_janus, tmp_path / "parts", max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-1"))
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gradient_checkpointing_changes_nothing(tiny_janus, tmp_path):
    results = []
    for checkpointing in (False, True):
        trainer = janus_trainer(tiny_janus, tmp_path, max_steps=2, gradient_checkpointing=checkpointing)
        trainer.train()
        results.append(trainer.model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_mixed_precision_scores_what_it_draws(tiny_janus, tmp_path):
    # Weights are fp32; were only the scoring in bf16, the images would come from another policy.
    trainer = janus_trainer(tiny_janus, tmp_path, bf16=True, rollout_guidance_scale=1.0)
    kept = record(trainer)
    trainer.train()
    assert next(trainer.model.parameters()).dtype == torch.float32
    distance = (kept.batches[0]["ref_per_token_logps"] - trainer._rollout.logps).abs()
    assert 0 < distance.mean() < 0.02
    exact = janus_trainer(tiny_janus, tmp_path, bf16=False, rollout_guidance_scale=1.0)
    exact.train()
    assert not torch.equal(exact._rollout.logps, trainer._rollout.logps)


def test_a_checkpoint_draws_in_plain_transformers(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, rollout_guidance_scale=3.0)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved")
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    text = trainer.policy._template(PROMPTS[0])
    inputs = processor(text=[text], generation_mode="image", return_tensors="pt")
    drawn = model.generate(**inputs, generation_mode="image", do_sample=False)
    greedy = sample(trainer.policy, PROMPTS[:1], 0, [0], Sampling(guidance_scale=3.0, temperature=0))
    assert torch.equal(drawn, greedy.tokens)


def test_the_rollout_batch_changes_nothing(tiny_janus, tmp_path):
    runs = []
    for size in (0, 1):
        trainer = janus_trainer(tiny_janus, tmp_path, rollout_batch_size=size)
        runs.append(record(trainer))
        trainer.train()
    assert images_of(runs[0]) == images_of(runs[1])


def test_conversations_are_prompts_too(tiny_janus, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    plain = record(first := janus_trainer(tiny_janus, tmp_path, dataset=shape_prompts(2)))
    first.train()
    kept = record(second := janus_trainer(tiny_janus, tmp_path, dataset=Dataset.from_list(rows)))
    second.train()
    assert images_of(kept) == images_of(plain)


# text


def test_a_text_model_trains_on_critical_tokens_and_never_on_padding(tiny_text, tmp_path):
    def variety(prompts, completions, **columns):
        return [float(len(set(completion.split()))) for completion in completions]

    args = settings(tmp_path, max_steps=3, max_completion_length=12, select_fraction=0.25, num_generations=4)
    trainer = GCPOTrainer(tiny_text, [variety], args, text_prompts())
    kept = record(trainer)
    trainer.train()
    valid = torch.cat([batch["completion_mask"].sum(1) for batch in kept.batches])
    assert valid.min() < 12 <= valid.max()  # some end early
    for batch in kept.batches:
        critical, mask = batch["tool_mask"].bool(), batch["completion_mask"].bool()
        assert not (critical & ~mask).any()
        assert torch.equal(critical.sum(1), 3 * (mask.sum(1) // 4))
        assert batch["num_items_in_batch"] == critical.sum()
    assert all(torch.tensor(kept.losses).isfinite())
    assert any(gradient.abs().sum() > 0 for gradient in kept.gradients[0].values())
    log = trainer.state.log_history[0]
    assert 0 < log["gcpo/select/fraction"] <= 0.75 and log["gcpo/entropy/all"] > 0


# broken numbers


def test_nan_in_the_weights_stops_the_rollout_with_step_and_module(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, max_steps=3)
    trainer.add_callback(Poison(step=1))
    with pytest.raises(
        FloatingPointError,
        match=r"step 1: .*non-finite logits at image token 0 of 81; "
        r"parameter model.language_model.layers.1.mlp.up_proj.weight is not finite",
    ):
        trainer.train()


def test_nan_in_the_loss_stops_the_run_and_leaves_the_last_checkpoint(tiny_janus, tmp_path):
    # The second update reuses the first one's images, so the loss is what meets the broken weight.
    saving = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "max_steps": 3}
    trainer = janus_trainer(tiny_janus, tmp_path, **saving)
    trainer.add_callback(Poison(step=1))
    with pytest.raises(
        FloatingPointError,
        match=r"step 1: the loss is nan; parameter model.language_model.layers.1.mlp.up_proj.weight is not finite",
    ):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    model, _ = load_janus(str(tmp_path / "checkpoint-1"))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    again = janus_trainer(tiny_janus, tmp_path, **(saving | {"save_strategy": "no", "max_steps": 2}))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2


# logs


def test_completions_are_logged_as_text(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, log_completions=True, max_steps=2)
    trainer.train()
    tables = sorted((tmp_path / "completions").glob("*.parquet"))
    assert len(tables) == 2
    table = pd.read_parquet(tables[1])
    assert table["completion"].tolist() == [f"image {index} of step 1" for index in range(4, 8)]
    assert {"step", "prompt", "completion", "digits", "advantage"} <= set(table.columns)
    assert set(table["prompt"]) <= set(PROMPTS)


def test_metrics_are_logged_under_their_rooms(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, reward=digits)
    trainer.train()
    log = trainer.state.log_history[0]
    for name in ("gcpo/select/fraction", "gcpo/weight/mean", "gcpo/entropy/all", "gcpo/rollout/tokens_per_s"):
        assert isinstance(log[name], float), name
    for name in ("initial", "entropy_gradient", "similarity"):
        assert_close(log[f"gcpo/select/{name}"], 8 / 81, rtol=0, atol=1e-6)
    assert_close(log["gcpo/entropy/all"], trainer._rollout.entropy.mean().item(), rtol=1e-5, atol=0)
    # Two prompts of two images: one pair each, of 81 tokens.
    first, second, third, fourth = trainer._rollout.tokens
    differ = (first != second).sum() + (third != fourth).sum()
    assert 0 < differ < 162
    assert_close(log["gcpo/diversity/disagreement"], differ.item() / 162, rtol=0, atol=1e-6)

"""GCPOTrainer in GRPOTrainer's place on text, critical tokens and weight on: what GRPOTrainer takes, it takes too."""

import asyncio
import importlib.util
import inspect
import re

import pytest
import torch
import trl.trainer.grpo_trainer
from tiny import record, text_prompts, text_trainer, variety
from torch.testing import assert_close
from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification
from trl import GRPOTrainer

import gcpo_trl.trainer
from gcpo_trl import GCPOTrainer

LOSS_TYPES = ["bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo"]
FEW = {"select_fraction": 0.2, "max_completion_length": 12}


# rewards


def test_a_model_rewards_beside_functions_that_wait(tiny_text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_text)
    torch.manual_seed(1)
    judge = LlamaForSequenceClassification(AutoConfig.from_pretrained(tiny_text, num_labels=1)).eval()
    judge.config._name_or_path = ""  # so its tokenizer is the one it is given
    texts, matched = [], []

    async def slow(prompts, completions, completion_ids, **columns):
        await asyncio.sleep(0)
        matched.append(completions == tokenizer.batch_decode(completion_ids, skip_special_tokens=True))
        texts.extend(prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
        return variety(prompts, completions)

    trainer = text_trainer(
        tiny_text, tmp_path, [judge, slow, variety], reward_processing_classes=[tokenizer, None, None], args=FEW
    )
    trainer.train()
    with torch.no_grad():
        ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
        expected = torch.cat([judge(**one).logits[0] for one in ids])
    assert_close(trainer._rewards[:, 0], expected, rtol=0, atol=1e-5)
    assert matched == [True] and expected.std() > 0 and trainer._rewards[:, 1].std() > 0
    assert torch.equal(trainer._rewards[:, 1], trainer._rewards[:, 2])


def test_rewards_that_are_each_for_some_rows_train_as_in_grpo(tiny_text, tmp_path):
    def first(completions, **columns):
        return [0.0, 1.0, None, None]

    def second(completions, **columns):
        return [None, None, 2.0, 5.0]

    args = FEW | {"scale_rewards": "none"}
    for missing, advantages in ((None, [-0.5, 0.5, -1.5, 1.5]), ("skip", [0.0] * 4)):
        trainer = text_trainer(tiny_text, tmp_path, [first, second], args=args | {"reward_missing": missing})
        kept = record(trainer)
        trainer.train()
        assert kept.batches[0]["advantages"].tolist() == advantages


# critical tokens, weight and loss


def test_padding_of_any_kind_is_never_critical(tiny_text, tmp_path):
    args = {"max_steps": 3, "max_completion_length": 14, "pad_to_multiple_of": 8, "select_fraction": 1 / 3}
    trainer = text_trainer(tiny_text, tmp_path, args=args)
    kept = record(trainer)
    trainer.train()
    masks = [(batch["tool_mask"], batch["completion_mask"]) for batch in kept.batches]
    assert all(critical.shape[1] % 8 == 0 for critical, _ in masks)
    assert any(valid.sum(1).min() < 14 for _, valid in masks)  # some end early
    assert not any((critical > valid).any() for critical, valid in masks)
    assert all(critical.any(1).all() for critical, _ in masks)
    assert all(batch["num_items_in_batch"] == batch["tool_mask"].sum() for batch in kept.batches)


def test_loss_types_are_all_that_trl_knows():
    cases = re.findall(r"self\.loss_type (?:==|in) (.*?):", inspect.getsource(GRPOTrainer._compute_loss))
    assert sorted(set(re.findall(r'"(\w+)"', " ".join(cases)))) == LOSS_TYPES


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_only_critical_tokens_move_the_policy(tiny_text, tmp_path, loss_type):
    seen = []
    args = {"loss_type": loss_type, "per_device_train_batch_size": 8, "select_fraction": 0.2}
    trainer = text_trainer(tiny_text, tmp_path, args=args)
    score, loss = trainer._get_per_token_logps_and_entropies, trainer._compute_loss

    def scored(*args, **kwargs):
        scores = score(*args, **kwargs)
        if scores[0].requires_grad:
            scores[0].retain_grad()
            seen[-1]["logps"] = scores[0]
        return scores

    def computed(model, inputs):
        seen.append(inputs | {})
        return loss(model, inputs)

    trainer._get_per_token_logps_and_entropies, trainer._compute_loss = scored, computed
    trainer.train()
    (inputs,) = seen
    moved, critical = inputs["logps"].grad != 0, inputs["tool_mask"].bool()
    assert (inputs["advantages"] != 0).any()
    assert torch.equal(moved, critical & (inputs["advantages"] != 0)[:, None])


def test_a_second_iteration_weighs_the_same_tokens_anew(tiny_text, tmp_path):
    args = FEW | {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.1, "per_device_train_batch_size": 8}
    trainer = text_trainer(tiny_text, tmp_path, args=args)
    kept = record(trainer)
    trainer.train()
    assert len(kept.batches) == 1
    assert [batch["advantages"].shape for batch in trainer._buffered_inputs] == [(8,)]  # the weight did not stay there
    first, second = (entry["gcpo/weight/mean"] for entry in trainer.state.log_history[:2])
    assert first == 1.0 and abs(second - 1.0) > 1e-4
    assert kept.losses[0] != kept.losses[1]


def test_completions_of_eight_tokens_train_with_the_published_settings(tiny_text, tmp_path):
    trainer = text_trainer(tiny_text, tmp_path, args={"max_completion_length": 8})
    kept = record(trainer)
    trainer.train()
    lengths = kept.batches[0]["completion_mask"].sum(1)
    assert lengths.max() == 8  # a tenth of which is no whole token
    assert torch.equal(kept.batches[0]["tool_mask"].sum(1), lengths.clamp(max=3))


@pytest.mark.parametrize(
    ("strategies", "forwards", "logged"),
    [(["initial"], 0, False), (["random", "similarity"], 0, False), (["initial", "top_entropy"], 1, True)],
)
def test_entropy_is_computed_only_where_a_strategy_reads_it(tiny_text, tmp_path, strategies, forwards, logged):
    """Forward passes over whole texts beyond those of GRPOTrainer; the sampler's run one token at a time."""

    def passes(trainer):
        count = []
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: count.append(1) if "labels" in kwargs else None, with_kwargs=True
        )
        trainer.train()
        return len(count)

    args = {"select_strategies": strategies, "weight_form": "none", "select_fraction": 0.2}
    ours = text_trainer(tiny_text, tmp_path, args=args)
    theirs = passes(text_trainer(tiny_text, tmp_path, grpo=True))
    assert theirs > 0 and passes(ours) == theirs + forwards
    assert ("gcpo/entropy/all" in ours.state.log_history[0]) is logged


def test_similarity_is_computed_only_where_a_strategy_reads_it(tiny_text, tmp_path, monkeypatch):
    counted, similarity = [], gcpo_trl.trainer.critical_tokens.group_similarity_from_ids
    monkeypatch.setattr(
        gcpo_trl.trainer.critical_tokens,
        "group_similarity_from_ids",
        lambda *args: counted.append(1) or similarity(*args),
    )
    for strategy, times in (("top_entropy", 0), ("similarity", 1)):
        counted.clear()
        text_trainer(tiny_text, tmp_path, args={"select_strategies": [strategy]}).train()
        assert len(counted) == times


def test_every_metric_of_grpo_is_logged_and_those_of_gcpo(tiny_text, tmp_path):
    args = {"beta": 0.04, "max_steps": 2, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1}
    theirs = text_trainer(tiny_text, tmp_path, grpo=True, args=args, eval_dataset=text_prompts(2))
    ours = text_trainer(tiny_text, tmp_path, args=args | FEW, eval_dataset=text_prompts(2))
    theirs.train()
    ours.train()
    assert len(ours.state.log_history) == len(theirs.state.log_history)
    for mine, original in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert set(original) <= set(mine)
    log, evaluated = ours.state.log_history[:2]
    for name in ("initial", "entropy_gradient", "similarity", "fraction"):
        assert 0 < log[f"gcpo/select/{name}"] <= 1 and 0 < evaluated[f"eval_gcpo/select/{name}"] <= 1
    assert log["gcpo/entropy/all"] > 0 and log["gcpo/weight/mean"] == 1.0


# what is left to GRPOTrainer


def test_a_loss_that_is_no_number_goes_on_as_in_grpo(tiny_text, tmp_path, monkeypatch):
    compute = GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda *args: compute(*args) * torch.nan)
    trainer = text_trainer(tiny_text, tmp_path, args=FEW)
    kept = record(trainer)
    trainer.train()
    assert trainer.state.global_step == 1 and torch.tensor(kept.losses).isnan().all()


def test_a_trainer_made_without_init_generates_as_grpo_does(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda self, prompts: ("theirs", prompts))
    assert object.__new__(GCPOTrainer)._generate(["a prompt"]) == ("theirs", ["a prompt"])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed, so it is not missed")
def test_without_vllm_the_error_is_trls(tiny_text, tmp_path):
    args = {"use_vllm": True, "vllm_mode": "colocate"}
    errors = []
    for grpo in (True, False):
        with pytest.raises(ImportError, match="vLLM") as caught:
            text_trainer(tiny_text, tmp_path, grpo=grpo, args=args)
        errors.append((str(caught.value), caught.traceback[-1].path))
    assert errors[0] == errors[1]


def test_vllm_receives_the_same_arguments_and_its_tokens_train(tiny_text, tmp_path, monkeypatch):
    class Served:
        """In vLLM's place: keeps what it was made with, and says what it is told to."""

        def __init__(self, **options):
            made.append({k: v for k, v in options.items() if k not in ("model", "accelerator", "processing_class")})

        def sync_weights(self):
            synced.append(1)

        def generate(self, prompts, images, num_generations, profiler):
            ids = [[5 + row, 6, 7, 8, 9, 2] for row in range(len(prompts))]
            return prompts, ids, [[[-3.0]] * 6 for _ in prompts], None

    made, synced = [], []
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", Served)
    args = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.125,
        "vllm_tensor_parallel_size": 1,
        "vllm_max_model_length": 48,
        "temperature": 0.75,
        "top_k": 5,
        "repetition_penalty": 1.25,
        "generation_kwargs": {"seed": 3},
    }
    text_trainer(tiny_text, tmp_path, grpo=True, args=args)
    trainer = text_trainer(tiny_text, tmp_path, args=args | {"select_fraction": 0.2})
    assert made[1] == made[0]
    assert made[1]["gpu_memory_utilization"] == 0.125 and made[1]["generation_kwargs"] == {"seed": 3}
    kept = record(trainer)
    trainer.train()
    batch = kept.batches[0]
    assert synced and batch["completion_ids"][:, 0].tolist() == [5, 6, 7, 8]
    assert batch["tool_mask"].sum(1).tolist() == [3] * 4  # one of six a strategy
    assert (batch["importance_sampling_ratio"] != 1).any()  # TRL's correction for the tokens of another engine
    assert torch.tensor(kept.losses).isfinite().all()

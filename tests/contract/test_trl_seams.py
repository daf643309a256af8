"""Every private name of TRL that gcpo_trl leans on. A failure says what moved and where to look."""

import contextlib
import inspect
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.grpo_trainer as grpo
from tiny import redness, text_prompts
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations import TensorBoardCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head

from gcpo_trl import GCPOTrainer, trl_compat
from gcpo_trl.trainer.critical_tokens import CriticalTokenTrainer
from gcpo_trl.trainer.divergence_term import DivergenceTrainer
from gcpo_trl.trainer.resume import ExactResume
from gcpo_trl.trainer.rollouts import RolloutTrainer

LOOK = "TRL moved; compare gcpo_trl/trl_compat.py and gcpo_trl/trainer.py with trl/trainer/grpo_trainer.py of TRL"

SIGNATURES = {
    "_generate": ["self", "prompts"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "model", "inputs"],
    "evaluate": ["self"],
}
SCORING = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]

LABELS = ("a", "bb", "ccc", "dddd")


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def trainer(tiny_text, tmp_path_factory):
    """A plain GRPOTrainer on the tiny text model, for what TRL does when left alone."""
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("seams")),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=5,
        loss_type="grpo",
        beta=0.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        tiny_text, [lambda completions, **_: [float(len(c)) for c in completions]], args, text_prompts()
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by transformers when training starts
    return trainer


def batch_of(advantages, **more):
    """Two completions of three tokens, as TRL hands them to its loss."""
    ones = torch.ones(2, 3, dtype=torch.long)
    return {
        "prompt_ids": torch.tensor([[1, 5], [1, 6]]),
        "prompt_mask": ones[:, :2],
        "completion_ids": torch.tensor([[7, 8, 9], [10, 11, 12]]),
        "completion_mask": ones,
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(6),
        **more,
    }


def test_the_version_is_the_one_that_was_read():
    assert version("trl").startswith("1.16."), f"{LOOK} {version('trl')}, then widen the pin in setup.cfg"


@pytest.mark.parametrize("name", SIGNATURES)
def test_overridden_methods_keep_their_signature(name):
    found = parameters(getattr(GRPOTrainer, name))[: len(SIGNATURES[name])]
    assert found == SIGNATURES[name], f"GRPOTrainer.{name} now takes {found}. {LOOK}"


def test_scoring_keeps_its_signature():
    found = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert found[: len(SCORING)] == SCORING, f"scoring now takes {found}. {LOOK}"
    missing = set(trl_compat.MULTIMODAL) - set(found)
    assert not missing, f"scoring no longer takes {missing}. {LOOK}"


def test_the_constructor_has_the_same_parameters():
    theirs, ours = parameters(GRPOTrainer.__init__), parameters(GCPOTrainer.__init__)
    assert ours == theirs, f"GCPOTrainer.__init__ must offer and pass on {theirs}. {LOOK}"


def test_what_we_override_exists():
    parts = (RolloutTrainer, CriticalTokenTrainer, DivergenceTrainer, GCPOTrainer)
    ours = {name for part in parts for name, value in vars(part).items() if inspect.isfunction(value)}
    overridden = {"_generate", "_calculate_rewards", "_generate_and_score_completions", "_compute_loss", "evaluate"}
    overridden |= {"_get_per_token_logps_and_entropies", "__init__", "train", "create_model_card"}
    overridden |= {"push_to_hub", "_push_from_checkpoint"}
    assert overridden <= ours
    resumed = {name for name, value in vars(ExactResume).items() if inspect.isfunction(value)}
    saved = {"_save_checkpoint", "_save_rng_state"}
    assert resumed == saved | {"train", "_get_train_sampler", "_load_from_checkpoint", "_load_rng_state"}
    overridden |= resumed
    gone = {name for name in overridden if not hasattr(GRPOTrainer, name)}
    assert not gone, f"GRPOTrainer has no {gone} to override. {LOOK}"
    clash = {name for name in ours - overridden if hasattr(GRPOTrainer, name)}
    assert not clash, f"GRPOTrainer now has {clash} too, which GCPOTrainer hides; rename ours"


def test_the_state_of_the_trainer_is_saved_behind_that_of_the_random_numbers():
    # What calls a checkpoint whole is written last, and what a run goes on from is read before its first batch.
    source = inspect.getsource(Trainer._save_checkpoint)
    last = source.index("save_to_json(os.path.join(output_dir, TRAINER_STATE_NAME))")
    assert source.index("_save_rng_state(output_dir)") < last < source.index("rotate_checkpoints("), LOOK
    assert parameters(Trainer.train)[:4] == ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"], LOOK
    assert "_load_rng_state(resume_from_checkpoint)" in inspect.getsource(Trainer._run_epoch), LOOK


def test_prompts_are_repeated_by_a_sampler_that_shuffles_once_an_epoch(trainer):
    sampler = trainer._get_train_sampler()
    assert {"shuffle", "seed", "generator", "num_samples"} <= set(vars(sampler)), f"RepeatSampler changed. {LOOK}"
    next(iter(sampler))
    state = sampler.generator.get_state()
    again = torch.Generator().manual_seed(sampler.seed)
    torch.randperm(sampler.num_samples, generator=again)
    assert torch.equal(state, again.get_state()), f"RepeatSampler draws other than one permutation. {LOOK}"


def test_the_reference_is_built_by_a_function_of_the_module(tiny_text, tmp_path, monkeypatch):
    # `reference_built` replaces this name to copy a model that was never saved.
    made = []

    def create(path, **settings):
        made.append(path)
        raise InterruptedError

    monkeypatch.setattr(grpo, "create_model_from_path", create)
    args = GRPOConfig(output_dir=str(tmp_path), beta=0.1, use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(InterruptedError):
        GRPOTrainer(AutoModelForCausalLM.from_pretrained(tiny_text), [redness], args, text_prompts())
    assert made == [tiny_text], f"GRPOTrainer.__init__ no longer calls create_model_from_path. {LOOK}"


def test_generate_returns_eight_things_that_the_batch_is_made_of(trainer, monkeypatch):
    eight = trl_compat.eight_of_generate(
        [[1, 5], [1, 5, 6]] * 2, [[7, 8, 9]] * 4, list(LABELS), torch.ones(4, 3, dtype=torch.bool)
    )
    assert len(eight) == 8
    monkeypatch.setattr(trainer, "_generate", lambda prompts: eight)
    rows = [{"prompt": "w1"}, {"prompt": "w1"}, {"prompt": "w2"}, {"prompt": "w2"}]
    try:
        batch = trainer._generate_and_score_completions(rows)
    except ValueError as error:
        pytest.fail(f"_generate no longer returns eight things ({error}). {LOOK}")
    assert batch["prompt_ids"].tolist() == [[0, 1, 5], [1, 5, 6]] * 2, f"prompts are no longer padded left. {LOOK}"
    assert batch["completion_ids"].tolist() == [[7, 8, 9]] * 4
    # rewards 1, 2 and 3, 4: what the labels' lengths say, so completions reach the rewards as given
    half = 0.5 / (0.5**0.5 + 1e-4)
    assert_close(batch["advantages"], torch.tensor([-half, half, -half, half]), rtol=0, atol=1e-6)
    assert batch["num_items_in_batch"] == 12
    assert "tool_mask" not in batch


def test_tool_mask_multiplies_into_the_loss_mask(trainer, monkeypatch):
    # loss type grpo, ratio 1: minus the mean over rows of the mean over a row's tokens of the advantage
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (torch.zeros(2, 3), torch.zeros(2, 3), None)
    )
    advantages = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    plain = trainer._compute_loss(trainer.model, batch_of(advantages))
    assert_close(plain.item(), -(7 / 3 + 56 / 3) / 2, rtol=0, atol=1e-6)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    masked = trainer._compute_loss(trainer.model, batch_of(advantages, tool_mask=mask))
    assert_close(masked.item(), -(5 / 2 + 16) / 2, rtol=0, atol=1e-6, msg=f"tool_mask left the loss mask. {LOOK}")


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_advantages_of_every_token_are_accepted(trainer, monkeypatch, loss_type):
    logps = torch.full((2, 3), -1.0)
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (logps, torch.zeros(2, 3), None)
    )
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    one = torch.tensor([1.0, -2.0])
    expected = trainer._compute_loss(trainer.model, batch_of(one))
    repeated = trainer._compute_loss(trainer.model, batch_of(one[:, None].expand(2, 3)))
    assert_close(repeated, expected, rtol=0, atol=1e-6, msg=f"(batch, seq) advantages: {loss_type} differs. {LOOK}")


def test_advantages_are_read_after_the_log_probs(trainer, monkeypatch):
    inputs = batch_of(torch.tensor([1.0, 1.0]))

    def score(*args, **kwargs):
        inputs["advantages"] = torch.full((2, 3), 5.0)
        return torch.zeros(2, 3), torch.zeros(2, 3), None

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", score)
    loss = trainer._compute_loss(trainer.model, inputs)
    assert loss.item() == -5.0, f"the loss reads advantages before it scores, so the weight comes too late. {LOOK}"


def test_the_loss_scores_once_and_asks_for_entropy(trainer, monkeypatch):
    # `GCPOTrainer` weighs the advantages at the first scoring call inside the loss.
    calls = []

    def score(*args, **kwargs):
        calls.append(kwargs)
        return torch.zeros(2, 3), torch.zeros(2, 3), None

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", score)
    trainer._compute_loss(trainer.model, batch_of(torch.ones(2)))
    assert len(calls) == 1 and calls[0]["compute_entropy"], f"the loss scores {len(calls)} times. {LOOK}"


def test_scoring_calls_the_model_with_the_fused_head(trainer):
    # The contract of `JanusPolicy.attach_head`: called with ids, mask, labels and fused_lm_head, by keyword.
    seen = {}

    class Scores:
        log_probs = torch.arange(10.0).view(2, 5)
        entropy = -log_probs
        aux_loss = None

    def model(**inputs):
        seen.update(inputs)
        return Scores

    ids = torch.arange(10).view(2, 5)
    logps, entropies, aux = trainer._get_per_token_logps_and_entropies(
        model, ids, torch.ones_like(ids), 3, compute_entropy=True
    )
    assert set(seen) == {"input_ids", "attention_mask", "labels", "fused_lm_head"}, f"{sorted(seen)}. {LOOK}"
    assert seen["fused_lm_head"] is True
    assert seen["labels"].tolist() == [[-100, -100, 2, 3, 4], [-100, -100, 7, 8, 9]]
    assert torch.equal(logps, Scores.log_probs[:, -3:]) and torch.equal(entropies, Scores.entropy[:, -3:])
    assert aux is None


def test_the_fused_head_is_the_models_forward():
    # `attach_head` is called after GRPOTrainer.__init__ and replaces `model.forward`, as TRL's own head does.
    assert parameters(add_fused_lm_head)[:2] == ["model", "temperature"], LOOK
    source = inspect.getsource(add_fused_lm_head)
    assert "model.forward =" in source, f"TRL's head is no longer put into model.forward. {LOOK}"
    assert "fused_lm_head" in source, LOOK


def test_generation_is_unwrapped_as_trl_does(trainer):
    taken = parameters(unwrap_model_for_generation)
    needed = {"model", "accelerator", "gather_deepspeed3_params", "gradient_checkpointing_kwargs"}
    assert needed <= set(taken), f"unwrap_model_for_generation takes {taken}. {LOOK}"
    context = trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False)
    assert isinstance(context, contextlib.AbstractContextManager), f"trainer._dist.summon_full_params. {LOOK}"
    with trl_compat.generation_context(trainer):
        assert not torch.is_grad_enabled()


def test_attributes_that_are_read_exist(trainer):
    names = ["_step", "_metrics", "beta", "ref_model", "temperature", "top_k", "top_p", "num_generations"]
    names += ["num_generations_eval", "model_wrapped", "_dist", "_buffered_inputs", "processing_class"]
    names += ["reward_weights", "reward_func_names", "callback_handler", "control", "state"]
    gone = [name for name in names if not hasattr(trainer, name)]
    assert not gone, f"GRPOTrainer has no {gone}. {LOOK}"
    assert set(trainer._metrics) == {"train", "eval"}, LOOK
    trainer._metrics["train"]["gcpo/test"].append(1.0)  # a list for every name, made on first use
    trainer._metrics["train"].clear()


def test_beta_is_copied_at_construction_and_read_from_the_trainer():
    assert "self.beta = args.beta" in inspect.getsource(GRPOTrainer.__init__), f"beta. {LOOK}"
    for method in (GRPOTrainer._compute_loss, GRPOTrainer._generate_and_score_completions):
        assert "self.beta != 0.0" in inspect.getsource(method), f"{method.__name__} no longer asks for beta. {LOOK}"
    assert "self.args.beta" not in inspect.getsource(GRPOTrainer._compute_loss), LOOK


def test_the_batch_is_split_and_shuffled_after_scoring():
    # Groups are whole only inside `_generate_and_score_completions`, where the critical tokens are chosen.
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    scored = source.index("self._generate_and_score_completions(")
    assert scored < source.index("shuffle_sequence_dict("), f"the batch is shuffled before it is scored. {LOOK}"


def test_rewards_of_none_become_advantage_zero(trainer, monkeypatch):
    eight = trl_compat.eight_of_generate([[1, 5]] * 4, [[7]] * 4, list(LABELS), torch.ones(4, 1, dtype=torch.bool))
    monkeypatch.setattr(trainer, "_generate", lambda prompts: eight)
    monkeypatch.setattr(trainer, "reward_funcs", [lambda completions, **_: [1.0, None, 1.0, 3.0]])
    rows = [{"prompt": "w1"}] * 4
    advantages = trainer._generate_and_score_completions(rows)["advantages"]
    # The first pair has one score left, which is its own mean; 1 and 3 are the second.
    one = 1 / (2**0.5 + 1e-4)
    assert advantages[1] == 0, f"an unscored completion moves the policy. {LOOK}"
    assert_close(advantages, torch.tensor([0.0, 0.0, -one, one]), rtol=0, atol=1e-6)


def test_rewards_come_back_from_all_ranks():
    # `ImageLog` looks its rewards up by an image's place among those of all ranks.
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert "rewards_per_func = gather(rewards_per_func)" in source, f"rewards are gathered elsewhere. {LOOK}"


def test_rewards_are_called_by_place_and_awaited_in_a_loop_of_the_trainer():
    # `EarlyRewards` calls some before, in that loop, as TRL would; what TRL then finds in their places only waits.
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    for line in (
        "zip(self.reward_funcs, self.reward_processing_classes, self.reward_func_names, strict=True)",
        "elif is_async_callable(reward_func):",
        "self.async_loop).result()",
        'key not in ["prompt", "completion", "completion_ids"]',
        'reward_kwargs["trainer_state"] = self.state',
        'reward_kwargs["log_extra"] = self._log_completion_extra',
        'reward_kwargs["log_metric"] = self._log_metric',
    ):
        assert line in source, f"_calculate_rewards has no {line!r}. {LOOK}"
    assert source.count("prompts=prompts, completions=completions, completion_ids=completion_ids_list") == 2, LOOK


def test_logging_apart_disturbs_neither_metrics_nor_the_wish_to_log(trainer):
    trainer._metrics["train"]["gcpo/test"].append(1.0)
    trainer.control.should_log = True
    Trainer.log(trainer, {"plain": 1.0})
    assert not trainer.control.should_log, (
        "transformers' log no longer takes should_log back; log_apart need not either"
    )
    trainer.control.should_log = True
    trl_compat.log_apart(trainer, {"apart": 2.0})
    assert trainer.control.should_log
    assert trainer.state.log_history[-1]["apart"] == 2.0 and "gcpo/test" not in trainer.state.log_history[-1]
    assert trainer._metrics["train"].pop("gcpo/test") == [1.0]
    trainer.control.should_log = False


def test_a_push_asks_for_its_hub_by_a_function_and_names_what_it_leaves_out(trainer, tmp_path, monkeypatch):
    asked = []
    hub = SimpleNamespace(upload_folder=lambda **options: asked.append(options["ignore_patterns"]))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr(trainer, "hub_model_id", "someone/reds", raising=False)
    monkeypatch.setattr(trainer, "push_in_progress", None, raising=False)
    with trl_compat.arguments_stay_here():
        trainer.push_to_hub()
    trainer.push_to_hub()
    theirs = ["_*", "checkpoint-*"]
    assert asked == [[*theirs, "training_args.bin"], theirs], LOOK
    assert inspect.getsource(Trainer._push_from_checkpoint).count("hf_api().upload_folder(") == 2, LOOK


def test_a_moving_reference_is_moved_before_a_checkpoint_is_saved():
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("callback_handler.on_step_end(") < source.index("_maybe_log_save_evaluate("), LOOK
    assert "on_step_end" in vars(SyncRefModelCallback), LOOK


def test_the_writer_of_tensorboard_is_found(trainer):
    assert "self.tb_writer = tb_writer" in inspect.getsource(TensorBoardCallback.__init__), "look at tensorboard_writer"
    assert trl_compat.tensorboard_writer(trainer) is None
    callback = TensorBoardCallback.__new__(TensorBoardCallback)  # its __init__ wants tensorboard installed
    callback.tb_writer = "writer"
    trainer.add_callback(callback)
    assert trl_compat.tensorboard_writer(trainer) == "writer"
    trainer.remove_callback(callback)

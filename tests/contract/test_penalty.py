"""Divergences of our own beside TRL's loss, and STAGE: the trainer against formulas, and against TRL's own KL."""

import pytest
import torch
from test_trainer import assert_same_gradients, group_advantages, logps_of, twin
from tiny import disturb, janus_trainer, record, text_prompts, text_trainer
from torch.testing import assert_close
from trl import GRPOTrainer

import gcpo_trl.trainer.divergence_term
from gcpo_trl import GCPOTrainer
from gcpo_trl.objective.loss import LossInputs, gcpo_loss
from gcpo_trl.objective.stage import opposing_similarity, stage_advantage_weight, stage_divergence_weight
from gcpo_trl.objective.weighting import advantage_weight
from gcpo_trl.trainer.critical_tokens import OPPOSING

LOSS_TYPES = ["grpo", "sapo", "bnpo", "dr_grpo", "cispo", "dapo", "vespo", "luspo"]
PLAIN_KL = {"use_bias_correction_kl": False}


def text_run(model, folder, evaluate=False, **changes):
    """Two updates of two micro-batches of texts of different lengths, each completion used twice; 'beta' counts."""
    args = {
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "beta": 0.5,
        "select_fraction": 0.2,
        "max_grad_norm": 1e9,
        "per_device_eval_batch_size": 4,
    }
    trainer = text_trainer(model, folder, args=args | changes, eval_dataset=text_prompts(2))
    disturb(trainer.model, share=0.3)
    if evaluate:
        return trainer.evaluate()
    kept = record(trainer)
    trainer.train()
    return kept, trainer.state.log_history


@pytest.mark.parametrize("changes", [{"use_bias_correction_kl": True}, PLAIN_KL], ids=["times the ratio", "as it is"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_our_reverse_kl_is_trls_k3_under_every_loss_type(tiny_text, tmp_path, loss_type, changes):
    changes = changes | {"loss_type": loss_type}
    if loss_type == "luspo":
        changes["importance_sampling_level"] = "sequence"
    theirs, log = text_run(tiny_text, tmp_path, **changes)
    ours, our_log = text_run(tiny_text, tmp_path, divergence="reverse_kl", **changes)
    assert len(theirs.losses) == 4 and len(theirs.gradients) == 2
    assert len(set(theirs.batches[0]["tool_mask"].sum(1).tolist())) > 1  # normalisers differ
    assert_close(ours.losses, theirs.losses, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            assert (gradient - other[name]).norm() <= 1e-6 + 1e-5 * other[name].norm(), name
    # TRL's "kl" is k3, times the ratio where it is corrected; it is not logged under another divergence
    assert all("kl" in entry for entry in log[:2]) and not any("kl" in entry for entry in our_log)
    if not changes["use_bias_correction_kl"]:
        for one, other in zip(our_log[:2], log[:2], strict=True):
            assert_close(one["gcpo/divergence/reverse_kl"], other["kl"], rtol=1e-5, atol=1e-7)
            assert one["gcpo/divergence/k3"] == one["gcpo/divergence/reverse_kl"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_our_reverse_kl_is_trls_k3_in_evaluation(tiny_text, tmp_path, loss_type):
    changes = {"loss_type": loss_type, "gradient_accumulation_steps": 1}
    theirs = text_run(tiny_text, tmp_path, evaluate=True, **changes)
    ours = text_run(tiny_text, tmp_path, evaluate=True, divergence="reverse_kl", **changes)
    assert_close(ours["eval_loss"], theirs["eval_loss"], rtol=1e-5, atol=1e-6)
    assert theirs["eval_kl"] > 0.01 and "eval_kl" not in ours and ours["eval_gcpo/divergence/reverse_kl"] > 0.01


def test_a_loss_type_that_has_no_known_normaliser_is_refused(tiny_text, tmp_path):
    trainer = text_trainer(tiny_text, tmp_path, args={"divergence": "reverse_kl", "beta": 0.1})
    trainer.loss_type, trainer.current_gradient_accumulation_steps = "new", 1
    with pytest.raises(ValueError, match="loss_type='new' has no known normaliser; set divergence back to 'k3'"):
        gcpo_trl.trainer.divergence_term.trl_compat.aggregate(
            trainer, torch.ones(1, 2), torch.ones(1, 2).bool(), torch.tensor(2)
        )


class Before(GCPOTrainer):
    """The trainer without a penalty of its own: the weight goes into TRL's loss, and that is all."""

    def _compute_loss(self, model, inputs):
        self._in_loss = inputs = dict(inputs)
        return GRPOTrainer._compute_loss(self, model, inputs)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_by_default_training_is_the_same_to_the_bit(tiny_janus, tmp_path, monkeypatch, loss_type):
    def run(trainer_class):
        monkeypatch.setattr("gcpo_trl.GCPOTrainer", trainer_class)
        trainer = janus_trainer(tiny_janus, tmp_path, max_steps=5, loss_type=loss_type)
        assert type(trainer) is trainer_class
        kept = record(trainer)
        trainer.train()
        return kept, dict(trainer.model.named_parameters()), trainer.state.log_history

    before, weights, log = run(Before)
    monkeypatch.setattr(
        "gcpo_trl.trainer.divergence_term.divergence", lambda *_, **__: pytest.fail("a divergence of our own")
    )
    now, found, our_log = run(GCPOTrainer)
    assert now.losses == before.losses and len({*now.losses}) == 5
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert [e["kl"] for e in our_log[:5]] == [e["kl"] for e in log[:5]] and log[4]["kl"] > 0


# the written-out formula


def oracle(trainer, policy, reference, batch, **changes):
    """`gcpo_loss` of the batch under the trainer's settings; ``changes`` are fields of LossInputs."""
    args = trainer.args
    logps, ref = logps_of(policy, batch), logps_of(reference, batch).detach()
    inputs = {
        "logps": logps,
        "ref_logps": ref,
        "advantages": group_advantages(batch),
        "critical": batch["tool_mask"].bool(),
        "weight": advantage_weight(logps, ref, clip=args.weight_clip),
        "beta": args.beta,
        "divergence": args.divergence,
        "divergence_alpha": args.divergence_alpha,
        "divergence_match": args.divergence_match,
        "divergence_gradient": args.divergence_gradient or "pathwise",
        "divergence_on": args.divergence_on,
    }
    return gcpo_loss(LossInputs(**inputs | changes))


def stepped(path, folder, **changes):
    """A disturbed trainer after a step, the policy before it, the reference, and the record."""
    trainer = janus_trainer(path, folder, **{"beta": 0.5} | changes)
    disturb(trainer.model)
    policy, reference = twin(trainer, path)
    kept = record(trainer)
    trainer.train()
    return trainer, policy, reference, kept


FORMULAS = [
    {"divergence": "reverse_kl"},
    {"divergence": "forward_kl"},
    {"divergence": "jensen_shannon"},
    {"divergence": "jensen_shannon", "divergence_match": "value"},
    {"divergence": "alpha", "divergence_alpha": 0.3},
    {"divergence": "k3", "divergence_gradient": "pathwise"},
    {"divergence": "k3", "divergence_gradient": "unbiased"},
    {"divergence": "jensen_shannon", "divergence_gradient": "unbiased"},
    {"divergence": "k3", "divergence_on": "all"},
    {"divergence": "forward_kl", "divergence_on": "all", "loss_type": "dapo"},
    {"divergence": "forward_kl", "divergence_on": "all", "loss_type": "dr_grpo", "num_generations": 4},
]


@pytest.mark.parametrize("changes", FORMULAS, ids=lambda c: " ".join(map(str, c.values())))
def test_every_divergence_is_the_formula(tiny_janus, tmp_path, changes):
    trainer, policy, reference, kept = stepped(tiny_janus, tmp_path, **PLAIN_KL | changes)
    batch, log = kept.batches[0], trainer.state.log_history[0]
    advantages = group_advantages(batch, changes.get("num_generations", 2))
    normalizer = "sequence" if changes.get("loss_type") == "dr_grpo" else "selected"
    expected = oracle(trainer, policy, reference, batch, advantages=advantages, normalizer=normalizer)
    expected.loss.backward()
    name = f"gcpo/divergence/{changes['divergence']}"
    assert expected.metrics[name] > 2e-3
    assert_close(kept.losses[0], expected.loss.item(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(policy, kept.gradients[0])
    assert_close(log[name], expected.metrics[name].item(), rtol=1e-4, atol=1e-7)
    assert log["gcpo/divergence/k3"] > 0 and "kl" not in log


def test_trls_correction_gives_the_unbiased_gradient_of_any_divergence(tiny_janus, tmp_path):
    # At the first update the ratio is 1: the same loss, and d(r g) = g - w g'.
    settings = {"divergence": "jensen_shannon"}
    _, _, _, corrected = stepped(tiny_janus, tmp_path, **settings)
    _, _, _, unbiased = stepped(tiny_janus, tmp_path, divergence_gradient="unbiased", **settings | PLAIN_KL)
    _, _, _, pathwise = stepped(tiny_janus, tmp_path, divergence_gradient="pathwise", **settings | PLAIN_KL)
    assert corrected.losses == unbiased.losses == pathwise.losses
    apart = []
    for name, gradient in corrected.gradients[0].items():
        assert_close(gradient, unbiased.gradients[0][name], rtol=1e-4, atol=1e-6, msg=name)
        apart.append((gradient - pathwise.gradients[0][name]).norm() / gradient.norm())
    assert max(apart) > 1e-2


def test_a_divergence_on_all_tokens_moves_tokens_that_are_not_critical(tiny_janus, tmp_path):
    rows = []

    def run(**changes):
        trainer = janus_trainer(tiny_janus, tmp_path, beta=0.5, **changes)
        head = trainer.model.model.generation_head
        head.register_forward_hook(lambda _, args, out: rows.append(len(out)) if torch.is_grad_enabled() else None)
        trainer.train()

    run(divergence="forward_kl")
    run(divergence_on="all")
    assert rows == [4 * 24, 4 * 81]


# STAGE


@pytest.mark.parametrize("where", ["advantages", "divergence", "both"])
def test_stage_is_the_formula(tiny_janus, tmp_path, where):
    changes = {"weight_form": "none", "select_similarity_space": "codebook", "num_generations": 4} | PLAIN_KL
    if where != "divergence":
        changes["weight_form"] = "stage"
    if where != "advantages":
        changes["divergence_weight"] = "stage"
    trainer, policy, reference, kept = stepped(tiny_janus, tmp_path, **changes)
    batch, log = kept.batches[0], trainer.state.log_history[0]
    advantages = group_advantages(batch, group=4)
    table = trainer.policy.token_table("codebook")
    similarity = opposing_similarity(batch["completion_ids"][None], table, advantages[None])[0]
    assert similarity.std() > 0.05
    assert_close(batch[OPPOSING], similarity, rtol=0, atol=1e-5)
    weight = stage_advantage_weight(similarity) if where != "divergence" else torch.ones_like(similarity)
    factor = stage_divergence_weight(similarity) if where != "advantages" else None
    expected = oracle(trainer, policy, reference, batch, advantages=advantages, weight=weight, divergence_weight=factor)
    expected.loss.backward()
    assert_close(kept.losses[0], expected.loss.item(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(policy, kept.gradients[0])
    if where != "divergence":
        assert_close(log["gcpo/weight/mean"], expected.metrics["gcpo/weight/mean"].item(), rtol=1e-5, atol=0)


def test_stages_weight_needs_no_reference(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, weight_form="stage", beta=0.0)
    kept = record(trainer)
    trainer.train()
    assert trainer.ref_model is None and "ref_per_token_logps" not in kept.batches[0]
    assert kept.gradients[0] and trainer.state.log_history[0]["grad_norm"] > 0


def test_stages_similarity_stays_with_its_row(tiny_janus, tmp_path):
    # Eight images a generation, shuffled, then split in two: groups are apart, rows are not.
    trainer = janus_trainer(tiny_janus, tmp_path, weight_form="stage", beta=0.0, gradient_accumulation_steps=2)
    kept, seen, loss = record(trainer), [], trainer._compute_loss

    def computed(model, inputs):
        seen.append(inputs)
        return loss(model, inputs)

    trainer._compute_loss = computed
    trainer.train()
    [batch] = kept.batches
    of_row = dict(zip(map(tuple, batch["completion_ids"].tolist()), batch[OPPOSING], strict=True))
    assert len(of_row) == 8 and len(seen) == 2
    order = [tuple(row) for inputs in seen for row in inputs["completion_ids"].tolist()]
    assert order != list(of_row)
    for inputs in seen:
        for row, similarity in zip(inputs["completion_ids"].tolist(), inputs[OPPOSING], strict=True):
            assert torch.equal(similarity, of_row[tuple(row)])


def test_texts_train_with_stage_and_a_divergence(tiny_text, tmp_path):
    changes = {"weight_form": "stage", "divergence_weight": "stage", "divergence": "jensen_shannon"}
    kept, log = text_run(tiny_text, tmp_path, divergence_on="all", **changes)
    batch = kept.batches[0]
    assert not batch[OPPOSING][batch["completion_mask"] == 0].any()  # padding resembles nothing
    assert batch["policy_items_in_batch"] == batch["completion_mask"].sum() > batch["num_items_in_batch"]
    assert all(torch.tensor(kept.losses).isfinite()) and log[0]["gcpo/divergence/jensen_shannon"] > 0


# normalisers


@pytest.mark.parametrize(("loss_type", "normalizer"), [("bnpo", "selected"), ("dr_grpo", "sequence")])
def test_bnpo_is_the_released_normaliser_and_dr_grpo_the_papers(tiny_janus, tmp_path, loss_type, normalizer):
    trainer, policy, reference, kept = stepped(tiny_janus, tmp_path, loss_type=loss_type, **PLAIN_KL)
    expected = oracle(trainer, policy, reference, kept.batches[0], normalizer=normalizer)
    expected.loss.backward()
    assert_close(kept.losses[0], expected.loss.item(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(policy, kept.gradients[0])
    # 24 of 81 tokens are critical, in every image
    other = {"selected": "sequence", "sequence": "selected"}[normalizer]
    apart = oracle(trainer, policy, reference, kept.batches[0], normalizer=other).loss.item()
    shares = {"selected": 24 / 81, "sequence": 81 / 24}
    assert_close(apart / expected.loss.item(), shares[normalizer], rtol=1e-4, atol=0)

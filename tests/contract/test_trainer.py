"""What GCPOTrainer optimises, on a tiny Janus: its loss and gradient against formulas written out here."""

import pytest
import torch
from tiny import PROMPTS, TOKENS, disturb, janus_trainer, load_janus, record
from torch.testing import assert_close

from gcpo_trl.objective.loss import LossInputs, gcpo_loss
from gcpo_trl.objective.weighting import advantage_weight
from gcpo_trl.policies.janus import JanusPolicy

ALL = {"select_strategies": ["everything"]}
PLAIN = ALL | {"weight_form": "none"}
COUNT = 8  # floor(0.1 * 81), for each of three strategies


def logps_of(model, batch, temperature=1.0):
    """Log-probability of each image token, from one forward pass over prompt and image, without any tiling."""
    inner, tokens = model.model, batch["completion_ids"]
    codes = inner.generation_aligner(inner.generation_embeddings(tokens))
    embeddings = torch.cat([inner.language_model.embed_tokens(batch["prompt_ids"]), codes], dim=1)
    mask = torch.cat([batch["prompt_mask"], torch.ones_like(tokens)], dim=1)
    states = inner.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
    ).last_hidden_state
    logits = inner.generation_head(states[:, batch["prompt_ids"].shape[1] - 1 : -1]) / temperature
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def group_advantages(batch, group=2):
    """(r - mean) / (std + 1e-4) in each group, std with one degree of freedom less."""
    rewards = torch.tensor([sum(ids) % 97 / 97 for ids in batch["completion_ids"].tolist()]).view(-1, group)
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, correction=1, keepdim=True) + 1e-4)).flatten()


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([1.0, 0.0, 0.0, 1.0], [0.865875, -0.865875, -0.865875, 0.865875]),  # std 0.577350
        ([0.2, 0.4, 0.6, 0.8], [-1.161445, -0.387148, 0.387148, 1.161445]),
        ([0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_advantages_are_rewards_over_the_groups_unbiased_deviation(tiny_janus, tmp_path, rewards, advantages):
    def fixed(prompts, completions, **columns):
        return rewards

    trainer = janus_trainer(tiny_janus, tmp_path, reward=fixed, num_generations=4)
    kept = record(trainer)
    trainer.train()
    assert_close(kept.batches[0]["advantages"], torch.tensor(advantages), rtol=0, atol=1e-6)


def twin(trainer, path):
    """A model with the trainer's present weights and nothing patched, and the untouched one it started from."""
    policy, reference = load_janus(path)[0], load_janus(path)[0]
    policy.load_state_dict(trainer.model.state_dict())
    return policy, reference


def assert_same_gradients(model, gradients):
    expected = {name: p.grad for name, p in model.named_parameters() if name in gradients}
    assert len(expected) == len(gradients) > 10
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize(
    ("loss_type", "temperature", "corrected"),
    [("bnpo", 1.0, False), ("bnpo", 1.0, True), ("grpo", 1.0, False), ("dapo", 0.7, True)],
)
def test_all_tokens_and_no_weight_is_the_formula_of_grpo(tiny_janus, tmp_path, loss_type, temperature, corrected):
    # `corrected` is TRL's default: the KL term times the ratio, which is 1 and has a gradient.
    trainer = janus_trainer(
        tiny_janus,
        tmp_path,
        loss_type=loss_type,
        temperature=temperature,
        beta=0.5,
        use_bias_correction_kl=corrected,
        **PLAIN,
    )
    disturb(trainer.model)
    policy, reference = twin(trainer, tiny_janus)
    kept = record(trainer)
    trainer.train()
    batch = kept.batches[0]

    logps, ref = logps_of(policy, batch, temperature), logps_of(reference, batch, temperature).detach()
    advantages = group_advantages(batch)
    assert_close(batch["advantages"], advantages, rtol=0, atol=1e-5)
    assert advantages.abs().min() > 0.5
    k3 = (ref - logps).exp() - (ref - logps) - 1
    # Every image has 81 tokens, so the three normalisers agree.
    ratio = (logps - logps.detach()).exp()
    loss = (-ratio * advantages[:, None] + 0.5 * k3 * (ratio if corrected else 1)).mean()
    loss.backward()
    assert k3.mean() > 0.01
    assert_close(kept.losses[0], loss.item(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(policy, kept.gradients[0])
    log = trainer.state.log_history[0]
    assert_close(log["loss"], loss.item(), rtol=0, atol=1e-4)
    assert_close(log["kl"], k3.mean().item(), rtol=1e-4, atol=1e-6)
    norm = torch.stack([g.norm() for g in kept.gradients[0].values()]).norm()
    assert_close(float(log["grad_norm"]), norm.item(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("detach", [True, False])
def test_critical_tokens_and_weight_are_eq_8(tiny_janus, tmp_path, detach):
    # The paper and the authors' code take k3 alone, so TRL's correction of its gradient is off.
    trainer = janus_trainer(
        tiny_janus, tmp_path, weight_detach=detach, weight_clip=0.3, beta=0.2, use_bias_correction_kl=False
    )
    disturb(trainer.model)
    policy, reference = twin(trainer, tiny_janus)
    kept = record(trainer)
    trainer.train()
    batch = kept.batches[0]

    logps, ref = logps_of(policy, batch), logps_of(reference, batch).detach()
    inputs = LossInputs(
        logps=logps,
        ref_logps=ref,
        advantages=group_advantages(batch),
        critical=batch["tool_mask"].bool(),
        weight=advantage_weight(logps, ref, clip=0.3, detach=detach),
        beta=0.2,
    )
    expected = gcpo_loss(inputs)
    expected.loss.backward()
    assert (inputs.weight - 1).abs().mean() > 0.03
    assert_close(kept.losses[0], expected.loss.item(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(policy, kept.gradients[0])
    log = trainer.state.log_history[0]
    assert_close(log["gcpo/weight/mean"], expected.metrics["gcpo/weight/mean"].item(), rtol=1e-5, atol=0)
    assert_close(log["gcpo/select/fraction"], 24 / 81, rtol=0, atol=1e-6)
    assert_close(log["gcpo/select/similarity"], 8 / 81, rtol=0, atol=1e-6)


def gradient_of_the_heads_logits(trainer):
    """Which image tokens' logits receive gradient in one step, and which tokens were to train, row for row."""
    kept, seen = record(trainer), {}

    def keep(module, inputs, logits):
        if torch.is_grad_enabled():
            logits.retain_grad()
            seen["logits"] = logits

    trainer.model.model.generation_head.register_forward_hook(keep)
    loss = trainer._compute_loss

    def computed(model, inputs):
        seen["inputs"] = inputs
        return loss(model, inputs)

    trainer._compute_loss = computed
    trainer.train()
    critical, nonzero = seen["inputs"]["tool_mask"].bool(), seen["logits"].grad.abs().sum(-1) > 0
    # The head sees all tokens, or only those that train, row by row.
    rows = torch.ones_like(critical) if len(nonzero) == critical.numel() else critical
    moved = torch.zeros_like(critical).masked_scatter(rows, nonzero)
    return moved, critical, kept.batches[0]


def test_exactly_the_critical_tokens_train(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path)
    moved, critical, batch = gradient_of_the_heads_logits(trainer)
    assert batch["tool_mask"].sum(dim=1).tolist() == [3 * COUNT] * 4
    assert batch["num_items_in_batch"] == 4 * 3 * COUNT
    assert batch["tool_mask"][:, :COUNT].all()  # the initial ones among them
    assert torch.equal(moved, critical)


def test_a_weight_that_is_not_detached_moves_other_tokens_too(tiny_janus, tmp_path):
    # Every token up to the last critical one enters some critical token's weight.
    moved, critical, _ = gradient_of_the_heads_logits(janus_trainer(tiny_janus, tmp_path, weight_detach=False))
    for row, own in zip(moved, critical, strict=True):
        last = own.nonzero().max().item()
        assert row[: last + 1].all() and not row[last + 1 :].any()
    assert (moved & ~critical).sum() > 150  # of 4 x 57


def test_the_complement_is_the_rest(tiny_janus, tmp_path):
    _, _, batch = gradient_of_the_heads_logits(janus_trainer(tiny_janus, tmp_path, select_complement=True))
    assert batch["tool_mask"].sum(dim=1).tolist() == [TOKENS - 3 * COUNT] * 4


def test_selection_sees_the_rollouts_entropy_and_the_groups_tokens(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, select_strategies=["top_entropy"], select_entropy_from="conditional")
    kept = record(trainer)
    trainer.train()
    chosen, entropy = kept.batches[0]["tool_mask"].bool(), trainer._rollout.entropy
    assert (entropy.masked_fill(~chosen, torch.inf).amin(1) >= entropy.masked_fill(chosen, -torch.inf).amax(1)).all()
    # one after the other, the two images of a prompt differ in similarity, those of different prompts are not compared
    table, tokens = trainer.policy.token_table("aligner"), kept.batches[0]["completion_ids"]
    similarity = trainer._similarity(kept.batches[0], torch.ones_like(chosen))
    expected = torch.cosine_similarity(table[tokens[0]], table[tokens[1]], dim=-1)
    assert_close(similarity[:2], expected.expand(2, -1), rtol=0, atol=1e-5)


# the image head


def test_policy_and_reference_are_scored_with_the_image_head(tiny_janus, tmp_path):
    # Fails when `attach_head` is not called: then TRL's own head answers, which is the text head.
    trainer = janus_trainer(tiny_janus, tmp_path, rollout_guidance_scale=1.0, temperature=0.8)
    kept = record(trainer)
    trainer.train()
    batch = kept.batches[0]
    assert_close(batch["ref_per_token_logps"], trainer._rollout.logps, rtol=0, atol=1e-5)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    for model in (trainer.model, trainer.ref_model):
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, TOKENS, compute_entropy=True)
        assert_close(logps, logps_of(model, batch, temperature=0.8), rtol=0, atol=1e-5)
        assert entropies.shape == logps.shape


def test_without_the_image_head_nothing_would_fail_and_all_would_be_wrong(tiny_janus, tmp_path, monkeypatch):
    monkeypatch.setattr(JanusPolicy, "attach_head", lambda *_: None)
    trainer = janus_trainer(tiny_janus, tmp_path, rollout_guidance_scale=1.0)
    rows = torch.arange(4 * TOKENS).view(4, TOKENS) % 50  # ids that the text vocabulary has too
    encoded = trainer.policy.encode([PROMPTS[0]] * 4)
    batch = {"prompt_ids": encoded.ids, "prompt_mask": encoded.mask, "completion_ids": rows}
    ids, mask = torch.cat([encoded.ids, rows], 1), torch.cat([encoded.mask, torch.ones_like(rows)], 1)
    wrong, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, TOKENS)
    assert wrong.isfinite().all()
    assert (wrong - logps_of(trainer.model, batch)).abs().mean() > 0.5


# reference and weight


def test_the_weight_keeps_a_reference_at_beta_0_and_the_kl_stays_out(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, beta=0.0)
    assert trainer.ref_model is not None
    assert trainer.beta == trainer.args.beta == 0.0
    disturb(trainer.model)
    policy, reference = twin(trainer, tiny_janus)
    kept = record(trainer)
    trainer.train()
    batch, log = kept.batches[0], trainer.state.log_history[0]
    logps, ref = logps_of(policy, batch).detach(), logps_of(reference, batch).detach()
    critical = batch["tool_mask"].bool()
    weighted = advantage_weight(logps, ref) * group_advantages(batch)[:, None]
    assert_close(kept.losses[0], -weighted[critical].mean().item(), rtol=1e-4, atol=1e-6)
    assert "kl" not in log and log["gcpo/weight/mean"] != 1.0
    assert trainer.beta == 0.0


def test_no_reference_is_built_where_nothing_needs_one(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, beta=0.0, weight_form="none")
    kept = record(trainer)
    trainer.train()
    assert trainer.ref_model is None
    assert "ref_per_token_logps" not in kept.batches[0]


def test_literal_eq_7_detached_has_no_gradient_at_the_start(tiny_janus, tmp_path):
    with pytest.warns(UserWarning, match="zero for every token"):
        trainer = janus_trainer(tiny_janus, tmp_path, weight_form="linear")
    kept = record(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["gcpo/weight/mean"] == 0.0
    assert all((gradient == 0).all() for gradient in kept.gradients[0].values())
    assert kept.batches[0]["advantages"].abs().min() > 0.5  # it is not for want of a reward


def test_a_batch_gives_the_same_loss_twice(tiny_janus, tmp_path):
    # The buffer is used again when num_iterations > 1: a weight left in it would be applied twice.
    trainer = janus_trainer(tiny_janus, tmp_path)
    disturb(trainer.model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i // 2] for i in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    before = {key: value.clone() for key, value in batch.items()}
    first, second = (trainer._compute_loss(trainer.model, batch).item() for _ in range(2))
    assert first == second
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], before[key]) for key in batch)
    assert batch["advantages"].shape == (4,)


def test_iterations_slices_and_accumulation_work_together(tiny_janus, tmp_path):
    # 8 images a generation, in 2 slices, each used twice: 4 micro-batches, 2 to an update. 3 updates: 2 generations.
    trainer = janus_trainer(
        tiny_janus,
        tmp_path,
        num_iterations=2,
        steps_per_generation=2,
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    kept = record(trainer)
    trainer.train()
    assert len(kept.batches) == 2 and len(kept.losses) == 6 and len(kept.gradients) == 3
    for batch in kept.batches:
        assert batch["completion_ids"].shape == (8, TOKENS)
        assert batch["old_per_token_logps"].shape == (8, TOKENS)
        assert batch["tool_mask"].sum(dim=1).tolist() == [3 * COUNT] * 8
    for part in trainer._buffered_inputs:
        assert part["advantages"].shape == (4,)  # untouched by the weight
    images = {tuple(row) for batch in kept.batches for row in batch["completion_ids"].tolist()}
    assert len(images) == 16  # no sample index is used twice
    assert all(torch.tensor(kept.losses).isfinite())


def test_an_image_without_reward_does_not_move_the_policy(tiny_janus, tmp_path):
    def unsure(prompts, completions, completion_ids, **columns):
        return [None, 0.25, 0.5, 1.0]

    trainer = janus_trainer(tiny_janus, tmp_path, reward=unsure)
    kept = record(trainer)
    trainer.train()
    # the second image is alone in its group; 0.5 and 1: std 0.353553
    one = 0.25 / (0.353553 + 1e-4)
    assert_close(kept.batches[0]["advantages"], torch.tensor([0.0, 0.0, -one, one]), rtol=0, atol=1e-5)
    assert_close(trainer.state.log_history[0]["reward"], 1.75 / 3, rtol=0, atol=1e-6)

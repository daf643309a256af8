"""Steps of several tokens, images continued from given tokens, and positions constrained to some codes.

`Scales` is the smallest generator that samples a whole grid per step: the logits of a grid depend on the mean embedding
of everything before it.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from gcpo_trl.objective.layout import Layout
from gcpo_trl.policies.base import Constraint, NextLogits, PromptBatch
from gcpo_trl.policies.decoding.image_head import ALL, Scored, score_tokens, to_pictures
from gcpo_trl.rollout import Sampling, sample

VOCAB, DIM = 7, 5
LAYOUT = Layout(((1, 1), (2, 2), (2, 3)))
INDICES = [3, 4, 9]
PROMPTS = ["a", "b", "a"]


class Scales:
    """A policy without training, of three grids and so of three steps."""

    generates_images, layout, num_tokens, widths = True, LAYOUT, LAYOUT.tokens, LAYOUT.sizes
    processor, scored, modules, default_modules = None, ALL, {}, ()
    constraint = None

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB, DIM, generator=generator)
        self.positions = torch.randn(self.num_tokens, DIM, generator=generator)
        self.head = torch.randn(DIM, VOCAB, generator=generator)
        self.model = torch.nn.Identity()
        self.model.device = torch.device("cpu")

    def encode(self, prompts):
        ids = torch.tensor([[ord(prompt) % VOCAB] for prompt in prompts])
        return PromptBatch(ids, torch.ones_like(ids), torch.zeros_like(ids))

    def start(self, prompts, rows, guided, plain=False, into=None):
        free = self.table[prompts.unconditional_ids[:, 0]][rows] if guided else None
        state = SimpleNamespace(sums=[self.table[prompts.ids[:, 0]][rows], free], seen=1, first=0)
        return state, self._next(state)

    def step(self, state, tokens):
        assert tokens.shape[1] == self.widths[[0, 1, 5].index(state.first)]
        state.sums = [None if part is None else part + self.table[tokens].sum(1) for part in state.sums]
        state.seen, state.first = state.seen + tokens.shape[1], state.first + tokens.shape[1]
        return self._next(state)

    def _next(self, state):
        width = self.widths[[0, 1, 5].index(state.first)]
        places = self.positions[state.first : state.first + width]
        logits = [
            None if part is None else (part[:, None] / state.seen + places).tanh() @ self.head for part in state.sums
        ]
        return NextLogits(*logits)

    def token_table(self, space):
        return self.table

    def pixels(self, tokens):
        """The finest grid, a grey level per code."""
        return (2 * LAYOUT.maps(tokens)[-1] / (VOCAB - 1) - 1)[..., None].expand(-1, -1, -1, 3)

    def decode(self, tokens):
        return to_pictures(self.pixels(tokens))

    def attach_head(self, model, temperature):
        raise AssertionError("this policy is not trained")

    def set_generation(self, guidance_scale):
        raise AssertionError("this policy is not saved")

    def hidden(self, prompts, tokens):
        """States before the head of every position, from the whole sequence at once."""
        before = self.table[self.encode(prompts).ids[:, 0]][:, None]
        sums = torch.cat([before, self.table[tokens]], dim=1).cumsum(1)
        ends = torch.tensor([0, 1, 5])[LAYOUT.scale_of()]  # tokens before the grid of each position
        return (sums[:, ends] / (ends + 1)[:, None] + self.positions).tanh()


def run(policy, given=None, scale=1.0, **settings):
    return sample(policy, PROMPTS, 0, INDICES, Sampling(guidance_scale=scale, **settings), given=given)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_each_step_samples_its_width_and_reports_the_policys_own_log_probabilities(scale):
    policy = Scales()
    rollout = run(policy, scale=scale)
    logits = policy.hidden(PROMPTS, rollout.tokens) @ policy.head
    expected = logits.log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]
    assert_close(rollout.logps, expected, rtol=0, atol=1e-6)
    if scale == 1.0:
        assert_close(rollout.entropy, torch.distributions.Categorical(logits=logits).entropy(), rtol=0, atol=1e-6)
    assert rollout.valid.all() and rollout.tokens.shape == (3, 11)
    assert torch.equal(run(policy, scale=scale, batch_size=2).tokens, rollout.tokens)


@pytest.mark.parametrize("kept", [0, 1, 5, 11])
def test_given_tokens_are_continued_with_the_images_of_the_same_noise(kept):
    policy = Scales()
    whole = run(policy, scale=2.0)
    again = run(policy, given=whole.tokens[:, :kept], scale=2.0)
    assert torch.equal(again.tokens, whole.tokens) and torch.equal(again.logps, whole.logps)
    assert torch.equal(again.valid, torch.arange(11).expand(3, 11) >= kept)


def test_other_given_tokens_stay_and_change_what_follows():
    policy = Scales()
    other = (run(policy).tokens[:, :5] + 1) % VOCAB
    changed = run(policy, given=other)
    assert torch.equal(changed.tokens[:, :5], other)
    logits = policy.hidden(PROMPTS, changed.tokens) @ policy.head
    expected = logits.log_softmax(-1).gather(-1, changed.tokens[..., None])[..., 0]
    assert_close(changed.logps, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2), (2, 1), (3, 12)])
def test_given_tokens_must_be_whole_steps_of_every_image(shape):
    with pytest.raises(ValueError, match=r"whole steps: 0, 1, 5, 11 of 11"):
        run(Scales(), given=torch.zeros(shape, dtype=torch.long))


def constrained():
    """Codes 0 to 4 everywhere but at the last position of each row of the last grid, where 6 must stand."""
    policy = Scales()
    kinds = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1])
    allowed = torch.zeros(2, VOCAB, dtype=torch.bool)
    allowed[0, :5], allowed[1, 6] = True, True
    policy.constraint = Constraint(kinds, allowed)
    return policy


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 2}, {"entropy_from": "conditional"}])
def test_a_constraint_holds_and_what_has_no_choice_never_trains(settings):
    policy = constrained()
    rollout = run(policy, scale=2.0, **settings)
    ends = policy.constraint.kinds.bool()
    assert (rollout.tokens[:, ends] == 6).all() and (rollout.tokens[:, ~ends] < 5).all()
    assert torch.equal(rollout.valid, ~ends.expand(3, 11))
    assert (rollout.logps[:, ends] == 0).all() and (rollout.entropy[:, ends] == 0).all()  # one code has probability 1
    assert torch.isfinite(rollout.entropy).all() and (rollout.entropy[:, ~ends] > 0).all()


def test_scoring_sees_the_same_constraint_as_sampling():
    policy = constrained()
    rollout = run(policy)
    hidden = policy.hidden(PROMPTS, rollout.tokens).requires_grad_()
    constraint = policy.constraint
    scores = score_tokens(lambda x: x @ policy.head, hidden, rollout.tokens, 1.0, chunk=4, constraint=constraint)
    assert_close(scores[0], rollout.logps, rtol=0, atol=1e-6)
    assert_close(scores[1], rollout.entropy, rtol=0, atol=1e-6)
    (scores[0].sum() + scores[1].sum()).backward()
    assert torch.isfinite(hidden.grad).all() and (hidden.grad[:, constraint.kinds.bool()] == 0).all()
    some = Scored(rollout.valid, rest=False)
    part, _ = score_tokens(lambda x: x @ policy.head, hidden, rollout.tokens, 1.0, scored=some, constraint=constraint)
    assert_close(part, rollout.logps.where(rollout.valid, torch.tensor(0.0)), rtol=0, atol=1e-6)


def test_a_logit_of_minus_infinity_that_no_constraint_made_stops_the_rollout():
    policy = Scales()
    policy.positions[3] = torch.nan
    with pytest.raises(FloatingPointError, match="non-finite logits at image token 3 of 11"):
        run(policy)


def test_a_constraint_that_allows_nothing_is_refused():
    with pytest.raises(ValueError, match=r"kinds \[1\] of the constraint allow no code"):
        Constraint(torch.tensor([0, 1]), torch.tensor([[True], [False]]))

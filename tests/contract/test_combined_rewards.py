"""Several rewards through the trainer's own advantages: None, weights, both ways to aggregate, and side by side."""

import asyncio
import threading

import pytest
import torch
from loopback import serving
from tiny import janus_trainer, record
from torch.testing import assert_close

from gcpo_trl.rewards.loading import load_rewards, without_partly_scored
from reward_funcs.remote import Remote

# One group of four. The flaky reward failed on the second image.
STEADY, FLAKY = [0.2, 0.4, 0.6, 0.8], [0.1, None, 0.3, 0.2]


def fixed(name, values):
    """A reward that gives these values."""

    def reward(prompts, completions, **columns):
        return values

    reward.__name__ = name
    return reward


def trained(model, folder, rewards=(STEADY, FLAKY), **changes):
    """Advantages of the group and the log of the step."""
    names = ["steady", "flaky", "third"]
    rewards = [fixed(name, values) for name, values in zip(names, rewards, strict=False)]
    trainer = janus_trainer(model, folder, reward=rewards, num_generations=4, **changes)
    kept = record(trainer)
    trainer.train()
    return kept.batches[0]["advantages"], trainer.state.log_history[0]


def normalised(values):
    """(value - mean) / (unbiased deviation + 1e-4)."""
    values = torch.tensor(values)
    return (values - values.mean()) / (values.std(correction=1) + 1e-4)


def in_row(first, third, fourth):
    """Advantages of the group, the second image's being zero."""
    return torch.tensor([first, 0.0, third, fourth])


def test_an_image_that_one_reward_failed_to_score_is_left_out(tiny_janus, tmp_path):
    advantages, log = trained(tiny_janus, tmp_path)
    # Sums 0.3, 0.9, 1.0: mean 11/15, deviation 0.378594. Counting None as 0 would make the second's 0.4.
    a = [(total - 11 / 15) / (0.378594 + 1e-4) for total in (0.3, 0.9, 1.0)]
    assert_close(advantages, in_row(*a), rtol=0, atol=1e-5)
    assert_close(log["reward"], 11 / 15, rtol=0, atol=1e-6)
    assert (log["gcpo/reward/steady/missing"], log["gcpo/reward/flaky/missing"]) == (0.0, 0.25)
    assert log["gcpo/reward/skipped"] == 0.25
    assert_close(log["rewards/steady/mean"], 1.6 / 3, rtol=0, atol=1e-6)  # of the images that count
    assert_close(log["rewards/flaky/std"], 0.1, rtol=0, atol=1e-6)
    assert log["frac_reward_zero_std"] == 0.0


def test_partial_adds_up_what_there_is_as_trl_does(tiny_janus, tmp_path):
    advantages, log = trained(tiny_janus, tmp_path, reward_missing="partial")
    assert_close(advantages, normalised([0.3, 0.4, 0.9, 1.0]), rtol=0, atol=1e-5)
    assert (log["gcpo/reward/flaky/missing"], log["gcpo/reward/skipped"]) == (0.25, 0.0)


def test_weights_multiply_and_a_weight_of_zero_leaves_nobody_out(tiny_janus, tmp_path):
    advantages, _ = trained(tiny_janus, tmp_path, reward_weights=[1.0, 4.0])
    first, third, fourth = normalised([0.2 + 0.4, 0.6 + 1.2, 0.8 + 0.8]).tolist()
    assert_close(advantages, in_row(first, third, fourth), rtol=0, atol=1e-5)
    advantages, log = trained(tiny_janus, tmp_path, reward_weights=[1.0, 0.0])
    assert_close(advantages, normalised(STEADY), rtol=0, atol=1e-5)
    assert (log["gcpo/reward/flaky/missing"], log["gcpo/reward/skipped"]) == (0.25, 0.0)


def test_normalise_then_sum_gives_each_reward_the_same_say(tiny_janus, tmp_path):
    # Of the three images that count: steady (-1/3, 1/15, 4/15) / 0.305505, flaky (-1, 1, 0); their sum's mean is 0.
    advantages, _ = trained(tiny_janus, tmp_path, multi_objective_aggregation="normalize_then_sum")
    steady = normalised([0.2, 0.6, 0.8])
    assert_close(steady, torch.tensor([-1 / 3, 1 / 15, 4 / 15]) / (0.305505 + 1e-4), rtol=0, atol=1e-5)
    sums = steady + torch.tensor([-0.1, 0.1, 0.0]) / (0.1 + 1e-4)
    assert_close(advantages, in_row(*(sums / (sums.std(correction=1) + 1e-4)).tolist()), rtol=0, atol=1e-5)
    weighted, _ = trained(
        tiny_janus, tmp_path, multi_objective_aggregation="normalize_then_sum", reward_weights=[3.0, 1.0]
    )
    sums += 2 * steady
    assert_close(weighted, in_row(*(sums / (sums.std(correction=1) + 1e-4)).tolist()), rtol=0, atol=1e-5)


def test_a_group_without_difference_is_counted(tiny_janus, tmp_path):
    advantages, log = trained(tiny_janus, tmp_path, rewards=([0.5] * 4, [0.1, None, 0.1, 0.1]))
    assert advantages.tolist() == [0.0] * 4 and log["frac_reward_zero_std"] == 1.0


def test_rewards_for_different_rows_are_told_to_be_partial(tiny_janus, tmp_path, caplog):
    advantages, log = trained(tiny_janus, tmp_path, rewards=([0.2, None, 0.6, None], [None, 0.1, None, 0.3]))
    assert advantages.tolist() == [0.0] * 4 and log["gcpo/reward/skipped"] == 1.0
    assert "set reward_missing='partial'" in caplog.text


def test_only_rows_with_a_gap_change_and_the_argument_does_not():
    nan = float("nan")
    rewards = torch.tensor([[1.0, 2.0], [nan, 3.0], [4.0, nan], [nan, nan]])
    kept = without_partly_scored(rewards, torch.tensor([1.0, 1.0]))
    assert_close(kept, torch.tensor([[1.0, 2.0], [nan, nan], [nan, nan], [nan, nan]]), equal_nan=True)
    kept = without_partly_scored(rewards, torch.tensor([1.0, 0.0]))
    assert_close(kept, torch.tensor([[1.0, 2.0], [nan, nan], [4.0, nan], [nan, nan]]), equal_nan=True)
    assert rewards[1, 1] == 3.0


def test_an_unknown_way_to_treat_missing_rewards_is_named(tiny_janus, tmp_path):
    with pytest.raises(ValueError, match="reward_missing='zero' is unknown; use one of skip, partial"):
        janus_trainer(tiny_janus, tmp_path, reward_missing="zero")


# side by side


def waiting(name, mine, others, seen):
    """A reward that is finished only when another has begun."""

    def reward(prompts, completions, **columns):
        mine.set()
        seen[name] = others.wait(30)
        return [0.5] * len(prompts)

    reward.__name__ = name
    return reward


def test_remote_and_local_rewards_run_side_by_side(tiny_janus, tmp_path):
    # Each waits for the next one to begin, in a ring: one after another, none would ever end.
    pytest.importorskip("httpx2")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from gcpo_trl.rewards.server import build_app

    begun, seen = [threading.Event() for _ in range(4)], {}
    a, b, c, local = (
        waiting(name, begun[i], begun[(i + 1) % 4], seen) for i, name in enumerate(["a", "b", "c", "local"])
    )
    apps = [build_app(rewards, {name: {} for name in rewards}) for rewards in ({"a": a, "b": b}, {"c": c})]
    with serving(apps[0]) as one, serving(apps[1]) as other:  # two rewards of one server, and one of another
        remote = [Remote(url=url, name=name) for url, name in ((one, "a"), (one, "b"), (other, "c"))]
        trainer = janus_trainer(tiny_janus, tmp_path, reward=[local, *remote])
        trainer.train()
    assert seen == {"a": True, "b": True, "c": True, "local": True}
    assert trainer.state.log_history[0]["rewards/c/mean"] == 0.5


def test_local_rewards_beside_an_asynchronous_one_share_a_thread():
    threads = []

    def local(prompts, completions, **columns):
        threads.append(threading.current_thread())
        return [0.25]

    def other(prompts, completions, **columns):
        return local(prompts, completions)

    async def remote(prompts, completions, **columns):
        return [1.0]

    async def all_of(rewards):
        return await asyncio.gather(*(reward(prompts=["p"], completions=["c"]) for reward in rewards))

    assert asyncio.run(all_of(load_rewards([local, remote, other]))) == [[0.25], [1.0], [0.25]]
    assert threads[0] is threads[1] is not threading.main_thread()  # so they take turns
    assert load_rewards([local, other])[1](prompts=["p"], completions=["c"]) == [0.25]  # alone: called as ever
    assert threads[2] is threading.main_thread()

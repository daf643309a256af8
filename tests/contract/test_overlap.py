"""Pictures and rewards of a finished chunk beside the next one: the same training, begun earlier, nothing left over."""

import asyncio
import contextlib
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import PROMPTS, TOKENS, janus_trainer, record, shape_prompts
from torch.testing import assert_close
from trl.trainer.utils import start_event_loop_in_daemon

from gcpo_trl.rewards.loading import load_rewards
from gcpo_trl.rollout import Sampling, chunks, engine
from gcpo_trl.trainer import overlap
from gcpo_trl.trainer.overlap import EarlyRewards, decoded, starts_early

PATIENCE = 20  # seconds after which a wait for what never happens ends
EIGHT = {"per_device_train_batch_size": 8, "num_generations": 4}  # two groups
TWELVE = EIGHT | {"per_device_train_batch_size": 12}


class Asked:
    """An asynchronous reward, the sum of an image's tokens modulo 97, that keeps what it was called with."""

    def __init__(self):
        self.begun = threading.Event()
        self.calls = []
        self.__name__ = "asked"

    async def __call__(self, **arguments):
        self.begun.set()
        self.calls.append(arguments)
        values = [sum(ids) % 97 for ids in arguments["completion_ids"]]
        arguments["log_extra"]("sums", values)
        arguments["log_metric"]("largest", max(values))
        return [value / 97 for value in values]

    def sizes(self):
        return [len(call["prompts"]) for call in self.calls]


def local(prompts, completions, **columns):
    """A reward of the pictures that is not asynchronous."""
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in completions]


@pytest.fixture
def chunk(monkeypatch):
    """Called with a function, calls it before each chunk with the chunks drawn so far."""
    original, count = engine._sample_batch, [0]

    def install(before):
        def drawn(*arguments):
            before(count[0])
            count[0] += 1
            return original(*arguments)

        monkeypatch.setattr(engine, "_sample_batch", drawn)
        return count

    return install


@pytest.fixture
def loop():
    thread, loop, ready = start_event_loop_in_daemon("test")
    ready.wait()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def on(loop, coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(PATIENCE)


def tasks_of(trainer):
    async def tasks():
        return asyncio.all_tasks() - {asyncio.current_task()}

    return on(trainer.async_loop, tasks())


def reference_calls(trainer, before):
    """Call ``before`` ahead of each scoring without gradient."""
    score = trainer._get_per_token_logps_and_entropies

    def scored(*arguments, **settings):
        if not torch.is_grad_enabled():
            before()
        return score(*arguments, **settings)

    trainer._get_per_token_logps_and_entropies = scored


# the same training


def trained(model, folder, **changes):
    reward = Asked()
    trainer = janus_trainer(model, folder, reward=[reward, local], max_steps=2, **EIGHT, **changes)
    kept = record(trainer)
    trainer.train()
    return trainer, kept, reward


def pictures_of(reward):
    return np.stack([np.asarray(image) for call in reward.calls for image in call["completions"]]).astype(int)


@pytest.fixture(scope="module")
def in_turn(tiny_janus, tmp_path_factory):
    """Two steps with everything in turn."""
    return trained(tiny_janus, tmp_path_factory.mktemp("turn"), rollout_overlap=False)


@pytest.mark.parametrize("size", [0, 1, 3, 4])
def test_training_is_the_same(tiny_janus, tmp_path, in_turn, size):
    trainer, kept, reward = trained(tiny_janus, tmp_path, rollout_batch_size=size)
    other, expected, asked = in_turn
    for batch, same in zip(kept.batches, expected.batches, strict=True):
        for key in ("completion_ids", "tool_mask"):
            assert torch.equal(batch[key], same[key])
        assert_close(batch["advantages"], same["advantages"], rtol=0, atol=1e-4)
    assert_close(kept.losses, expected.losses, rtol=0, atol=1e-5)
    # A decoder's last bit depends on how many pictures it makes at once.
    assert np.abs(pictures_of(reward) - pictures_of(asked)).max() <= 1
    for log, same in zip(trainer.state.log_history[:2], other.state.log_history[:2], strict=True):
        assert log["rewards/asked/mean"] == same["rewards/asked/mean"]
        assert_close(log["rewards/local/mean"], same["rewards/local/mean"], rtol=0, atol=1e-5)
        assert log["gcpo/time/reward"] >= 0
    assert list(trainer._logs["extra"]["sums"]) == list(other._logs["extra"]["sums"])
    assert asked.sizes() == [8, 8]
    assert reward.sizes() == ([8, 8] if size == 0 else [4, 4, 4, 4])


def test_on_and_off_are_equal_to_the_bit(tiny_janus, tmp_path, in_turn):
    _, kept, reward = trained(tiny_janus, tmp_path)
    assert kept.losses == in_turn[1].losses
    assert np.array_equal(pictures_of(reward), pictures_of(in_turn[2]))


def test_a_reward_is_passed_what_trl_passes(tiny_janus, tmp_path, in_turn):
    trainer, _, reward = trained(tiny_janus, tmp_path)
    ours, theirs = reward.calls[0], in_turn[2].calls[0]
    assert (
        set(ours)
        == set(theirs)
        == {*("prompts", "completions", "completion_ids", "metadata", "trainer_state", "log_extra", "log_metric")}
    )
    for key in ("prompts", "completion_ids", "metadata"):
        assert ours[key] == theirs[key] and isinstance(ours[key], list)
    assert ours["trainer_state"] is trainer.state


# begun earlier


def test_an_asynchronous_reward_begins_before_the_last_chunk(tiny_janus, tmp_path, chunk):
    reward, seen = Asked(), []
    trainer = janus_trainer(tiny_janus, tmp_path, reward=reward, rollout_batch_size=4, **EIGHT)
    drawn = chunk(lambda count: seen.append(count == 0 or reward.begun.wait(PATIENCE)))
    trainer.train()
    assert seen == [True, True] and drawn == [2]


def test_with_one_chunk_it_begins_before_the_reference_and_a_local_one_after(tiny_janus, tmp_path):
    reward, events = Asked(), []

    def scored():
        events.append("reference" if reward.begun.wait(PATIENCE) else "too early")

    def last(prompts, completions, **columns):
        events.append("local")
        return [0.5] * len(prompts)

    trainer = janus_trainer(tiny_janus, tmp_path, reward=[reward, last])
    reference_calls(trainer, scored)
    trainer.train()
    assert events == ["reference", "local"]  # a CPU that draws is left alone by what only a thread made asynchronous


def test_in_turn_it_begins_after_the_reference(tiny_janus, tmp_path):
    reward, begun = Asked(), []
    trainer = janus_trainer(tiny_janus, tmp_path, reward=reward, rollout_overlap=False)
    reference_calls(trainer, lambda: begun.append(reward.begun.is_set()))
    trainer.train()
    assert begun == [False] and reward.begun.is_set()


def test_where_a_gpu_draws_a_local_reward_begins_early_too(tiny_janus, tmp_path, chunk, monkeypatch):
    begun, seen, threads = threading.Event(), [], set()

    def early(prompts, completions, **columns):
        begun.set()
        threads.add(threading.current_thread())
        return [0.5] * len(prompts)

    load = load_rewards
    monkeypatch.setattr("gcpo_trl.trainer.gcpo_trainer.load_rewards", lambda *given, beside: load(*given, beside=True))
    monkeypatch.setattr(
        "gcpo_trl.trainer.rollouts.starts_early", lambda reward, _: starts_early(reward, torch.device("cuda"))
    )
    trainer = janus_trainer(tiny_janus, tmp_path, reward=early, rollout_batch_size=4, **EIGHT)
    chunk(lambda count: seen.append(count == 0 or begun.wait(PATIENCE)))
    trainer.train()
    assert seen == [True, True] and threading.main_thread() not in threads and len(threads) == 1


def test_who_runs_ahead():
    asynchronous, threaded = load_rewards([Asked(), local])
    (alone,), module = load_rewards(local), torch.nn.Linear(1, 1)
    table = {asynchronous: (True, True), threaded: (False, True), alone: (False, False), module: (False, False)}
    for reward, expected in table.items():
        assert tuple(starts_early(reward, torch.device(device)) for device in ("cpu", "cuda")) == expected
    assert starts_early(load_rewards(local, beside=True)[0], torch.device("cuda"))


def test_evaluation_overlaps_by_its_own_groups(tiny_janus, tmp_path, chunk):
    results, sizes = [], []
    for size, on in ((0, False), (2, True)):
        reward = Asked()
        trainer = janus_trainer(
            tiny_janus,
            tmp_path,
            reward=reward,
            evaluated=shape_prompts(2),
            per_device_eval_batch_size=4,
            num_generations=4,
            num_generations_eval=2,
            rollout_batch_size=size,
            rollout_overlap=on,
        )
        results.append(trainer.evaluate())
        sizes.append(reward.sizes())
    assert sizes == [[4], [2, 2]]
    for name in ("eval_reward", "eval_loss", "eval_rewards/asked/std"):
        assert_close(results[0][name], results[1][name], rtol=0, atol=1e-6)


# whole groups, in order, one call at a time


def made(count):
    """Ids, and pictures that are their own numbers, of so many images."""
    return lambda first: ([[n] for n in range(first, first + count)], list(range(first, first + count)))


def asked_for(loop, rows, group, parts):
    """The images of each call of a reward that is told of images in parts of these sizes."""
    calls = []

    async def reward(prompts, completions, completion_ids, place, **_):
        assert [f"p{n}" for n in completions] == prompts and [[n] for n in completions] == completion_ids
        assert place == completions
        calls.append(completions)
        return completions

    data = [{"prompt": f"p{n}", "place": n} for n in range(rows)]
    with EarlyRewards({0: reward}, data, group, "state", loop) as ahead:
        first = 0
        for part in parts:
            ids, pictures = made(part)(first)
            ahead.add(ids, finished(pictures))
            first += part
        assert on(loop, ahead.answers()[0]()) == list(range(rows))
    return calls


def finished(pictures):
    future = Future()
    future.set_result(pictures)
    return future


@pytest.mark.parametrize(
    ("rows", "group", "parts", "expected"),
    [
        (8, 4, [8], [8]),
        (8, 4, [4, 4], [4, 4]),
        (8, 4, [1] * 8, [4, 4]),
        (8, 4, [3, 3, 2], [4, 4]),
        (8, 2, [3, 3, 2], [2, 4, 2]),
        (8, 2, [5, 3], [4, 4]),
        (6, 4, [2, 2, 2], [6]),  # the group in the middle lies on another rank too
        (3, 1, [1, 1, 1], [1, 1, 1]),
    ],
)
def test_a_reward_is_asked_for_whole_groups(loop, rows, group, parts, expected):
    assert [len(call) for call in asked_for(loop, rows, group, parts)] == expected


def test_a_reward_is_asked_one_thing_at_a_time(loop):
    events, gate = [], asyncio.Event()

    async def reward(completions, **_):
        events.append(("in", completions))
        await gate.wait()
        events.append(("out", completions))
        return completions

    async def turns():
        for _ in range(20):
            await asyncio.sleep(0)
        before = list(events)
        gate.set()
        return before

    with EarlyRewards({0: reward}, [{"prompt": "p"}] * 2, 1, None, loop) as ahead:
        ahead.add([[0]], finished([0]))
        ahead.add([[1]], finished([1]))
        assert on(loop, turns()) == [("in", [0])]
        assert on(loop, ahead.answers()[0]()) == [0, 1]
    assert events == [("in", [0]), ("out", [0]), ("in", [1]), ("out", [1])]


def test_what_is_logged_stands_in_the_order_of_the_images(loop):
    async def loud(completions, log_extra, log_metric, **_):
        log_extra("seen", [f"image {n}" for n in completions])
        if 0 not in completions:
            log_extra("rest", completions)
        log_metric("most", max(completions))
        return completions

    logged = {"extra": [], "metric": []}
    with EarlyRewards({0: loud, 1: loud}, [{"prompt": "p"}] * 3, 1, None, loop) as ahead:
        late = [Future() for _ in range(3)]
        for n, pictures in enumerate(late):
            ahead.add([[n]], pictures)
        assert logged["extra"] == []
        for n in (2, 0, 1):  # a chunk's pictures may be there before those of the one before
            late[n].set_result([n])
        for answer in ahead.answers().values():
            on(loop, answer())
        ahead.log(lambda *pair: logged["extra"].append(pair), lambda *pair: logged["metric"].append(pair))
    one = [("seen", ["image 0"]), ("seen", ["image 1"]), ("seen", ["image 2"])]
    one += [("rest", [None]), ("rest", [1]), ("rest", [2])]
    assert logged == {"extra": one * 2, "metric": [("most", 0), ("most", 1), ("most", 2)] * 2}


def test_the_table_and_the_metrics_of_a_run(tiny_janus, tmp_path):
    reward = Asked()
    trainer = janus_trainer(tiny_janus, tmp_path, reward=reward, rollout_batch_size=2, log_completions=True, **EIGHT)
    kept = record(trainer)
    trainer.train()
    sums = (kept.batches[0]["completion_ids"].sum(1) % 97).tolist()
    # TRL shuffles the batch after it has scored it; its table stands in the order of the images.
    logged = list(trainer._logs["extra"]["sums"])
    assert sorted(logged) == sorted(sums) and len(set(sums)) > 4
    assert [value / 97 for value in logged] == pytest.approx(list(trainer._logs["rewards"]["asked"]))
    assert trainer.state.log_history[0]["largest"] == (max(logged[:4]) + max(logged[4:])) / 2


def test_an_image_without_a_score_stays_one(tiny_janus, tmp_path):
    async def flaky(completion_ids, **_):
        return [None if n == 1 else float(n) for n, _ in enumerate(completion_ids)]

    trainer = janus_trainer(tiny_janus, tmp_path, reward=flaky, rollout_batch_size=4, **EIGHT)
    kept = record(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["gcpo/reward/flaky/missing"] == 0.25
    assert (kept.batches[0]["advantages"] == 0).sum() == 2


# failures


def frames(error):
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def test_an_error_of_a_reward_comes_up_where_rewards_are_calculated(tiny_janus, tmp_path, chunk):
    async def breaking(prompts, completion_ids, **_):
        raise RuntimeError(f"no text in {len(prompts)} images")

    async def hanging(**_):
        await asyncio.Event().wait()

    trainer = janus_trainer(tiny_janus, tmp_path, reward=[breaking, hanging], rollout_batch_size=4, **EIGHT)
    drawn = chunk(lambda count: None)
    with pytest.raises(RuntimeError, match="no text in 4 images") as caught:
        trainer.train()
    assert drawn == [2]
    assert "_calculate_rewards" in frames(caught.value) and frames(caught.value)[-1] == "breaking"
    assert tasks_of(trainer) == set() and trainer._early_rewards is None


def test_a_wrong_number_of_rewards_is_said_of_the_images_asked_for(tiny_janus, tmp_path):
    async def short(prompts, **_):
        return [0.5] * 3

    trainer = janus_trainer(tiny_janus, tmp_path, reward=short, rollout_batch_size=4, **EIGHT)
    with pytest.raises(ValueError, match="'short' returned 3 rewards for 4 images"):
        trainer.train()


def test_a_rollout_that_fails_takes_what_was_started_with_it(tiny_janus, tmp_path, chunk):
    begun, ended = threading.Event(), []

    async def hanging(**_):
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.2)  # it may have something to tidy up
            ended.append("cancelled")
            raise

    def break_the_last(count):
        if count == 2:
            assert begun.wait(PATIENCE)
            raise FloatingPointError("the image head gave non-finite logits")

    trainer = janus_trainer(tiny_janus, tmp_path, reward=hanging, rollout_batch_size=4, **TWELVE)
    chunk(break_the_last)
    with pytest.raises(FloatingPointError, match="step 0: the image head gave non-finite"):
        trainer.train()
    assert ended == ["cancelled"]  # the second call was never made
    assert tasks_of(trainer) == set() and trainer._early_rewards is None and trainer.model.training
    assert not trainer._pending_extra_logs


def test_a_thread_is_waited_for_when_its_reward_is_cancelled():
    begun, release, ended = threading.Event(), threading.Event(), []

    def slow(prompts, completions, **_):
        begun.set()
        release.wait(PATIENCE)
        ended.append(True)
        return [1.0]

    reward = load_rewards(slow, beside=True)[0]

    async def cancelled():
        first, second = (asyncio.create_task(reward(prompts=["p"], completions=["c"])) for _ in range(2))
        await asyncio.to_thread(begun.wait, PATIENCE)
        first.cancel()
        second.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not first.done() and second.done()  # the second had not begun
        release.set()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        assert first.cancelled() and ended == [True]

    asyncio.run(cancelled())


# chunks and pictures


def test_chunks_come_as_they_are_drawn_and_leave_the_model_as_it_was(policy, chunk):
    policy.model.train()
    drawn = chunk(lambda count: None)
    parts = chunks(policy, [PROMPTS[0]] * 3, 0, [0, 1, 2], Sampling(batch_size=2))
    assert drawn == [0]
    assert len(next(parts).tokens) == 2 and drawn == [1] and policy.model.training
    parts.close()
    assert drawn == [1] and policy.model.training


def test_a_decoder_in_its_own_stream_waits_for_the_tokens_and_is_waited_for(monkeypatch):
    # Streams are told apart by name; no GPU is needed to see who waits for whom.
    events, current = [], threading.local()

    @contextlib.contextmanager
    def entered(stream):
        current.name = stream.name
        yield
        current.name = "main"

    current.name = "main"
    side = SimpleNamespace(name="side", wait_stream=lambda other: events.append(f"side waits for {other.name}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(name=current.name))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: events.append(f"kept for {stream.name}"))
    pixels = torch.zeros(2, 1, 1, 3)
    policy = SimpleNamespace(pixels=lambda tokens: events.append(f"decoded in {current.name}") or pixels)

    def fetched(given):
        assert given is pixels
        events.append(f"fetched in {current.name} by {threading.current_thread().name}")
        return ["a", "b"]

    monkeypatch.setattr(overlap, "to_pictures", fetched)
    with ThreadPoolExecutor(1, "pictures") as thread:
        pictures = decoded(policy, torch.zeros(2, TOKENS, dtype=torch.long), side, thread)
        assert pictures.result(PATIENCE) == ["a", "b"]
    assert events == ["side waits for main", "decoded in side", "kept for side", "fetched in side by pictures_0"]

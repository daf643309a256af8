"""What can go wrong with a reward server, over loopback sockets: time is bounded, and what was scored is kept."""

import asyncio
import gzip
import json
import os
import pickle
import time

import pytest
from loopback import HEALTH, Faulty, cut, response, serving
from PIL import Image

from reward_funcs import _remote_legacy
from reward_funcs.remote import Remote, RemoteRewardError

pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

# Far more than any fault needs that is not about waiting; those set their own.
PATIENCE = {"connect_timeout": 5.0, "read_timeout": 10.0, "deadline": 30.0, "wait": 0.01}
SLACK = 8.0  # seconds a busy machine may need on top of what a fault waits for


def greys(count):
    """Pictures whose brightness is their number of 100."""
    return [Image.new("L", (4, 4), number) for number in range(count)]


def remote(url, **options):
    """The client under test; it reports failures as None however many they are, unless told otherwise."""
    return Remote(url=url, name="brightness", **(PATIENCE | {"max_failed": 1.0, "max_failed_batches": 1000} | options))


def ask(reward, count=4, images=None):
    """Rewards, and the seconds they took."""
    images = greys(count) if images is None else images
    start = time.monotonic()
    rewards = asyncio.run(reward(prompts=["p"] * len(images), completions=images))
    return rewards, time.monotonic() - start


def results(body, change=lambda results: results):
    """A right answer to a request: each picture's own number, as its place in the first request; or one ``change``d."""
    images = json.loads(body)["images"]
    right = [{"id": one["id"], "value": float(one["id"].rpartition("-")[2]), "error": None} for one in images]
    return response(json.dumps({"protocol": 1, "results": change(right)}).encode())


def replying(reply):
    """A server that answers ``reply(body)``."""
    return lambda faulty, connection, body: connection.sendall(reply(body))


def hang(faulty, connection, body):
    faulty.released.wait()


def trickle(faulty, connection, body):
    connection.sendall(response(b"", length=10**6))
    while not faulty.released.wait(0.1):
        connection.sendall(b" ")


def endless(faulty, connection, body):
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not faulty.released.is_set():
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


BOMB = gzip.compress(bytes(2**24))  # 16 MB of zeros in 16 kB


def packed(body):
    """An answer that nobody asked to be packed."""
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(BOMB)}\r\nConnection: close\r\n\r\n"
    return head.encode() + BOMB


def with_nan(results):
    results[1]["value"] = float("nan")  # Python's json writes and reads it, though JSON has none
    return results


def of_others(results):
    return [one | {"id": "somebody-else"} for one in results]


class Crafted:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (Crafted.folder,)


ALL = [0, 1, 2, 3]
# Behaviour, lost pictures of 4, requests, seconds waited, options that bound them, the reason in the log
FAULTS = {
    "500 with text": (replying(lambda b: response(b"Traceback ...", "500 Error")), ALL, 7, 0, {}, "HTTP 500: Trace"),
    "hang": (hang, ALL, 1, 0.5, {"read_timeout": 0.5}, "no answer within 0.5 s"),
    "slow trickle": (trickle, ALL, 1, 1.5, {"deadline": 1.5}, "the deadline of 1.5 s passed"),
    "truncated body": (replying(lambda b: results(b)[:-9]), ALL, 7, 0, {}, "the connection broke"),
    "short list": (replying(lambda b: results(b, lambda r: r[:1])), ALL, 1, 0, {}, "1 results for 4 pictures"),
    "NaN": (replying(lambda b: results(b, with_nan)), [1], 1, 0, {}, "gave 'nan', which is no finite number"),
    "out of range": (replying(results), [3], 1, 0, {"most": 2.0}, "gave 3, outside [-inf, 2]"),
    "wrong ids": (replying(lambda b: results(b, of_others)), ALL, 1, 0, {}, "the results are of other pictures"),
    "endless answer": (endless, ALL, 1, 0, {}, "longer than max_answer_bytes"),
    "packed answer": (replying(packed), ALL, 1, 0, {}, "is no JSON"),
    "busy": (replying(lambda b: response(b"come again", "503 Busy")), ALL, 3, 0, {}, "HTTP 503: come again"),
    "another protocol": (replying(lambda b: response(b'{"protocol": 2}')), ALL, 1, 0, {}, "speaks protocol 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_pictures_and_bounded_time(caplog, fault):
    behave, lost, requests, waited, options, reason = FAULTS[fault]
    with Faulty(behave) as server:
        rewards, took = ask(remote(server.url, **options))
    assert [index for index, reward in enumerate(rewards) if reward is None] == lost
    assert all(reward == index for index, reward in enumerate(rewards) if index not in lost)
    assert len(server.requests) == requests
    assert reason in caplog.text
    assert waited <= took + 0.05 and took < waited + SLACK


def test_a_server_that_went_away_is_tried_three_times(caplog):
    with Faulty(None) as server:
        reward = remote(server.url)
        reward.check()
    rewards, took = ask(reward)
    assert rewards == [None] * 4 and "cannot connect" in caplog.text and took < SLACK


def test_a_server_that_comes_back_in_time_costs_nothing():
    def busy_twice(faulty, connection, body):
        connection.sendall(response(b"", "502 Bad Gateway") if len(faulty.requests) < 3 else results(body))

    with Faulty(busy_twice) as server:
        assert ask(remote(server.url))[0] == [0, 1, 2, 3]
    assert len(server.requests) == 3


def test_a_server_killed_midway_costs_what_it_had_not_answered():
    # Batches of 2: the first is answered, the second kills the server; its halves find nobody.
    def die(faulty, connection, body):
        if len(faulty.requests) == 1:
            connection.sendall(results(body))
        else:
            faulty.stop()
            cut(connection)

    with Faulty(die) as server:
        rewards, took = ask(remote(server.url, batch_size=2))
    assert rewards == [0, 1, None, None] and len(server.requests) == 2 and took < SLACK


def test_a_broken_connection_costs_nothing_if_the_next_one_holds():
    def cut_once(faulty, connection, body):
        cut(connection) if len(faulty.requests) == 1 else connection.sendall(results(body))

    with Faulty(cut_once) as server:
        assert ask(remote(server.url))[0] == [0, 1, 2, 3]
    assert len(server.requests) == 3  # the batch, and its two halves


def test_a_client_error_is_not_tried_again():
    with Faulty(replying(lambda body: response(b"bad", "422 Unprocessable"))) as server:
        assert ask(remote(server.url), count=1)[0] == [None]
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", ["401 Unauthorized", "404 Not Found", "302 Found"])
def test_a_wrong_setting_ends_at_once(status):
    with Faulty(replying(lambda body: response(b"no", status))) as server:
        with pytest.raises(RemoteRewardError, match=f"answered HTTP {status[:3]}: no; "):
            ask(remote(server.url))
        assert len(server.requests) == 1


def test_a_redirect_and_a_proxy_are_not_followed(monkeypatch):
    with Faulty(replying(results)) as elsewhere, Faulty(None) as server:
        to = f"302 Found\r\nLocation: {elsewhere.url}/score"
        server.behave = replying(lambda body: response(b"", to))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, elsewhere.url)
        with pytest.raises(RemoteRewardError, match="HTTP 302"):
            ask(remote(server.url))
    assert elsewhere.requests == [] and len(server.requests) == 1


# poison


@pytest.fixture
def brightness_server():
    """The real server, and the batches that its reward was given. The reward dies of picture 13 in any batch."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from gcpo_trl.rewards.server import Limits, build_app

    batches = []

    def brightness(prompts, completions, **columns):
        batches.append([image.getpixel((0, 0)) for image in completions])
        if 13 in batches[-1]:
            raise ZeroDivisionError("poison")
        return batches[-1]

    with serving(build_app({"brightness": brightness}, {"brightness": {}}, limits=Limits(pixels=1000))) as url:
        yield url, batches


def test_only_the_poison_picture_of_32_is_lost(brightness_server, caplog):
    url, batches = brightness_server
    rewards, _ = ask(remote(url, max_failed=0.1), count=32)
    assert rewards == [None if level == 13 else level for level in range(32)]
    assert len(batches) == 1 + 2 * 5  # the whole, and two parts at each of 5 halvings
    assert "1 of 32 pictures lost: HTTP 500" in caplog.text and "ZeroDivisionError: poison" in caplog.text


def test_only_the_oversized_picture_is_lost(brightness_server, caplog):
    images = [Image.new("L", (4, 4), 7), Image.new("L", (40, 40)), Image.new("L", (25, 40), 9)]
    url, batches = brightness_server
    assert ask(remote(url), images=images)[0] == [7, None, 9]
    assert batches == [[7, 9]] and "it has 40 x 40 pixels, more than 1000" in caplog.text


# pickle


@pytest.mark.parametrize("legacy", [False, True])
def test_a_crafted_pickle_does_not_run(tmp_path, caplog, legacy):
    Crafted.folder = str(tmp_path / "executed")
    crafted = pickle.dumps({"brightness": [Crafted()] * 4})
    with Faulty(replying(lambda body: response(crafted))) as server:
        assert ask(remote(server.url, legacy_pickle=legacy))[0] == [None] * 4
    assert not os.path.exists(Crafted.folder)
    reason = f"the pickle asks for {os.mkdir.__module__}.mkdir" if legacy else "is no JSON"
    assert reason in caplog.text
    pickle.loads(crafted)  # it is a live one
    assert os.path.exists(Crafted.folder)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Crafted),  # a class by name
        b"cposix\nsystem\n(S'true'\ntR.",  # protocol 0
        b"(S'true'\niposix\nsystem\n.",  # INST
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",  # STACK_GLOBAL
        b"Pan id\n.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension code
        b"",
    ],
)
def test_no_opcode_reaches_a_name(content):
    with pytest.raises(_remote_legacy.AnswerError, match="no plain pickle"):
        _remote_legacy.loads(content)


# when to give up


def fail_on(*numbers):
    """A server that fails on the requests of these numbers, counted from 1."""
    return lambda faulty, connection, body: connection.sendall(
        response(b"{}") if len(faulty.requests) in numbers else results(body)
    )


@pytest.mark.parametrize(("share", "raises"), [(0.49, True), (0.5, False)])
def test_more_failures_than_max_failed_are_an_error(share, raises):
    with Faulty(fail_on(2)) as server:  # 2 of 4 pictures
        reward = remote(server.url, batch_size=2, max_failed=share)
        if raises:
            with pytest.raises(
                RemoteRewardError, match=r"2 of 4 pictures lost: .* More than max_failed=0.49 of a call"
            ):
                ask(reward)
        else:
            assert ask(reward)[0] == [0, 1, None, None]


def test_batches_that_fail_in_a_row_open_the_breaker_and_health_closes_it():
    with Faulty(fail_on(1, 3, 4)) as server:
        reward = remote(server.url, batch_size=1, max_failed_batches=2)
        with pytest.raises(RemoteRewardError, match="2 batches in a row failed, the last because"):
            ask(reward, count=6)
        assert len(server.requests) == 4  # the 2nd was right, so the 1st does not count; the 5th and 6th are not sent
        server.health = b"{}"
        with pytest.raises(RemoteRewardError, match="not usable"):
            ask(reward, count=2)
        assert len(server.requests) == 4  # a picture is sent only after health has answered
        server.health = HEALTH
        assert ask(reward, count=2)[0] == [0, 1]


@pytest.mark.parametrize(
    ("options", "health", "words"),
    [
        ({}, b"<html>", "is no JSON"),
        ({}, b'{"protocol": 2}', "speaks protocol 2, this client 1"),
        ({}, b'{"protocol": 1, "rewards": {"hpsv2": {}}}', "no reward 'brightness'; it has hpsv2"),
        ({"golden": 0.502}, None, "golden picture 0.5, not 0.502"),
        ({"batch_size": 9}, b'{"protocol":1,"rewards":{"brightness":{}},"limits":{"images":8}}', "takes 8 pictures"),
    ],
)
def test_a_server_that_cannot_serve_is_seen_at_the_start(options, health, words):
    with Faulty(replying(results)) as server:
        server.health = health or server.health
        with pytest.raises(RemoteRewardError, match=words):
            remote(server.url, **options).check()
        remote(server.url, golden=0.5005) if health else remote(server.url, golden=0.5005).check()
    with pytest.raises(RemoteRewardError, match=r"cannot connect.*Start it with `gcpo serve-rewards brightness`"):
        remote(server.url).check()

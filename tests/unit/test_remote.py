"""Remote rewards as used: the client, its settings, and the old pickle servers."""

import asyncio
import inspect
import io
import json
import pickle
import random
import sys

import pytest
from loopback import Faulty, response, serving
from PIL import Image

import reward_funcs.shapes
from gcpo_trl.rewards.loading import load_reward, load_rewards
from gcpo_trl.shapes.grammar import sample_specs
from gcpo_trl.shapes.renderer import draw
from reward_funcs.remote import Remote, RemoteRewardError, Server, reward, sent_columns

pytest.importorskip("httpx2")
pytest.importorskip("tenacity")
URL = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("URL", "NAME", "TOKEN", "TOKEN_FILE"):
        monkeypatch.delenv(f"REMOTE_REWARD_{name}", raising=False)


def shapes_app(token=""):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from gcpo_trl.rewards.server import build_app, default_goldens, golden_score

    rewards = {"shapes": reward_funcs.shapes.reward, "exact": reward_funcs.shapes.exact}
    goldens = {name: golden_score(function, default_goldens()) for name, function in rewards.items()}
    return build_app(rewards, goldens, token)


def test_the_values_are_those_of_the_reward_itself(monkeypatch):
    specs = sample_specs(6, seed=1)
    images = [draw(spec, random.Random(index)) for index, spec in enumerate(specs)]
    images[2] = None
    images[4] = Image.new("CMYK", (24, 24), (0, 255, 255, 0))  # a mode that PNG lacks: sent as RGB
    asked = [specs[0], *specs[2:], specs[1]]  # the first as drawn, the others not
    metadata = [json.dumps(spec.metadata) for spec in asked]
    batch = {"prompts": ["p"] * 6, "completions": images, "metadata": metadata, "completion_ids": [[1]] * 6}
    with serving(shapes_app()) as url:
        monkeypatch.setenv("REMOTE_REWARD_URL", url)
        remote = load_reward("reward_funcs.remote:shapes")
        assert remote.__name__ == "shapes" and inspect.iscoroutinefunction(remote)
        values = asyncio.run(remote(**batch, trainer_state=object(), log_metric=print))
    assert values == reward_funcs.shapes.reward(**batch)
    assert values[0] == 1.0 and values[2] is None and len(set(values)) > 3


def test_the_server_is_checked_when_a_trainer_loads_its_rewards(monkeypatch):
    with serving(shapes_app()) as url:
        monkeypatch.setenv("REMOTE_REWARD_URL", url)
        monkeypatch.setenv("REMOTE_REWARD_NAME", "shapes")
        remote, other = load_rewards(["remote", "reward_funcs.remote:exact"])
        assert (remote.__name__, other.__name__) == ("remote", "exact")
        monkeypatch.setenv("REMOTE_REWARD_GOLDEN", "1.0")  # a red disc is a red circle
        load_rewards(["reward_funcs.remote:shapes"])
        with pytest.raises(RemoteRewardError, match="no reward 'shaeps'; it has exact, shapes"):
            load_rewards(["reward_funcs.remote:shaeps"])
        monkeypatch.setenv("REMOTE_REWARD_GOLDEN", "0.9")
        with pytest.raises(RemoteRewardError, match=r"golden picture 1.0, not 0.9"):
            load_rewards(["reward_funcs.remote:shapes"])


def test_the_token_comes_from_a_file_or_the_environment(monkeypatch, tmp_path):
    token = "a-token-of-some-length"
    (tmp_path / "token").write_text(f"{token}\n")
    with serving(shapes_app(token)) as url:
        with pytest.raises(RemoteRewardError, match=r"HTTP 401.*set REMOTE_REWARD_TOKEN or REMOTE_REWARD_TOKEN_FILE"):
            Remote(url=url, name="shapes").check()
        Remote(url=url, name="shapes", token_file=str(tmp_path / "token")).check()
        monkeypatch.setenv("REMOTE_REWARD_TOKEN", token)
        Remote(url=url, name="shapes").check()
        assert token not in repr(Server(url=url, name="shapes"))
        monkeypatch.setenv("REMOTE_REWARD_TOKEN", "another-token-of-some-length")
        with pytest.raises(RemoteRewardError, match="HTTP 401"):
            Remote(url=url, name="shapes").check()


# settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"url=''; give REMOTE_REWARD_URL"),
        ({"url": "ftp://host"}, "url='ftp://host'"),
        ({"url": "http://me:secret@host"}, "a token goes into a file"),
        ({"url": URL, "name": ""}, "no name; give REMOTE_REWARD_NAME"),
        ({"url": URL, "tries": 4}, "tries=4 must be 1 to 3"),
        ({"url": URL, "deadline": 0.0}, "deadline=0.0 must be positive"),
        ({"url": URL, "max_failed": 1.5}, "max_failed=1.5 must be a share"),
    ],
)
def test_a_wrong_setting_is_named(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        Server(**({"name": "shapes"} | options))
    assert "secret" not in str(caught.value)


def test_the_environment_sets_what_the_caller_does_not(monkeypatch):
    for name, text in {"URL": URL, "NAME": "shapes", "DEADLINE": "7.5", "BATCH_SIZE": "3"}.items():
        monkeypatch.setenv(f"REMOTE_REWARD_{name}", text)
    server = Server(batch_size=4)
    assert (server.url, server.name, server.deadline, server.batch_size) == (URL, "shapes", 7.5, 4)
    monkeypatch.setenv("REMOTE_REWARD_DEADLINE", "soon")
    with pytest.raises(ValueError, match="REMOTE_REWARD_DEADLINE='soon' is no float"):
        Server()


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(ImportError, match=r"tenacity is not installed; .* 'gcpo_trl\[remote\]'"):
        Remote(url=URL, name="shapes").check()


def test_a_text_policy_is_told_that_pictures_are_scored():
    with pytest.raises(TypeError, match=r"completions\[0\] is str"):
        asyncio.run(reward(prompts=["p"], completions=["text"]))


# columns


def test_the_columns_of_the_dataset_are_sent_and_nothing_else():
    columns = {"metadata": ["{}", None], "tags": [["a"], {"b": 1.5}], "completion_ids": [[1], [2]], "trainer_state": 1}
    assert sent_columns(columns, 2, None) == {"metadata": ["{}", None], "tags": [["a"], {"b": 1.5}]}
    assert sent_columns(columns, 2, ["metadata"]) == {"metadata": ["{}", None]}
    with pytest.raises(ValueError, match="the dataset has no metadeta"):
        sent_columns(columns, 2, ["metadeta"])
    with pytest.raises(ValueError, match="'tags' has 2 entries for 3 pictures"):
        sent_columns(columns, 3, ["tags"])
    with pytest.raises(TypeError, match=r"'reference_image' holds a Image.*name the columns to send"):
        sent_columns({"reference_image": [Image.new("L", (1, 1))]}, 1, None)


# old servers


def old_server(answer):
    """A server of the old protocol that keeps what it was asked."""
    asked = []

    def behave(faulty, connection, body):
        asked.append(pickle.loads(body))
        connection.sendall(response(pickle.dumps(answer), kind="application/octet-stream"))

    return Faulty(behave, health=b"not asked"), asked


def test_an_old_geneval_server_is_asked_in_its_own_words():
    server, asked = old_server({"scores": [0.75, -14, float("nan")], "rewards": [1.0, 0.0, 1.0], "group_rewards": {}})
    images = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    metadata = ['{"tag": "counting", "include": []}'] * 3
    with server:
        for name, values in {"scores": [0.75, -14.0, None], "rewards": [1.0, 0.0, 1.0]}.items():
            remote = Remote(url=server.url, name=name, legacy_pickle=True)
            remote.check()  # there is nothing to ask
            assert asyncio.run(remote(prompts=list("abc"), completions=images, metadata=metadata)) == values
    assert asked[0].keys() == {"images", "prompts", "meta_datas", "only_strict"}
    assert asked[0]["meta_datas"] == [{"tag": "counting", "include": []}] * 3 and asked[0]["prompts"] == list("abc")
    picture = Image.open(io.BytesIO(asked[0]["images"][2]), formats=["JPEG"])
    assert picture.size == (16, 16) and picture.getpixel((8, 8))[2] > 250


def test_an_old_deqa_server_needs_no_metadata_and_a_wrong_key_is_named(caplog):
    server, asked = old_server({"outputs": [0.5]})
    image = Image.new("RGB", (16, 16))
    with server:
        remote = Remote(url=server.url, name="outputs", legacy_pickle=True)
        assert asyncio.run(remote(prompts=["p"], completions=[image])) == [0.5]
        assert "meta_datas" not in asked[0]
        remote = Remote(url=server.url, name="scores", legacy_pickle=True, max_failed=1.0)
        assert asyncio.run(remote(prompts=["p"], completions=[image])) == [None]
    assert "no list 'scores', but ['outputs']" in caplog.text

"""The reward server: who may ask, what it takes, and that it answers while it works."""

import base64
import hashlib
import io
import json
import pickle
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from loopback import serving
from PIL import Image

from gcpo_trl.cli.main import main
from gcpo_trl.cli.serve_rewards import check_host, read_token
from reward_funcs.remote import Remote

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from gcpo_trl.rewards.server import Limits, build_app, default_goldens, golden_score, read_golden  # noqa: E402

TOKEN = "a-token-of-some-length"
LIMITS = Limits(bytes=20_000, images=3, pixels=10_000, waiting=2)


def width(prompts, completions, **columns):
    """A reward that is right or raises, as the prompt says."""
    if "fail" in prompts:
        raise ZeroDivisionError("asked to fail")
    return [None if prompt == "none" else image.width for prompt, image in zip(prompts, completions, strict=True)]


def png(size=(5, 4), form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, format=form)
    return buffer.getvalue()


def item(data=None, id="a", **changes):
    data = png() if data is None else data
    sha256 = hashlib.sha256(data).hexdigest()
    return {"id": id, "sha256": sha256, "png": base64.b64encode(data).decode(), "prompt": "p", "columns": {}} | changes


def batch(*items, **changes):
    return {"protocol": 1, "reward": "width", "images": list(items)} | changes


@pytest.fixture(scope="module")
def url():
    with serving(build_app({"width": width}, {"width": {"golden": 1.0, "error": None}}, TOKEN, LIMITS)) as url:
        yield url


def post(url, content, kind="application/json", token=TOKEN):
    content = json.dumps(content).encode() if isinstance(content, dict) else content
    headers = {"Content-Type": kind, "Authorization": f"Bearer {token}"}
    return httpx2.post(f"{url}/score", content=content, headers=headers, trust_env=False, timeout=20)


def test_each_picture_has_its_result(url):
    answer = post(url, batch(item(id="x"), item(png((7, 2)), id="y"), item(id="z", prompt="none")))
    assert answer.json() == {
        "protocol": 1,
        "results": [
            {"id": "x", "value": 5.0, "error": None},
            {"id": "y", "value": 7.0, "error": None},
            {"id": "z", "value": None, "error": None},
        ],
    }


def test_health_tells_version_rewards_and_limits(url):
    import gcpo_trl

    headers = {"Authorization": f"Bearer {TOKEN}"}
    health = httpx2.get(f"{url}/health", headers=headers, trust_env=False).json()
    assert health["protocol"] == 1 and health["version"] == gcpo_trl.__version__
    assert health["rewards"] == {"width": {"golden": 1.0, "error": None}} and health["limits"]["images"] == 3


# who may ask


@pytest.mark.parametrize("authorization", [None, "Bearer wrong-token-of-some-length", f"Basic {TOKEN}", "Bearer é"])
@pytest.mark.parametrize("path", ["/health", "/score"])
def test_without_the_token_there_is_nothing(url, path, authorization):
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    answer = httpx2.request("POST" if path == "/score" else "GET", url + path, headers=headers, trust_env=False)
    assert answer.status_code == 401 and "token" in answer.text


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/"])
def test_there_are_no_other_pages(url, path):
    assert httpx2.get(url + path, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False).status_code == 404


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my-machine"])
def test_off_loopback_a_token_is_needed(host):
    with pytest.raises(ValueError, match=f"--host {host} can be reached from other machines, and there is no token"):
        check_host(host, "")
    check_host(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_on_loopback_no_token_is_needed(host):
    check_host(host, "")


def test_the_command_refuses_before_it_loads_anything(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("REMOTE_REWARD_TOKEN", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(["serve-rewards", "no_such_reward", "--host", "0.0.0.0"])
    assert "there is no token" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["serve-rewards", "shaeps"])
    assert "did you mean 'shapes'" in capsys.readouterr().err
    (tmp_path / "token").write_text("short\n")
    with pytest.raises(ValueError, match="the token has 5 characters, fewer than 16"):
        read_token(tmp_path / "token")


# what it takes


def bomb():
    """A valid PNG of 50 000 x 50 000 pixels, 2.5 GB unpacked, in a few hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**5))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (item(bomb()), "Image size (2500000000 pixels) exceeds limit"),
        (item(png((101, 100))), "it has 101 x 100 pixels, more than 10000"),
        (item(png(form="JPEG")), "cannot identify image file"),
        (item(png((90, 90))[:60]), "truncated"),
        (item(pickle.dumps(1)), "cannot identify image file"),
        (item(sha256="0" * 64), "its bytes do not have its SHA-256"),
        (item(png="$$$$"), "refused"),
    ],
    ids=["bomb", "large", "jpeg", "truncated", "pickle", "sha256", "base64"],
)
def test_a_wrong_picture_is_an_error_of_its_own(url, wrong, error):
    results = post(url, batch(item(id="b"), wrong)).json()["results"]
    assert results[0] == {"id": "b", "value": 5.0, "error": None}
    assert results[1]["value"] is None and error in results[1]["error"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (pickle.dumps(batch(item())), "application/octet-stream", 415, "send application/json"),
        (pickle.dumps(batch(item())), "application/json", 422, "Invalid JSON"),
        (json.dumps(batch(item())).encode(), "text/plain", 415, "'text/plain' is not accepted"),
        (batch(item(), protocol=2), "application/json", 422, "protocol: Input should be 1"),
        (batch(item(), reward="hight"), "application/json", 404, "no reward 'hight'; here are width"),
        (batch(item(extra=1)), "application/json", 422, "extra"),
        (batch(item(prompt=["p"])), "application/json", 422, "prompt"),
        (batch(*[item()] * 4), "application/json", 413, "4 pictures, more than 3"),
        (b" " * 20_001, "application/json", 413, "longer than 20000 bytes"),
        (batch(item(), item(prompt="fail")), "application/json", 500, "width: ZeroDivisionError: asked to fail"),
    ],
)
def test_a_wrong_request_is_refused_as_a_whole(url, content, kind, status, words):
    answer = post(url, content, kind)
    assert answer.status_code == status and words in answer.text


# while it works


def test_health_answers_and_a_full_queue_refuses_while_a_batch_is_scored():
    started, go_on = threading.Event(), threading.Event()

    def slow(prompts, completions, **columns):
        started.set()
        assert go_on.wait(20)
        return [1.0] * len(prompts)

    answers = []
    with serving(build_app({"slow": slow}, {}, limits=Limits(waiting=1))) as url:
        asking = threading.Thread(target=lambda: answers.append(post(url, batch(item(), reward="slow"))))
        asking.start()
        assert started.wait(20)
        assert httpx2.get(f"{url}/health", trust_env=False).status_code == 200
        busy = post(url, batch(item(), reward="slow"))
        assert busy.status_code == 503 and "1 requests are waiting" in busy.text
        go_on.set()
        asking.join(20)
        assert answers[0].json()["results"][0]["value"] == 1.0
        assert post(url, batch(item(), reward="slow")).status_code == 200  # the place is free again


# golden scores


def test_the_golden_score_tells_rewards_apart(tmp_path):
    from reward_funcs.shapes import reward

    assert golden_score(reward, default_goldens()) == {"golden": 1.0, "error": None}  # a red disc is a red circle
    assert golden_score(lambda prompts, completions, depth, **c: [1.0], default_goldens())["golden"] is None
    Image.new("RGB", (12, 3)).save(tmp_path / "golden.png")
    (tmp_path / "golden.json").write_text('{"image": "golden.png", "prompt": "p", "columns": {"depth": 2}}')
    golden = read_golden(tmp_path / "golden.json")
    assert golden_score(lambda prompts, completions, depth: [completions[0].width * depth[0]], [golden]) == {
        "golden": 24,
        "error": None,
    }
    (tmp_path / "golden.json").write_text('{"image": "golden.png"}')
    with pytest.raises(ValueError, match="must hold an object with 'image', 'prompt'"):
        read_golden(tmp_path / "golden.json")


def test_weights_that_are_missing_keep_the_server_from_starting():
    def missing(prompts, completions, **columns):
        raise FileNotFoundError("no weights")

    with pytest.raises(FileNotFoundError, match="no weights"):
        golden_score(missing, default_goldens())


# the command


def test_the_command_serves_what_a_client_asks_for(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gcpo_trl", "serve-rewards", "shapes", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        assert process.stdout.readline() == "shapes: golden score 1.0\n"
        assert process.stdout.readline() == f"serving shapes at http://127.0.0.1:{port}\n"
        Remote(url=f"http://127.0.0.1:{port}", name="shapes", golden=1.0).check()
    finally:
        process.terminate()
        process.wait(20)

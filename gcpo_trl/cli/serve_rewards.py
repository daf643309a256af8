"""``gcpo serve-rewards``: rewards by name over HTTP, for `reward_funcs: ["reward_funcs.remote:NAME"]` elsewhere."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path

from ..extras import require
from ..rewards.loading import load_reward
from .console import say

TOKEN_VARIABLE = "REMOTE_REWARD_TOKEN"  # the client's, so that one setting serves both
LEAST_TOKEN = 16  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("rewards", nargs="+", help="names of files in reward_funcs, or 'package.module:function'")
    parser.add_argument("--host", default="127.0.0.1", help="any other than loopback needs a token")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token-file", type=Path, default=None, help=f"bearer token; or set {TOKEN_VARIABLE}")
    parser.add_argument("--golden", type=Path, default=None, help="JSON of a picture whose score /health tells")
    parser.add_argument("--max-images", type=int, default=256, help="pictures in a request")
    parser.add_argument("--max-bytes", type=int, default=64 * 2**20, help="length of a request")
    parser.add_argument("--max-pixels", type=int, default=2048 * 2048, help="pixels of a picture")


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Load the rewards and score the golden picture with each; the returned function serves until it is stopped."""
    token = read_token(options.token_file)
    check_host(options.host, token)
    require("fastapi", "serve")
    require("uvicorn", "serve")
    import uvicorn

    from ..rewards.server import Limits, build_app, default_goldens, golden_score, read_golden

    pictures = default_goldens() if options.golden is None else [read_golden(options.golden)]
    rewards = {}
    for name in options.rewards:
        reward = load_reward(name)
        if reward.__name__ in rewards:
            raise ValueError(f"two rewards are called {reward.__name__!r}; serve them from two servers")
        rewards[reward.__name__] = reward
    goldens = {name: golden_score(reward, pictures) for name, reward in rewards.items()}
    for name, golden in goldens.items():
        if options.golden is not None and golden["error"] is not None:
            raise ValueError(f"{name} cannot score {options.golden}: {golden['error']}")
        say(f"{name}: golden score {golden['golden']}" + (f" ({golden['error']})" if golden["error"] else ""))
    limits = Limits(bytes=options.max_bytes, images=options.max_images, pixels=options.max_pixels)
    app = build_app(rewards, goldens, token, limits)

    def serve() -> int:
        say(f"serving {', '.join(rewards)} at http://{options.host}:{options.port}")
        uvicorn.run(
            app, host=options.host, port=options.port, log_level="warning", access_log=False, server_header=False
        )
        return 0

    return serve


def read_token(file: Path | None) -> str:
    """The token of the file, or else of the environment; empty if there is neither."""
    token = file.read_text().strip() if file is not None else os.environ.get(TOKEN_VARIABLE, "")
    if (token or file is not None) and len(token) < LEAST_TOKEN:
        raise ValueError(
            f"the token has {len(token)} characters, fewer than {LEAST_TOKEN}; make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return token


def check_host(host: str, token: str) -> None:
    """Refuse an address that others can reach unless they need a token."""
    if token or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False  # a name: who knows where it leads
    if not loopback:
        raise ValueError(
            f"--host {host} can be reached from other machines, and there is no token; give --token-file or "
            f"{TOKEN_VARIABLE}, or stay on 127.0.0.1"
        )

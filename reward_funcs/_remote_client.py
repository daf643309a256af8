"""The client of one reward on one server: what may go wrong, and how long it may take.

    one call -> batches -> requests     each batch within `deadline` seconds, whatever the server does

    cannot connect, 429, 502, 503, 504         the request is tried again, at most 3 times in all, with growing jitter
    500, 4xx of the batch, connection broken   the batch is halved until the picture that does it stands alone
    no answer in time, an answer not to be     the batch is lost; asking for less of it would not help
    believed, still busy after the tries
    401, 403, 404, 405, a redirect             a setting is wrong: RemoteRewardError at once

A lost picture has no value, and the error tells why.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from reward_funcs import _remote_legacy, _remote_wire
from reward_funcs._remote_wire import AnswerError, Picture, Result

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

PREFIX = "REMOTE_REWARD_"
TOKEN_VARIABLE = PREFIX + "TOKEN"
BUSY = (429, 502, 503, 504)
MISCONFIGURED = (401, 403, 404, 405)
MOST_TRIES = 3


class RemoteRewardError(RuntimeError):
    """The server cannot be used as set, or fails too much to train on."""


class Busy(Exception):
    """Nobody took the request; another try may find somebody."""


class Refused(Exception):
    """The server choked on the batch; a part of it may pass."""


class BatchLost(Exception):
    """No usable answer, and none to be had by asking again."""


def setting(name: str, default: Any) -> Any:
    """A field that REMOTE_REWARD_<name> sets where the caller does not."""

    def read() -> Any:
        text = os.environ.get(PREFIX + name)
        try:
            return default if text is None else type(default)(text)
        except ValueError as error:
            raise ValueError(f"{PREFIX}{name}={text!r} is no {type(default).__name__}") from error

    return field(default_factory=read)


@dataclass(frozen=True)
class Server:
    """Where the reward is and how much patience it gets; times in seconds. Unset, REMOTE_REWARD_<NAME> decides.

    The token is read from the file ``token_file``, or else from REMOTE_REWARD_TOKEN: never from a recipe or a URL.
    """

    url: str = setting("URL", "")
    name: str = setting("NAME", "")  # of the reward on the server
    token_file: str = setting("TOKEN_FILE", "")
    batch_size: int = setting("BATCH_SIZE", 32)  # pictures in a request
    connect_timeout: float = setting("CONNECT_TIMEOUT", 5.0)
    read_timeout: float = setting("READ_TIMEOUT", 120.0)  # between two pieces of an answer, the first above all
    deadline: float = setting("DEADLINE", 300.0)  # of a batch, with all its tries and halvings
    tries: int = setting("TRIES", MOST_TRIES)
    wait: float = setting("WAIT", 1.0)  # before the second try, doubled before the third; as much again at random
    max_failed: float = setting("MAX_FAILED", 0.5)  # share of a call's pictures that may be lost
    max_failed_batches: int = setting("MAX_FAILED_BATCHES", 3)  # in a row, before no more is asked
    max_answer_bytes: int = setting("MAX_ANSWER_BYTES", 2**20)
    least: float = setting("LEAST", -math.inf)
    most: float = setting("MOST", math.inf)
    golden: float = setting("GOLDEN", math.nan)  # score of the server's golden picture; NaN compares nothing
    golden_tolerance: float = setting("GOLDEN_TOLERANCE", 1e-3)
    legacy_pickle: bool = False  # speak pickle to an old Flow-GRPO server: read _remote_legacy.py first

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={self.url!r}; give {PREFIX}URL or Server(url=) such as 'http://127.0.0.1:8000'")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(f"the url of {parts.hostname} has more than host, port and path; a token goes into a file")
        if not self.name:
            raise ValueError(f"the reward on the server has no name; give {PREFIX}NAME or Server(name=)")
        for name in ("connect_timeout", "read_timeout", "deadline", "batch_size", "max_failed_batches"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 1 <= self.tries <= MOST_TRIES:
            raise ValueError(f"tries={self.tries} must be 1 to {MOST_TRIES}; more only makes a sick server sicker")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed={self.max_failed} must be a share in [0, 1]")
        if not self.wait >= 0:
            raise ValueError(f"wait={self.wait} must be >= 0")

    def token(self) -> str:
        """The bearer token; empty if there is none."""
        if not self.token_file:
            return os.environ.get(TOKEN_VARIABLE, "")
        token = Path(self.token_file).expanduser().read_text().strip()
        if not token:
            raise ValueError(f"the token file {self.token_file} is empty")
        return token


class Client:
    """Asks one reward of one server, and remembers whether it answers."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.wire: ModuleType = _remote_legacy if server.legacy_pickle else _remote_wire
        self.usable = False  # the server's health has been seen since it last failed too often
        self.failed_in_a_row = 0

    async def score(self, pictures: Sequence[Picture]) -> dict[str, Result]:
        """Result of each picture by id. Raises RemoteRewardError if too many are lost."""
        results: dict[str, Result] = {}
        async with self._session() as http:
            if not self.usable:
                await self._check(http)
            for start in range(0, len(pictures), self.server.batch_size):
                batch = pictures[start : start + self.server.batch_size]
                results |= await self._batch(http, batch)
                self._count_failures([results[picture.id] for picture in batch])
        lost = [result.error for result in results.values() if result.error is not None]
        if lost:
            said = f"{self.server.name} at {self.server.url}: {len(lost)} of {len(results)} pictures lost: {lost[0]}"
            if len(lost) > self.server.max_failed * len(results):
                raise RemoteRewardError(f"{said}. More than max_failed={self.server.max_failed:g} of a call")
            logger.warning("%s", said)
        return results

    async def check(self) -> None:
        """Raise RemoteRewardError unless the server is up, speaks this protocol and has the reward."""
        async with self._session() as http:
            await self._check(http)

    def _session(self) -> httpx2.AsyncClient:
        """A client for one call: it belongs to the event loop it is made in. No proxy, no cookie, no redirect."""
        httpx2, _ = libraries()
        server, token = self.server, self.server.token()
        headers = {"Accept-Encoding": "identity"}  # so that the size of an answer is the size that is read
        if token:
            headers["Authorization"] = f"Bearer {token}"
        timeout = httpx2.Timeout(server.read_timeout, connect=server.connect_timeout)
        return httpx2.AsyncClient(headers=headers, timeout=timeout, trust_env=False, follow_redirects=False)

    def _count_failures(self, results: Sequence[Result]) -> None:
        """The circuit breaker: raise when too many batches in a row brought nothing; health then closes it."""
        if any(result.error is None for result in results):
            self.failed_in_a_row = 0
            return
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= self.server.max_failed_batches:
            count, self.failed_in_a_row, self.usable = self.failed_in_a_row, 0, False
            raise RemoteRewardError(
                f"{self.server.name} at {self.server.url}: {count} batches in a row failed, the last because "
                f"{results[-1].error}. Mend the server and resume, or raise max_failed_batches"
            )

    async def _batch(self, http: httpx2.AsyncClient, batch: Sequence[Picture]) -> dict[str, Result]:
        """Result of each picture of a batch, within the deadline."""
        results: dict[str, Result] = {}
        parts = [batch]
        reason = ""
        try:
            async with asyncio.timeout(self.server.deadline):
                while parts:
                    part = parts.pop()
                    try:
                        results |= await self._ask(http, part)
                    except Refused as error:
                        if len(part) == 1:
                            results[part[0].id] = Result(error=str(error))
                        else:
                            middle = len(part) // 2
                            parts += [part[middle:], part[:middle]]
        except TimeoutError:
            reason = f"the deadline of {self.server.deadline:g} s passed"
        except (Busy, BatchLost, AnswerError) as error:
            reason = str(error)
        return {picture.id: results.get(picture.id, Result(error=reason)) for picture in batch}

    async def _ask(self, http: httpx2.AsyncClient, pictures: Sequence[Picture]) -> dict[str, Result]:
        name = self.server.name
        body = await asyncio.to_thread(self.wire.body, pictures, name)  # other rewards' answers are not kept waiting
        content = await self._send(http, "POST", self.wire.SCORE, body)
        results: dict[str, Result] = self.wire.read(content, pictures, name)
        return {id: self._in_range(result) for id, result in results.items()}

    def _in_range(self, result: Result) -> Result:
        least, most = self.server.least, self.server.most
        if result.value is None or least <= result.value <= most:
            return result
        return Result(error=f"the server gave {result.value:g}, outside [{least:g}, {most:g}]")

    async def _send(self, http: httpx2.AsyncClient, method: str, path: str, body: bytes = b"") -> bytes:
        """The body of a good answer, after as many tries as a busy server gets."""
        _, tenacity = libraries()
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Busy),
            stop=tenacity.stop_after_attempt(self.server.tries),
            wait=tenacity.wait_exponential(self.server.wait) + tenacity.wait_random(0, self.server.wait),
            reraise=True,
        )
        content: bytes = await attempts(self._send_once, http, method, path, body)
        return content

    async def _send_once(self, http: httpx2.AsyncClient, method: str, path: str, body: bytes) -> bytes:
        httpx2, _ = libraries()
        headers = {"Content-Type": self.wire.CONTENT_TYPE} if body else {}
        url = self.server.url.rstrip("/") + path
        try:
            async with http.stream(method, url, content=body, headers=headers) as response:
                content = await self._limited(response)
                check_status(response.status_code, content, url)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Busy(f"cannot connect: {error or type(error).__name__}") from error
        except httpx2.TimeoutException as error:
            raise BatchLost(f"no answer within {self.server.read_timeout:g} s") from error
        except httpx2.TransportError as error:
            raise Refused(f"the connection broke: {error or type(error).__name__}") from error
        return content

    async def _limited(self, response: httpx2.Response) -> bytes:
        """The body as it came, not unpacked; BatchLost as soon as it is too long."""
        content = bytearray()
        async for piece in response.aiter_raw():
            content += piece
            if len(content) > self.server.max_answer_bytes:
                raise BatchLost(f"the answer is longer than max_answer_bytes={self.server.max_answer_bytes}")
        return bytes(content)

    async def _check(self, http: httpx2.AsyncClient) -> None:
        server = self.server
        if server.legacy_pickle:
            logger.warning("%s: an old server, which unpickles what anyone posts; it has no health to ask", server.url)
        else:
            try:
                async with asyncio.timeout(server.deadline):
                    health = _remote_wire.read_health(await self._send(http, "GET", _remote_wire.HEALTH))
            except (Busy, Refused, BatchLost, AnswerError, TimeoutError) as error:
                reason = str(error) or f"the deadline of {server.deadline:g} s passed"
                raise RemoteRewardError(
                    f"the reward server {server.url} is not usable: {reason}. Start it with "
                    f"`gcpo serve-rewards {server.name}`, or correct {PREFIX}URL"
                ) from error
            check_health(health, server)
        self.usable = True


def check_status(status: int, content: bytes, url: str) -> None:
    """Return on 200; otherwise raise what the status calls for, with the beginning of what the server said."""
    said = f"HTTP {status}: {content[:200].decode(errors='replace')}"
    if status == 200:
        return
    if status in BUSY:
        raise Busy(said)
    if status in MISCONFIGURED or 300 <= status < 400:
        hint = f"set {TOKEN_VARIABLE} or {PREFIX}TOKEN_FILE" if status in (401, 403) else f"correct {PREFIX}URL or NAME"
        raise RemoteRewardError(f"{url} answered {said}; {hint}")
    raise Refused(said)


def check_health(health: dict[str, Any], server: Server) -> None:
    """Raise RemoteRewardError if the server lacks the reward, takes smaller batches, or has another golden score."""
    rewards = health["rewards"]
    if server.name not in rewards:
        raise RemoteRewardError(f"{server.url} has no reward {server.name!r}; it has {', '.join(sorted(rewards))}")
    most = (health.get("limits") or {}).get("images", math.inf)
    if server.batch_size > most:
        raise RemoteRewardError(f"batch_size={server.batch_size}, but {server.url} takes {most:g} pictures a request")
    golden, error = (rewards[server.name] or {}).get("golden"), (rewards[server.name] or {}).get("error")
    if not math.isnan(server.golden) and (golden is None or abs(golden - server.golden) > server.golden_tolerance):
        raise RemoteRewardError(
            f"{server.name} at {server.url} scores its golden picture {error or golden}, not {server.golden:g}: other "
            "weights, or another detector. Correct the server, or the golden score"
        )
    seen = error or golden
    logger.info("%s at %s: version %s, golden score %s", server.name, server.url, health.get("version"), seen)


def libraries() -> tuple[Any, Any]:
    """httpx2 and tenacity, or an ImportError that says what to install."""
    try:
        import httpx2
        import tenacity
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed; install it with: pip install 'gcpo_trl[remote]'") from error
    return httpx2, tenacity

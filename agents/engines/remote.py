"""One server of vLLM, over HTTP. Nothing that it is asked is waited for without a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from vlmenv.agents.engines.replies import (
    Answer,
    OtherModelFault,
    PassingFault,
    Served,
    ServerFault,
    read_answer,
    read_served,
)
from vlmenv.core.errors import ConfigError

SLOWER = "; a server that only needs longer wants a higher --server-timeout"
"""what to do where the time that `Patience.answer` gives was too short"""
_SHOWN = 200  # characters of an answer that is none
_IDLE = 2.0
"""Seconds after which an idle connection is given up: vLLM does so after 5, and may while the next request is sent."""
_BRIEF = 2.0
"""Seconds in which a server that was left out has to answer, since all others wait for it."""
_RAREST = 8
"""Updates after which a server that was left out is asked again, at the latest."""
_GREETING = "vlmenv_model"
"""what workers are asked that `vlmenv serve` started, and others do not know"""

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for."""

    answer: float = 300.0
    """seconds, for completions, and until it has taken over weights"""
    greeting: float = 10.0
    """seconds, for a connection, and for what a server answers at once"""
    attempts: int = 4
    """before a fault that may pass counts"""
    pause: float = 0.5
    """seconds before the second attempt; each pause after it is twice as long"""

    def __post_init__(self) -> None:
        if self.answer <= 0 or self.greeting <= 0 or self.pause <= 0 or self.attempts < 1:
            raise ConfigError(f"a server must be given some time and one attempt, not {self}")


class Server:
    """One server.

    Args:
        url: As http://HOST:PORT.
        patience: How long it is waited for.

    Attributes:
        fault: Why it is left out; None where it is in use.
        due: Number of the update that it is offered again, where it is left out.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        check_address(url)
        self.url = url
        self.fault: str | None = None
        self.due, self._misses = 0, 0
        self._patience = patience
        self._http = httpx2.AsyncClient(
            base_url=url,
            trust_env=False,  # a proxy is for the world outside, and for none of these
            timeout=httpx2.Timeout(None, connect=patience.greeting),  # all else is limited as a whole
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=_IDLE),
        )

    @property
    def limit(self) -> float:
        """Seconds that it has to take over weights."""
        return self._patience.answer

    def use(self) -> None:
        """Notes that it has taken an update."""
        self.fault, self._misses = None, 0

    def miss(self, update: int) -> None:
        """Notes that it was left out and has not taken an update either: the more of them, the longer it is let be."""
        self._misses += 1
        self.due = update + min(2 ** (self._misses - 1), _RAREST)

    async def meet(self, *, briefly: bool = False) -> Served:
        """What it serves.

        Args:
            briefly: It may well be gone: it is asked once, and has to answer soon whether it is there at all.

        Raises:
            ServerFault: It does not answer, or not as a server of `vlmenv serve` does.
        """
        limit, attempts = self._patience.greeting, 1 if briefly else self._patience.attempts
        first = min(limit, _BRIEF) if briefly else limit
        models = await self.again(lambda: self._ask("GET", "/v1/models", first), attempts)
        try:
            told = await self.again(self._ask_what_it_serves, attempts)
        except _RefusedFault as fault:
            raise OtherModelFault(f"it was not started by `vlmenv serve`, as it has to be ({fault})") from fault
        return read_served(_json(models), _json(told))

    async def complete(self, request: Mapping[str, Any], *, vocabulary: int, version: str) -> Answer:
        """Completions of a prompt.

        Args:
            request: In the words of vLLM's `/inference/v1/generate`.
            vocabulary: Number of tokens.
            version: The weights that are to sample them.

        Raises:
            ServerFault: There are none.
        """
        path, limit, asked = "/inference/v1/generate", self._patience.answer, request["sampling_params"]
        reply = await self.again(lambda: self._ask("POST", path, limit, request))
        return read_answer(
            _json(reply), count=asked["n"], longest=asked["max_tokens"], vocabulary=vocabulary, version=version
        )

    async def order(self, method: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each of its workers answers when it is told to do something about its weights.

        Raises:
            ServerFault: One of them cannot.
        """
        body = {"method": method, "kwargs": arguments}
        told = _json(await self._ask("POST", "/collective_rpc", self.limit, body))
        if fault := _first_fault(told):
            raise ServerFault(f"it cannot take over weights: {fault}")
        return list(told["results"])

    async def ask_workers(self, method: str) -> list[Any]:
        """What each of its workers answers to a method of vLLM's own.

        Raises:
            ServerFault: There is no such answer.
        """
        told = _json(await self._ask("POST", "/collective_rpc", self.limit, {"method": method}))
        if not isinstance(told, dict) or not isinstance(told.get("results"), list):
            raise ServerFault(f"an answer of another form came to {method}: {str(told)[:_SHOWN]}")
        return list(told["results"])

    async def renew(self, version: str) -> None:
        """Has it forget all that came of its old weights, and name the new ones in what it generates from then on.

        Raises:
            ServerFault: It has not.
        """
        limit = self._patience.greeting
        await self.again(self._forget_prompts)
        await self.again(lambda: self._ask("POST", "/reset_encoder_cache", limit))
        await self.again(lambda: self._ask("POST", "/update_weight_version", limit, {"new_version": version}))

    async def again(self, ask: Callable[[], Awaitable[T]], attempts: int | None = None) -> T:
        """What comes of asking until there is an answer, or a fault that does not pass; `attempts` times at most."""
        for attempt in range((attempts or self._patience.attempts) - 1):
            try:
                return await ask()
            except PassingFault:
                await asyncio.sleep(self._patience.pause * 2**attempt)
        return await ask()

    async def close(self) -> None:
        await self._http.aclose()

    async def _ask_what_it_serves(self) -> httpx2.Response:
        try:
            return await self._ask("POST", "/collective_rpc", self._patience.greeting, {"method": _GREETING})
        except PassingFault as fault:
            if _GREETING in str(fault):  # vLLM names a method that its workers do not have, by status 500
                raise _RefusedFault(str(fault)) from fault
            raise

    async def _forget_prompts(self) -> None:
        reply = _json(await self._ask("POST", "/reset_prefix_cache", self._patience.greeting))
        if not (isinstance(reply, dict) and reply.get("success") is True):
            raise PassingFault("it still works at requests, and keeps keys and values of the old weights for them")

    async def _ask(self, method: str, path: str, limit: float, body: Any = None) -> httpx2.Response:
        try:
            async with asyncio.timeout(limit):
                reply = await self._http.request(method, path, json=body)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise ServerFault(
                f"no answer from {path} within {limit:g} s{SLOWER if limit == self.limit else ''}"
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise PassingFault(f"{type(error).__name__} at {path}: {error or 'no reason given'}") from error
        if reply.status_code >= 500:
            raise PassingFault(_told(path, reply))
        if reply.status_code != 200:
            raise _RefusedFault(_told(path, reply))
        return reply


class _RefusedFault(ServerFault):
    """A question that a server does not take."""


def check_address(url: str) -> None:
    """Raises ConfigError unless an address is one of a server."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{url!r} is no address of a server: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.path not in ("", "/") or parsed.query:
        raise ConfigError(f"{url!r} is no address of a server: give it as http://HOST:PORT")


def _json(reply: httpx2.Response) -> Any:
    try:
        return reply.json()
    except ValueError as error:
        raise ServerFault(f"not JSON: {reply.text[:_SHOWN]!r}") from error


def _told(path: str, reply: httpx2.Response) -> str:
    return f"status {reply.status_code} from {path}: {reply.text[:_SHOWN]!r}"


def _first_fault(reply: Any) -> str | None:
    """Of what the workers say about new weights."""
    try:
        faults = [one["fault"] for one in reply["results"]]
    except (KeyError, TypeError) as error:
        return f"an answer of another form: {str(reply)[:_SHOWN]} ({type(error).__name__})"
    return next((str(fault) for fault in faults if fault is not None), None if faults else "no worker answers")

"""A client of one vLLM server, over HTTP. Every request has a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import numpy as np
from numpy.typing import NDArray

from vlmenv.agents.engines.access import VARIABLE
from vlmenv.agents.engines.addresses import check_address, connection, host_of, require_own_socket
from vlmenv.agents.engines.guard import MODEL, NOT_TAKEN
from vlmenv.agents.engines.replies import (
    Answer,
    OtherModelFault,
    PassingFault,
    RefusedTokenFault,
    Served,
    ServerFault,
    read_answer,
    read_scores,
    read_served,
)
from vlmenv.agents.engines.worker import LEFT
from vlmenv.core.errors import ConfigError

SLOWER = "; if the server only needs longer, raise --server-timeout"
"""advice if the time limit `RetryPolicy.answer` was too short"""
_MAX_MESSAGE = 600  # characters of a fault or an unexpected answer
_IDLE = 2.0
"""Seconds after which an idle connection is closed. vLLM closes it after 5, perhaps during the next request."""
_BRIEF = 2.0
"""Time limit, in seconds, of an excluded server's first answer, for which all other servers wait."""
_RAREST = 8
"""Largest number of updates between two attempts to use an excluded server again."""

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Time limits and retries of requests to a server."""

    answer: float = 300.0
    """seconds, for completions and for an update of weights"""
    greeting: float = 10.0
    """seconds, for a connection, and for requests without work"""
    attempts: int = 4
    """attempts per request, if a fault may be temporary"""
    pause: float = 0.5
    """seconds before the second attempt; each later pause is twice as long"""

    def __post_init__(self) -> None:
        if self.answer <= 0 or self.greeting <= 0 or self.pause <= 0 or self.attempts < 1:
            raise ConfigError(f"time limits of servers must be above 0 and attempts at least 1, not {self}")


class Server:
    """A client of one server.

    Args:
        url: Address, as http://HOST:PORT, https://HOST:PORT or unix:PATH.
        token: Token of `vlmenv serve`.
        retry_policy: Time limits and retries.
        ca: File of the authorities that sign the certificate of an https server. None: those that the system trusts.

    Attributes:
        fault: Reason why the server is excluded; None while it is in use.
        host: Its host; of a Unix socket this machine.
        due: Number of the update that is next offered to an excluded server.
    """

    def __init__(self, url: str, token: str, retry_policy: RetryPolicy, ca: Path | None = None) -> None:
        check_address(url)
        self.url, self.host = url, host_of(url)
        self.fault: str | None = None
        self.due, self._misses = 0, 0
        self._retry_policy = retry_policy
        self._http = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {token}"},
            trust_env=False,  # no proxy: servers are in the local network
            timeout=httpx2.Timeout(None, connect=retry_policy.greeting),  # `_ask` limits requests as a whole
            **connection(url, ca, httpx2.Limits(max_connections=None, keepalive_expiry=_IDLE)),
        )

    @property
    def limit(self) -> float:
        """Time limit of an update, in seconds."""
        return self._retry_policy.answer

    def use(self) -> None:
        """Records a successful update."""
        self.fault, self._misses = None, 0

    def miss(self, update: int) -> None:
        """Records a failed update of an excluded server. The pause until the next attempt doubles."""
        self._misses += 1
        self.due = update + min(2 ** (self._misses - 1), _RAREST)

    async def meet(self, *, briefly: bool = False) -> Served:
        """Asks what the server serves.

        Args:
            briefly: If true, makes one attempt with a short limit, for a server that is probably gone.

        Raises:
            ServerFault: It does not answer, refuses the token, or is not a server of `vlmenv serve`.
        """
        limit, attempts = self._retry_policy.greeting, 1 if briefly else self._retry_policy.attempts
        first = min(limit, _BRIEF) if briefly else limit
        models = await self.again(lambda: self._ask("GET", "/v1/models", first), attempts)
        try:
            told = await self.again(lambda: self._ask("GET", MODEL, limit), attempts)
        except _RefusedFault as fault:
            raise OtherModelFault(f"it was not started by `vlmenv serve` ({fault})") from fault
        return read_served(_json(models), _json(told))

    async def complete(self, request: Mapping[str, Any], *, vocabulary: int, version: str) -> Answer:
        """Requests completions of a prompt.

        Args:
            request: Body for vLLM's `/inference/v1/generate`.
            vocabulary: Size of the vocabulary.
            version: Version of the weights that must sample them.

        Raises:
            ServerFault: The request failed, or the answer is invalid.
        """
        path, limit, asked = "/inference/v1/generate", self._retry_policy.answer, request["sampling_params"]
        reply = await self.again(lambda: self._ask("POST", path, limit, request))
        return read_answer(
            _json(reply), count=asked["n"], longest=asked["max_tokens"], vocabulary=vocabulary, version=version
        )

    async def score(self, request: Mapping[str, Any], *, count: int) -> tuple[list[int], NDArray[np.float32]]:
        """Requests the log-probabilities of a prompt's last tokens.

        Args:
            request: Body for vLLM's `/inference/v1/generate`, without sampling parameters.
            count: Number of tokens, at least 1.

        Returns:
            The prompt as the server encodes it, and float32 [count], of temperature 1.

        Raises:
            ServerFault: The request failed, or the answer is invalid.
        """
        path, limit = "/inference/v1/generate", self._retry_policy.answer
        body = {**request, "sampling_params": {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}}
        return read_scores(_json(await self.again(lambda: self._ask("POST", path, limit, body))), count=count)

    async def num_workers(self) -> int:
        """The number of vLLM's workers.

        Raises:
            ServerFault: The request failed.
        """
        told = _json(await self._ask("GET", "/get_world_size", self._retry_policy.greeting))
        if not isinstance(told, dict) or type(told.get("world_size")) is not int:
            raise _unexpected(told)
        return int(told["world_size"])

    async def join(self, meeting: Mapping[str, Any]) -> None:
        """Lets the workers join a channel.

        Args:
            meeting: Arguments of `Receiver.join`.

        Raises:
            ServerFault: The request failed, or a worker did not join.
        """
        await self._ask("POST", "/init_weight_transfer_engine", self.limit, {"init_info": meeting})

    async def update(self, order: Mapping[str, Any]) -> None:
        """Lets the workers load weights.

        Args:
            order: Arguments of `Receiver.read` or `Receiver.receive`.

        Raises:
            ServerFault: The request failed, or a worker did not load all weights.
        """
        await self._ask("POST", "/update_weights", self.limit, {"update_info": order})

    async def checksums(self) -> dict[str, str]:
        """Checksums of the weights by vLLM's names.

        Raises:
            ServerFault: The request failed.
        """
        told = _json(await self._ask("POST", "/weight_checker", self.limit, {"action": "checksum"}))
        if not isinstance(told, dict) or not isinstance(told.get("checksums"), dict):
            raise _unexpected(told)
        return dict(told["checksums"])

    async def clear(self) -> None:
        """Sets all weights to 0.

        Raises:
            ServerFault: The request failed.
        """
        await self._ask("POST", "/weight_checker", self.limit, {"action": "reset"})

    async def renew(self, version: str) -> None:
        """Empties the caches of the old weights, and sets the version that completions name.

        Raises:
            ServerFault: A request failed.
        """
        limit = self._retry_policy.greeting
        await self.again(self._forget_prompts)
        await self.again(lambda: self._ask("POST", "/reset_encoder_cache", limit))
        await self.again(lambda: self._ask("POST", "/update_weight_version", limit, {"new_version": version}))

    async def again(self, ask: Callable[[], Awaitable[T]], attempts: int | None = None) -> T:
        """Calls `ask` until it succeeds or raises a permanent fault, at most `attempts` times."""
        for attempt in range((attempts or self._retry_policy.attempts) - 1):
            try:
                return await ask()
            except PassingFault:
                await asyncio.sleep(self._retry_policy.pause * 2**attempt)
        return await ask()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _forget_prompts(self) -> None:
        reply = _json(await self._ask("POST", "/reset_prefix_cache", self._retry_policy.greeting))
        if not (isinstance(reply, dict) and reply.get("success") is True):
            raise PassingFault("it has running requests, and keeps keys and values of the old weights for them")

    async def _ask(self, method: str, path: str, limit: float, body: Any = None) -> httpx2.Response:
        content = {} if body is None and method == "POST" else body  # the server takes JSON alone
        try:
            require_own_socket(self.url)
            async with asyncio.timeout(limit):
                reply = await self._http.request(method, path, json=content)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise ServerFault(
                f"no answer from {path} within {limit:g} s{SLOWER if limit == self.limit else ''}"
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise PassingFault(f"{type(error).__name__} at {path}: {error or 'no reason given'}") from error
        if reply.status_code == 401:
            raise RefusedTokenFault(f"it has another token: set {VARIABLE} to that of `vlmenv serve`")
        if reply.status_code == NOT_TAKEN:
            told = _json(reply)
            fault = str(told.get("error") if isinstance(told, dict) else told)[:_MAX_MESSAGE]
            raise (PassingFault if LEFT in fault else ServerFault)(f"it {fault}")
        if reply.status_code >= 500:
            raise PassingFault(_told(path, reply))
        if reply.status_code != 200:
            raise _RefusedFault(_told(path, reply))
        return reply


class _RefusedFault(ServerFault):
    """A request that the server refuses."""


def _json(reply: httpx2.Response) -> Any:
    try:
        return reply.json()
    except ValueError as error:
        raise ServerFault(f"not JSON: {reply.text[:_MAX_MESSAGE]!r}") from error


def _told(path: str, reply: httpx2.Response) -> str:
    return f"status {reply.status_code} from {path}: {reply.text[:_MAX_MESSAGE]!r}"


def _unexpected(told: Any) -> ServerFault:
    return ServerFault(f"unexpected answer: {str(told)[:_MAX_MESSAGE]}")

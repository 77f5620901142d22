"""ASGI middleware that lets only vlmenv's trainers use a server of vLLM's."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Final

from vlmenv.agents.engines.access import server_token
from vlmenv.agents.engines.worker import REFUSED, weight_shapes

HOST: Final = "VLMENV_SERVER_HOST"
"""Environment variable of the name or address that the server listens on."""
MODEL: Final = "/vlmenv/model"
"""Route of the guard's own: what the server serves."""
_START, _UPDATE, _FINISH = "/start_weight_update", "/update_weights", "/finish_weight_update"
_JOIN: Final = "/init_weight_transfer_engine"
ROUTES: Final = frozenset(
    {
        ("GET", "/health"),
        ("GET", "/v1/models"),
        ("GET", MODEL),
        ("GET", "/get_world_size"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/reset_encoder_cache"),
        ("POST", "/update_weight_version"),
        ("POST", "/weight_checker"),
        ("POST", _JOIN),
        ("POST", _UPDATE),
    }
)
"""All that trainers use."""
NOT_TAKEN: Final = 409
"""Status of an update that a worker could not load, or of a channel that it could not join."""
_ENDING: Final = "', please check the stack trace above"
"""What vLLM appends to a worker's fault."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """Refuses requests without the token, and whatever trainers do not use.

    A request needs a known Host, so that no web page reaches the server by a name of its own; the token; a route of
    `ROUTES`; and for POST the content type application/json, which no web page may send elsewhere unasked.

    An update of weights is one request, and updates come one after the other. For vLLM it is three, and a trainer that
    ends after the first would leave a server that takes no other update.

    Args:
        app: vLLM's application.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._token = f"Bearer {server_token()}".encode()
        self._updating = asyncio.Lock()
        self._names = {"localhost", socket.gethostname().lower(), os.environ.get(HOST, "localhost").lower()}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := self._refusal(scope):
            await _answer(send, refusal[0], {"error": refusal[1]})
        elif scope["path"] == MODEL:
            await _answer(send, 200, _described(scope["app"].state.vllm_config))
        elif scope["path"] == _JOIN:
            await self._tell_faults(scope, receive, send)
        elif scope["path"] == _UPDATE:
            await self._update(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _update(self, scope: Message, receive: Receive, send: Send) -> None:
        reply: list[Message] = []

        async def keep(message: Message) -> None:
            reply.append(message)

        async with self._updating:
            await self._app(_at(scope, _START), _empty, _nowhere)
            taken = await self._tell_faults(scope, receive, keep)
            # After a fault the update is over for the worker that raised it, and vLLM refuses to finish it there.
            with nullcontext() if taken else suppress(Exception):
                await self._app(_at(scope, _FINISH), _empty, _nowhere)
        for message in reply:
            await send(message)

    async def _tell_faults(self, scope: Message, receive: Receive, send: Send) -> bool:
        """Passes a request on. Answers with `NOT_TAKEN` and the fault if a worker fails, and is then false."""
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            _, begun, fault = str(error).partition(REFUSED)
            if not begun:
                raise
            await _answer(send, NOT_TAKEN, {"error": REFUSED + fault.partition(_ENDING)[0]})
            return False
        return True

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """The status and the reason of a refusal, from the headers alone."""
        if not self._knows(_header(scope, b"host").decode("latin-1")):
            return (
                403,
                "unknown Host: use an IP address, localhost, the machine's name, or the --host of `vlmenv serve`",
            )
        if not hmac.compare_digest(_header(scope, b"authorization"), self._token):
            return 401, "the token of `vlmenv serve` is needed"
        if (scope["method"], scope["path"]) not in ROUTES:
            return 404, "no such route"
        if scope["method"] == "POST" and _media_type(scope) != b"application/json":
            return 415, "the content type must be application/json"
        return None

    def _knows(self, host: str) -> bool:
        """True for known names and for IP addresses: a page that rebinds a name sends that name."""
        name = host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()
        return name in self._names or _is_address(name.strip("[]"))


def _header(scope: Message, name: bytes) -> bytes:
    """The value of a header; empty if it is missing or given twice."""
    found = [value for key, value in scope["headers"] if key.lower() == name]
    return bytes(found[0]) if len(found) == 1 else b""


def _media_type(scope: Message) -> bytes:
    return _header(scope, b"content-type").partition(b";")[0].strip().lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _described(config: Any) -> dict[str, Any]:
    """What the trainer compares with its own model."""
    model = config.model_config
    return {
        "weights": weight_shapes(Path(model.model)),
        "banned": config.additional_config["vlmenv_banned"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "logprobs": model.logprobs_mode,
    }


def _at(scope: Message, path: str) -> Message:
    """The scope of a request without a body, to another route of vLLM."""
    others = [(key, value) for key, value in scope["headers"] if key.lower() != b"content-length"]
    return {**scope, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": others}


async def _empty() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _nowhere(message: Message) -> None:
    if message.get("status", 200) >= 400:
        raise RuntimeError(f"vLLM refused a part of an update, with status {message['status']}")


async def _answer(send: Send, status: int, told: Mapping[str, Any]) -> None:
    body = json.dumps(told).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

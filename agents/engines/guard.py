"""ASGI middleware that lets only vlmenv's trainers use a server of vLLM's."""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, Final

from vlmenv.agents.engines.access import server_token

HOST: Final = "VLMENV_SERVER_HOST"
"""Environment variable of the name or address that the server listens on."""
_RPC: Final = "/collective_rpc"
ROUTES: Final = frozenset(
    {
        ("GET", "/health"),
        ("GET", "/v1/models"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/reset_encoder_cache"),
        ("POST", "/update_weight_version"),
        ("POST", _RPC),
    }
)
"""All that trainers use."""
METHODS: Final = frozenset(
    {
        "vlmenv_model",
        "vlmenv_overwrite",
        "vlmenv_channel",
        "vlmenv_join",
        "vlmenv_receive",
        "compute_weight_checksums",
        "reset_weights",
    }
)
"""Methods of workers that trainers call."""
_LONGEST_ORDER: Final = 16 << 20
"""Bytes of the body of a call. The longest has the names and shapes of all weights."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """Refuses requests without the token, and whatever trainers do not use.

    A request needs a known Host, so that no web page reaches the server by a name of its own; the token; a route of
    `ROUTES`; and for POST the content type application/json, which no web page may send elsewhere unasked. Calls of
    workers need a method of `METHODS`.

    Args:
        app: vLLM's application.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._token = f"Bearer {server_token()}".encode()
        self._names = {"localhost", socket.gethostname().lower(), os.environ.get(HOST, "localhost").lower()}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := self._refusal(scope):
            await _refuse(send, *refusal)
        elif scope["path"] != _RPC:
            await self._app(scope, receive, send)
        elif (order := _order(await _body(receive))) is None:
            await _refuse(send, 403, "this method cannot be called here")
        else:
            await self._app(_resized(scope, order), _replaying(order, receive), send)

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


async def _body(receive: Receive) -> bytes:
    """The body of a request; empty if it is too long or the client is gone."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > _LONGEST_ORDER:
            return b""
        more = message.get("more_body", False)
    return bytes(body)


def _order(body: bytes) -> bytes | None:
    """A call that is allowed, written anew, so that vLLM reads what was checked; None for others."""
    try:
        order = json.loads(body)
        method, arguments = order["method"], order.get("kwargs", {})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(method, str) or method not in METHODS or not isinstance(arguments, dict):
        return None
    return json.dumps({"method": method, "kwargs": arguments}).encode()


def _resized(scope: Message, body: bytes) -> Message:
    others = [(key, value) for key, value in scope["headers"] if key.lower() != b"content-length"]
    return {**scope, "headers": [*others, (b"content-length", str(len(body)).encode())]}


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Receives a body that has been read already, and then what comes after it."""
    left: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(left, None) or await receive()

    return replay


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

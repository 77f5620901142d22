"""Who may use a server of vlmenv's: what the headers of a request must have."""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any, Final

from vlmenv.agents.engines.access import server_token

LOCAL: Final = ("127.0.0.1", "localhost", "::1")
"""Hosts that this machine alone reaches."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Admission:
    """Decides which requests reach a server.

    A request needs a known Host, so that no web page reaches the server by a name of its own; the token; a listed
    route; and for POST the content type application/json, which no web page may send elsewhere unasked.

    Args:
        server: The command that serves, for messages.
        host: Name or address that it listens on, known beside IP addresses, localhost and the machine's name.
        routes: Methods and paths that exist. The method of a WebSocket is `"WEBSOCKET"`.

    Raises:
        ConfigError: There is no token; see `server_token`.
    """

    def __init__(self, server: str, host: str, routes: Collection[tuple[str, str]]) -> None:
        self._server = server
        self._routes = routes
        self._token = f"Bearer {server_token()}".encode()
        self._names = {"localhost", socket.gethostname().lower(), host.lower()}

    def refusal(self, scope: Message) -> tuple[int, str] | None:
        """The status and the reason of a refusal, from the headers alone; None: the request is admitted."""
        if not self._knows(_header(scope, b"host").decode("latin-1")):
            return (
                403,
                f"unknown Host: use an IP address, localhost, the machine's name, or the --host of `{self._server}`",
            )
        if not hmac.compare_digest(_header(scope, b"authorization"), self._token):
            return 401, f"the token of `{self._server}` is needed"
        method = "WEBSOCKET" if scope["type"] == "websocket" else scope["method"]
        if (method, scope["path"]) not in self._routes:
            return 404, "no such route"
        if method == "POST" and _media_type(scope) != b"application/json":
            return 415, "the content type must be application/json"
        return None

    def _knows(self, host: str) -> bool:
        """True for known names and for IP addresses: a page that rebinds a name sends that name."""
        name = host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()
        return name in self._names or _is_address(name.strip("[]"))


async def answer(send: Send, status: int, told: Mapping[str, Any]) -> None:
    """Answers a request with JSON."""
    body = json.dumps(told).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(scope: Message, send: Send, status: int, reason: str) -> None:
    """Refuses a request; a WebSocket is closed before it is opened."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await answer(send, status, {"error": reason})


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

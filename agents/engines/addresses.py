"""Addresses of servers: `http://HOST:PORT`, `https://HOST:PORT`, or `unix:PATH` of a socket on this machine."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Final

import httpx2

from vlmenv.agents.engines.access import require_private
from vlmenv.core.errors import ConfigError
from vlmenv.core.urls import masked

UNIX: Final = "unix:"
LONGEST_SOCKET: Final = 107
"""Bytes of a Unix socket's path on Linux."""
_FORMS: Final = "give http://HOST:PORT, https://HOST:PORT or unix:PATH"


def check_address(url: str) -> None:
    """Raises ConfigError unless `url` is the address of a server."""
    if url.startswith(UNIX):
        if not url.removeprefix(UNIX) or url.startswith(f"{UNIX}//"):
            raise ConfigError(f"{url!r} is not the address of a server: {_FORMS}")
        return
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{masked(url)!r} is not the address of a server: {error}") from error
    more = parsed.path not in ("", "/") or parsed.query or parsed.userinfo
    if parsed.scheme not in ("http", "https") or not parsed.host or more:
        raise ConfigError(f"{masked(url)!r} is not the address of a server: {_FORMS}")


def host_of(url: str) -> str:
    """The host of a server. That of a socket is this machine."""
    return "127.0.0.1" if url.startswith(UNIX) else httpx2.URL(url).host


def connection(url: str, ca: Path | None, limits: httpx2.Limits) -> dict[str, Any]:
    """The arguments with which an HTTP client reaches a server.

    Args:
        url: Its address.
        ca: File of the authorities that sign the certificates of https servers. None: those that the system trusts.
        limits: Limits of connections.
    """
    if url.startswith(UNIX):
        transport = httpx2.AsyncHTTPTransport(uds=url.removeprefix(UNIX), trust_env=False, limits=limits)
        return {"base_url": "http://localhost", "transport": transport}
    verified = {"verify": tls_context(ca)} if url.startswith("https:") else {}
    return {"base_url": url, "limits": limits, **verified}


def tls_context(ca: Path | None) -> ssl.SSLContext:
    """The context that verifies servers' certificates and names.

    Raises:
        ConfigError: The file of authorities cannot be read.
    """
    if ca is None:
        return ssl.create_default_context()
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"server_ca {ca} holds no certificates: {error.strerror or error}") from error


def require_own_socket(url: str) -> None:
    """Raises PermissionError if a socket is where other accounts could have put one of theirs."""
    if url.startswith(UNIX):
        require_private(Path(url.removeprefix(UNIX)).absolute().parent)

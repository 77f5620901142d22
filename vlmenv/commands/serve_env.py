"""`vlmenv serve-env`: an environment over HTTP and WebSocket, in OpenEnv's form."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from vlmenv.adapters.for_openenv import openenv
from vlmenv.adapters.task import imported
from vlmenv.core.console import open_console, say
from vlmenv.options.parsing import parse_plain
from vlmenv.options.serve import ServeEnvConfig

_EVERYWHERE: Final = ("0.0.0.0", "::")
_Message = MutableMapping[str, Any]


def parse(args: Sequence[str], program: str) -> ServeEnvConfig:
    """The options of a command line."""
    config: ServeEnvConfig = parse_plain(args, ServeEnvConfig(), program)
    return config


def run(config: ServeEnvConfig) -> None:
    """Serves until it is interrupted."""
    server: Any = imported("uvicorn", "uvicorn", "openenv")
    arguments = config.data.arguments() | config.prompts.task_arguments()
    if config.prompts.coordinates == "auto":
        arguments["coordinates"] = "original"
    given = {name: value for name, value in arguments.items() if value is not None}
    app = openenv(config.env, seed=config.seed, **given).app(config.sessions)
    console = open_console()
    say(f"{config.env} is at http://{config.host}:{config.port}; its interface is at /docs", console)
    if config.host in _EVERYWHERE:
        say("it listens to every network of this machine: whoever reaches it may use it", console, "yellow")
    hosts = None if config.host in _EVERYWHERE else {"127.0.0.1", "localhost", "::1", config.host}
    server.run(Guarded(app, hosts), host=config.host, port=config.port, log_level="warning")


class Guarded:
    """An ASGI app that answers no web page of another origin, and no other name of this machine.

    Pages reach servers on their reader's own machine, by a name that they make point there, or by a WebSocket, which
    no browser confines to its origin.

    Args:
        app: The app.
        hosts: Names under which it may be called. None: any.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: set[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "lifespan" or self._admits({k.decode(): v.decode() for k, v in scope["headers"]}):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this origin or host is not served\n"})

    def _admits(self, headers: Mapping[str, str]) -> bool:
        host = headers.get("host", "")
        named = self._hosts is None or urlsplit(f"//{host}").hostname in self._hosts
        return named and headers.get("origin", f"http://{host}") == f"http://{host}"

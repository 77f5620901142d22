"""`vlmenv serve-env`: an environment over HTTP and WebSocket, in OpenEnv's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from vlmenv.adapters.for_openenv import openenv
from vlmenv.adapters.task import imported
from vlmenv.agents.engines.access import server_token_or_new, whose_token
from vlmenv.agents.engines.admission import LOCAL, Admission, App, Message, Receive, Send, refuse
from vlmenv.core.console import open_console, say
from vlmenv.options.parsing import parse_plain
from vlmenv.options.serve import ServeEnvConfig
from vlmenv.options.task import given_arguments

ROUTES: Final = frozenset(
    {
        *(("GET", path) for path in ("/health", "/metadata", "/schema", "/state")),
        *(("POST", path) for path in ("/reset", "/step")),
        ("WEBSOCKET", "/ws"),
    }
)
"""What OpenEnv's clients use to reset an environment and step in it."""


def parse(args: Sequence[str], program: str) -> ServeEnvConfig:
    """The options of a command line."""
    config: ServeEnvConfig = parse_plain(args, ServeEnvConfig(), program)
    return config


def run(config: ServeEnvConfig) -> None:
    """Serves until it is interrupted."""
    server: Any = imported("uvicorn", "uvicorn", "openenv")
    given = given_arguments(config.data, config.prompts)
    app = openenv(config.env, seed=config.seed, **given).app(config.sessions)
    server_token_or_new()
    console = open_console()
    say(f"{config.env} is at http://{config.host}:{config.port}. {whose_token('Clients')}", console)
    if config.host not in LOCAL:
        say("nothing is encrypted, the token included: use a network that nobody else is on", console, "yellow")
    server.run(Guarded(app, config.host), host=config.host, port=config.port, log_level="warning")


class Guarded:
    """Passes on to an app what `Admission` admits.

    Args:
        app: The app.
        host: Name or address that it listens on.
    """

    def __init__(self, app: App, host: str) -> None:
        self._app = app
        self._admission = Admission("vlmenv serve-env", host, ROUTES)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and (refusal := self._admission.refusal(scope)):
            await refuse(scope, send, *refusal)
        else:
            await self._app(scope, receive, send)

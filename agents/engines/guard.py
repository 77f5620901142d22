"""ASGI middleware that lets only holders of the token use a server of vLLM's, for what vlmenv needs."""

from __future__ import annotations

import asyncio
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Final

from vlmenv.agents.engines.admission import Admission, App, Message, Receive, Send, answer, refuse
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
        ("POST", "/v1/chat/completions"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/reset_encoder_cache"),
        ("POST", "/update_weight_version"),
        ("POST", "/weight_checker"),
        ("POST", _JOIN),
        ("POST", _UPDATE),
    }
)
"""All that trainers use, and what measures a served model elsewhere: OpenAI's chat."""
NOT_TAKEN: Final = 409
"""Status of an update that a worker could not load, or of a channel that it could not join."""
_ENDING: Final = "', please check the stack trace above"
"""What vLLM appends to a worker's fault."""


class Guard:
    """Refuses requests without the token, and whatever is not in `ROUTES`.

    `Admission` says what a request needs; its route is one of `ROUTES`.

    An update of weights is one request, and updates come one after the other. For vLLM it is three, and a trainer that
    ends after the first would leave a server that takes no other update.

    Args:
        app: vLLM's application.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._admission = Admission("vlmenv serve", os.environ.get(HOST, "localhost"), ROUTES)
        self._updating = asyncio.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif refusal := self._admission.refusal(scope):
            await refuse(scope, send, *refusal)
        elif scope["path"] == MODEL:
            await answer(send, 200, _described(scope["app"].state.vllm_config))
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
            await answer(send, NOT_TAKEN, {"error": REFUSED + fault.partition(_ENDING)[0]})
            return False
        return True


def _described(config: Any) -> dict[str, Any]:
    """What the trainer compares with its own model."""
    model = config.model_config
    return {
        "weights": weight_shapes(Path(model.model)),
        "banned": config.additional_config["vlmenv_banned"],
        "vocabulary": config.additional_config["vlmenv_vocabulary"],
        "images": config.additional_config["vlmenv_images"],
        "videos": config.additional_config["vlmenv_videos"],
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

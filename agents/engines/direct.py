"""The trainer's side of direct transfers: weights go from the trainer to servers' workers without files."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmenv.agents.engines.background import in_thread
from vlmenv.agents.engines.channel import (
    Channel,
    ChannelFault,
    LateFault,
    Meeting,
    buckets,
    hosted,
)
from vlmenv.agents.engines.remote import SLOWER, Server
from vlmenv.agents.engines.replies import PassingFault, ServerFault
from vlmenv.core.networks import local_address

T = TypeVar("T")


class DirectTransfer:
    """Sends weights to servers, with one channel per server.

    A channel stays open for the next updates. It is replaced after an error, also that of a server that has left it.

    Args:
        token: Token of `vlmenv serve`.
    """

    def __init__(self, token: str) -> None:
        self._token = token
        self._channels: dict[Server, Channel] = {}

    async def deliver(self, server: Server, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Updates a server's weights.

        Args:
            server: The server.
            weights: Weights by name.
            dtype: The server's type of weights.

        Raises:
            ServerFault: The update failed, or is incomplete.
        """
        await server.again(lambda: self._deliver(server, weights, dtype))

    def close(self) -> None:
        """Closes all channels."""
        self._channels.clear()

    async def _deliver(self, server: Server, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        channel = self._channels.pop(server, None)
        if channel is None:
            channel = await self._join(server, next(iter(weights.values())).device)
        plan, limit = buckets(weights, dtype), server.limit
        order = {"name": channel.name, "plan": plan, "dtype": str(dtype).removeprefix("torch."), "seconds": limit}
        await _both(
            lambda: channel.send(weights, plan, dtype, limit), server.update(order), "its weights cannot be sent"
        )
        self._channels[server] = channel

    async def _join(self, server: Server, device: torch.device) -> Channel:
        """Opens a channel to a server."""
        size, limit = 1 + await server.num_workers(), server.limit
        try:
            store = hosted(local_address(server.host))
        except (ChannelFault, OSError) as error:
            raise ServerFault(f"the trainer has no address that it could reach: {error}") from error
        meeting = Meeting(store.host, store.port, uuid.uuid4().hex, size)
        return await _both(
            lambda: Channel(meeting, 0, device, limit, self._token, store),
            server.join(asdict(meeting) | {"seconds": limit}),
            f"there is no channel between it and {meeting.address}, which must reach each other's free ports",
        )


async def _both(work: Callable[[], T], order: Coroutine[Any, Any, Any], what: str) -> T:
    """Runs the trainer's side and the server's side of a transfer at the same time, and gives the trainer's result.

    If one side fails, the other is not waited for. The thread of the trainer's side has its own time limit.
    """
    try:
        async with asyncio.TaskGroup() as group:
            ours = group.create_task(in_thread(work))
            group.create_task(order)
    except ExceptionGroup as faults:
        fault = faults.exceptions[0]
        if isinstance(fault, ChannelFault):
            late = isinstance(fault, LateFault)
            kind = ServerFault if late else PassingFault
            raise kind(f"{what}: {fault}{SLOWER if late else ''}") from fault
        raise fault from None
    return ours.result()

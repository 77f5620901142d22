"""Weights that go from the trainer straight to servers' workers: what the trainer does about it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import httpx2
import torch
from torch import Tensor

from vlmenv.agents.engines.background import in_thread
from vlmenv.agents.engines.channel import (
    Channel,
    ChannelFault,
    LateFault,
    Meeting,
    buckets,
    gpu_of,
    hosted,
    local_address,
)
from vlmenv.agents.engines.remote import SLOWER, Server
from vlmenv.agents.engines.replies import PassingFault, ServerFault

T = TypeVar("T")


class DirectTransfer:
    """Sends weights to servers, each over a channel of its own.

    A channel stays for the next updates. It is made anew where something went wrong, or the server knows it no more.
    """

    def __init__(self) -> None:
        self._channels: dict[Server, Channel] = {}

    async def deliver(self, server: Server, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Has a server take over weights.

        Args:
            server: Which one.
            weights: By name.
            dtype: That the server works in.

        Raises:
            ServerFault: It has not, or not wholly.
        """
        await server.again(lambda: self._deliver(server, weights, dtype))

    def close(self) -> None:
        """Lets go of all channels."""
        self._channels.clear()

    async def _deliver(self, server: Server, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        channel = await self._channel_to(server, next(iter(weights.values())).device)
        plan, limit = buckets(weights, dtype), server.limit
        order = {"name": channel.name, "plan": plan, "dtype": str(dtype).removeprefix("torch."), "seconds": limit}
        try:
            await _both(
                lambda: channel.send(weights, plan, dtype, limit),
                server.order("vlmenv_receive", order),
                "its weights cannot be sent",
            )
        except BaseException:
            del self._channels[server]
            raise

    async def _channel_to(self, server: Server, device: torch.device) -> Channel:
        """That which there is, if all of the server's workers are still at it, or a new one."""
        known = self._channels.pop(server, None)
        workers = await server.order("vlmenv_channel", {})
        try:
            names, gpus = [one["name"] for one in workers], [one["gpu"] for one in workers]
        except (KeyError, TypeError) as error:
            raise ServerFault(f"an answer of another form came: {workers} ({type(error).__name__})") from error
        if known is None or set(names) != {known.name}:
            known = await self._join(server, device, 1 + len(workers), backend_between([gpu_of(device), *gpus]))
        self._channels[server] = known
        return known

    async def _join(self, server: Server, device: torch.device, size: int, backend: str) -> Channel:
        """A new channel to a server, which is asked to come to it."""
        limit = server.limit
        try:
            store = hosted(local_address(httpx2.URL(server.url).host))
        except (ChannelFault, OSError) as error:
            raise ServerFault(f"there is no address at which it could reach the trainer: {error}") from error
        meeting = Meeting(store.host, store.port, uuid.uuid4().hex, size, backend)
        return await _both(
            lambda: Channel(meeting, 0, device, limit, store),
            server.order("vlmenv_join", asdict(meeting) | {"seconds": limit}),
            f"there is no {backend} channel to it",
        )


def backend_between(gpus: Sequence[str | None]) -> str:
    """What weights go by between ends on these GPUs, or on none: NCCL if each has one of its own, else gloo.

    NCCL refuses two ends on one GPU. By gloo weights go by way of CPUs, which works everywhere.
    """
    return "nccl" if None not in gpus and len(set(gpus)) == len(gpus) else "gloo"


async def _both(work: Callable[[], T], order: Coroutine[Any, Any, Any], what: str) -> T:
    """What some work at this end gives, which a server does its part of on order at the same time.

    When one of the two fails the other is not waited for. What this thread still does has a limit of its own.
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

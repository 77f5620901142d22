"""What weights go through from the trainer straight to the workers of a server, from process to process.

A channel is a process group of its own, which neither the trainer's nor vLLM's knows of, and each server has another:
one that dies takes nobody with it. If each end has a GPU of its own it goes by NCCL, else by gloo, and all else is the
same.
"""

from __future__ import annotations

import math
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from vlmenv.agents.engines.background import within
from vlmenv.agents.engines.fingerprints import Fingerprint

_c10d: Any = distributed  # hands on names that it does not declare to be its own
BUCKET = 256 << 20
"""Bytes of weights that go as one message, so that small ones do not cost one each."""
_WORD = torch.int64
_ENVIRONMENT = threading.Lock()
_EARLY = 0.05
"""Seconds by which torch may give up before its limit, of which it counts whole milliseconds."""
_SHOWN = 200  # characters of what torch says

Bucket = Sequence[tuple[str, Sequence[int]]]
"""Names and shapes of weights that go as one message, in order."""


class ChannelFault(Exception):
    """What kept weights from getting through."""


class LateFault(ChannelFault):
    """Time was up."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ends of a channel find each other."""

    address: str
    """of the trainer, as the server reaches it"""
    port: int
    name: str
    """no other channel's"""
    size: int
    """the trainer, and the server's workers"""
    backend: str
    """nccl or gloo"""


class Channel:
    """One end of a channel. Making it waits for all others to come.

    Args:
        meeting: Where the others are found.
        rank: The trainer has 0.
        device: Of this end's model.
        seconds: That the others are waited for.
        store: What all ends meet by, where it is in this process.

    Raises:
        ChannelFault: They have not come.
    """

    def __init__(
        self,
        meeting: Meeting,
        rank: int,
        device: torch.device,
        seconds: float,
        store: Any = None,
    ) -> None:
        self.name = meeting.name
        self._device = device if meeting.backend == "nccl" else torch.device("cpu")
        deadline = time.monotonic() + seconds
        with _faults(deadline):
            # torch's limits do not hold for all of it: ncclCommInitRank has none and waits for ever for an end that has
            # died on its way. It can be made not to block (config.blocking), but torch reads the limit for that,
            # TORCH_NCCL_NONBLOCKING_TIMEOUT, once for all groups of a process, so also vLLM's and accelerate's, and
            # NCCL 2.26 hung in that mode (pytorch's issue 153960). A thread bounds every backend alike.
            within(seconds, lambda: self._meet(meeting, rank, deadline, store))

    def _meet(self, meeting: Meeting, rank: int, deadline: float, store: Any) -> None:
        """Makes the group, in a thread that may be given up."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has a current one, and a new thread the first GPU
        limit = _left(deadline)
        store = store or _c10d.TCPStore(
            meeting.address, meeting.port, is_master=False, timeout=limit, wait_for_workers=False
        )
        named = _c10d.PrefixStore(meeting.name, store)
        if meeting.backend == "nccl":
            self._group = _nccl_group(named, rank, meeting.size, limit)
        else:
            own = meeting.address if rank == 0 else local_address(meeting.address)
            self._group = _gloo_group(named, rank, meeting.size, limit, own)
        self._pass(_room(1, self._device), deadline)  # NCCL's ends meet at the first message

    @torch.no_grad()
    def send(self, weights: Mapping[str, Tensor], plan: Sequence[Bucket], dtype: torch.dtype, seconds: float) -> None:
        """Sends weights, converted bucket by bucket, and their fingerprint after them.

        Args:
            weights: By name.
            plan: Which go together, as `buckets` says.
            dtype: That they are converted to.
            seconds: That it may take.

        Raises:
            ChannelFault: An end is gone or does not take them.
        """
        deadline, fingerprint = time.monotonic() + seconds, Fingerprint(self._device)
        room = _room(max((_words(bucket, dtype) for bucket in plan), default=0), self._device)
        for bucket in plan:
            message = room[: _words(bucket, dtype)]
            for name, part in _parts(message, bucket, dtype):
                part.copy_(weights[name])
            fingerprint.add(message)
            self._pass(message, deadline)
        self._pass(fingerprint.total, deadline)

    def receive(self, plan: Iterable[Bucket], dtype: torch.dtype, seconds: float) -> Incoming:
        """The weights that `send` sends with the same plan and dtype."""
        return Incoming(self, plan, dtype, time.monotonic() + seconds)

    def _pass(self, message: Tensor, deadline: float) -> None:
        """Hands a message from the trainer on to all others; returns when it is here, or has been taken."""
        limit = _left(deadline)
        with _faults(deadline):
            # Waiting with a limit blocks this thread with NCCL too, which else lets the GPU alone wait.
            self._group.broadcast(message, 0, limit).wait(limit)


class Incoming(Iterator[tuple[str, Tensor]]):
    """Weights on their way in, received bucket by bucket as they are asked for.

    Each bucket has memory of its own: vLLM keeps a layer's weights until it has all of them.
    """

    def __init__(self, channel: Channel, plan: Iterable[Bucket], dtype: torch.dtype, deadline: float) -> None:
        self._channel, self._dtype, self._deadline = channel, dtype, deadline
        self._left = deque(plan)
        self._here: deque[tuple[str, Tensor]] = deque()
        self._fingerprint = Fingerprint(channel._device)

    def __next__(self) -> tuple[str, Tensor]:
        while not self._here:
            if not self._left:
                raise StopIteration
            self._here.extend(self._bucket())
        return self._here.popleft()

    def finish(self) -> None:
        """Takes what has not been asked for, so that the trainer is not left waiting, and checks that all has come.

        Raises:
            ChannelFault: It has not, or not as it was sent.
        """
        self._here.clear()
        while self._left:
            self._bucket()
        sent = torch.empty_like(self._fingerprint.total)
        self._channel._pass(sent, self._deadline)
        if int(sent) != int(self._fingerprint.total):
            raise ChannelFault(
                f"weights arrived with the fingerprint {int(self._fingerprint.total)}, but were sent with {int(sent)}"
            )

    def _bucket(self) -> Iterable[tuple[str, Tensor]]:
        bucket = self._left.popleft()
        message = _room(_words(bucket, self._dtype), self._channel._device)
        self._channel._pass(message, self._deadline)
        self._fingerprint.add(message)
        return _parts(message, bucket, self._dtype)


def buckets(weights: Mapping[str, Tensor], dtype: torch.dtype, limit: int = BUCKET) -> list[Bucket]:
    """Which weights go together: in order, as many as `limit` bytes hold, and at least one."""
    plan: list[list[tuple[str, list[int]]]] = [[]]
    room = limit
    for name, weight in weights.items():
        size = weight.numel() * dtype.itemsize
        if plan[-1] and size > room:
            plan.append([])
            room = limit
        plan[-1].append((name, list(weight.shape)))
        room -= size
    return list(plan)


def hosted(address: str) -> Any:
    """What the ends of a channel meet by, listening at a free port of one address alone.

    Raises:
        ChannelFault: It is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with _faults(math.inf):
        listening = socket.create_server((address, 0), family=family)
        port = listening.getsockname()[1]
        return _c10d.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )


def gpu_of(device: torch.device) -> str | None:
    """Which GPU a device is, by a name that no other has on any machine; None where it is no CUDA GPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def local_address(host: str) -> str:
    """This machine's address on the way to another; nothing is sent there."""
    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as asked:
        asked.connect(place)
        return str(asked.getsockname()[0])


def _gloo_group(store: Any, rank: int, size: int, limit: timedelta, address: str) -> Any:
    """Listens at `address` alone, where gloo would look for one that fits this machine's name."""
    gloo = _c10d.ProcessGroupGloo
    options = gloo._Options()
    options._timeout, options._devices = limit, [gloo.create_device(hostname=address)]
    return gloo(store, rank, size, options)


def _nccl_group(store: Any, rank: int, size: int, limit: timedelta) -> Any:
    """Errors are found by the thread that waits, and by no watchdog.

    With one, which groups have by default, torch ends the process when another end has died or hangs
    (TORCH_NCCL_ASYNC_ERROR_HANDLING), and so a server's death would be the trainer's. With blocking waits there is
    none: `Work.wait` looks for errors and at the time, aborts NCCL's communicator and raises. Each group reads the
    variable when it is made. The device is that of the first message.
    """
    nccl = _c10d.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = limit
    with _variable("TORCH_NCCL_BLOCKING_WAIT", "1"):
        return nccl(store, rank, size, options)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable with another value, for one thread after the other."""
    with _ENVIRONMENT:
        former = os.environ.get(name)
        os.environ[name] = value
        try:
            yield
        finally:
            del os.environ[name]
            if former is not None:
                os.environ[name] = former


@contextmanager
def _faults(deadline: float) -> Iterator[None]:
    """Turns torch's errors into ours."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if time.monotonic() >= deadline - _EARLY:
            raise LateFault("time was up before all had got through") from error
        told = re.sub(r"^\[/\S+\] ", "", str(error))  # where in gloo's source it was said
        raise ChannelFault(f"{type(error).__name__}: {told[:_SHOWN]}") from error


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 1e-3))


def _words(bucket: Bucket, dtype: torch.dtype) -> int:
    """Of 8 bytes, which a bucket's weights take; the sum of such is quick on every device."""
    return math.ceil(sum(math.prod(shape) for _, shape in bucket) * dtype.itemsize / _WORD.itemsize)


def _room(words: int, device: torch.device) -> Tensor:
    return torch.empty(words, dtype=_WORD, device=device)


def _parts(message: Tensor, bucket: Bucket, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A message's weights, as views of it."""
    sizes = [math.prod(shape) for _, shape in bucket]
    parts = torch.split(message.view(dtype)[: sum(sizes)], sizes)
    for (name, shape), part in zip(bucket, parts, strict=True):
        yield name, part.view(tuple(shape))

"""Channels that send weights from the trainer directly to the workers of a server.

A channel is a separate process group, one per server, unknown to the trainer's and vLLM's groups. So a dead server does
not end the others. A channel uses NCCL if each end has its own GPU, else gloo.
"""

from __future__ import annotations

import hmac
import math
import os
import re
import socket
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
from vlmenv.agents.lazy_weights import outlines
from vlmenv.compat.torch import gloo_group, nccl_group
from vlmenv.core.networks import local_address

_c10d: Any = distributed  # hands on names that it does not declare to be its own
BUCKET = 256 << 20
"""Bytes of weights per message, so that small weights share one."""
_WORD = torch.int64
_DIGEST = 32  # bytes of SHA-256
_EARLY = 0.05
"""Seconds by which torch may give up before its limit, which it rounds to milliseconds."""
_GREETING = 10.0
"""Most seconds that a connection takes to a machine that can be reached."""
_MAX_MESSAGE = 200  # characters of torch's error message

Bucket = Sequence[tuple[str, Sequence[int]]]
"""Names and shapes of the weights of one message, in order."""


class ChannelFault(Exception):
    """A failed transfer of weights."""


class LateFault(ChannelFault):
    """A transfer that ran out of time."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """The rendezvous of a channel."""

    address: str
    """the trainer's address, as the server reaches it"""
    port: int
    name: str
    """unique name of the channel"""
    size: int
    """number of ends: the trainer and the server's workers"""


class Channel:
    """One end of a channel. The constructor waits for all other ends.

    Args:
        meeting: The rendezvous.
        rank: Number of this end; 0 is the trainer.
        device: Device of this end's model.
        seconds: Time limit of the rendezvous.
        token: Secret of all ends.
        store: The rendezvous store if this process hosts it.

    Raises:
        ChannelFault: The rendezvous failed, or an end does not have the token.
    """

    def __init__(
        self,
        meeting: Meeting,
        rank: int,
        device: torch.device,
        seconds: float,
        token: str,
        store: Any = None,
    ) -> None:
        self.name = meeting.name
        self._key = hmac.digest(token.encode(), meeting.name.encode(), "sha256")  # for this channel alone
        deadline = time.monotonic() + seconds
        with _faults(deadline):
            # torch's limits do not cover everything: ncclCommInitRank has no limit, and waits forever for an end that
            # died. Its non-blocking mode (config.blocking) has a limit, TORCH_NCCL_NONBLOCKING_TIMEOUT. But torch reads
            # it once for all groups of a process, also vLLM's and accelerate's, and NCCL 2.26 hung in that mode
            # (pytorch's issue 153960). A thread limits every backend.
            within(seconds, lambda: self._meet(meeting, rank, device, deadline, store))

    def _meet(self, meeting: Meeting, rank: int, device: torch.device, deadline: float, store: Any) -> None:
        """Makes the group, in a thread that may be abandoned."""
        limit = _left(deadline)
        if store is None:
            _reach(meeting, deadline)
            store = _c10d.TCPStore(
                meeting.address, meeting.port, is_master=False, timeout=limit, wait_for_workers=False
            )
        # The group keeps the C++ half of the store alone; its methods are in the Python half.
        self._store = named = _SignedStore(_c10d.PrefixStore(meeting.name, store), self._key)
        nccl = backend_between(_gpus(named, rank, meeting.size, device, deadline)) == "nccl"
        self._device = device if nccl else torch.device("cpu")
        if nccl:
            torch.cuda.set_device(device)  # the current GPU of a new thread is the first one
            self._group = nccl_group(named, rank, meeting.size, limit)
        else:
            own = meeting.address if rank == 0 else local_address(meeting.address)
            self._group = gloo_group(named, rank, meeting.size, limit, own)
        self._prove(rank, meeting.size, deadline)  # NCCL connects at the first message

    def _prove(self, rank: int, size: int, deadline: float) -> None:
        """Proves to all ends that this one has the token, and checks their proofs: gloo's ports take any connection."""
        nonces = self._gather(os.urandom(_DIGEST), size, deadline)
        challenge = b"".join(nonces)
        proofs = self._gather(self._proof(rank, challenge), size, deadline)
        for i, proof in enumerate(proofs):
            if not hmac.compare_digest(proof, self._proof(i, challenge)):
                raise ChannelFault(f"an end does not have the token of `vlmenv serve`: end {i} of {size}")

    def _proof(self, rank: int, challenge: bytes) -> bytes:
        return hmac.digest(self._key, rank.to_bytes(4) + challenge, "sha256")

    def _gather(self, own: bytes, size: int, deadline: float) -> list[bytes]:
        """What each end gives, of the length of a digest."""
        limit = _left(deadline)
        given = torch.frombuffer(bytearray(own), dtype=_WORD).to(self._device)
        taken = [torch.empty_like(given) for _ in range(size)]
        with _faults(deadline):
            self._group.allgather(taken, given, limit).wait(limit)
        return [one.cpu().numpy().tobytes() for one in taken]

    @torch.no_grad()
    def send(self, weights: Mapping[str, Tensor], plan: Sequence[Bucket], dtype: torch.dtype, seconds: float) -> None:
        """Sends weights, converted bucket by bucket, and then their fingerprint.

        Args:
            weights: Weights by name.
            plan: Buckets, from `buckets`.
            dtype: Type to convert to.
            seconds: Time limit.

        Raises:
            ChannelFault: An end is gone, or does not receive.
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
        """Receives the weights that `send` sends with the same plan and dtype."""
        return Incoming(self, plan, dtype, time.monotonic() + seconds)

    def _pass(self, message: Tensor, deadline: float) -> None:
        """Broadcasts a message from the trainer. Returns when it has arrived."""
        limit = _left(deadline)
        with _faults(deadline):
            # With a limit, NCCL's wait blocks this thread too, and not only the GPU.
            self._group.broadcast(message, 0, limit).wait(limit)


class _SignedStore(distributed.Store):  # type: ignore[misc, name-defined]
    """A rendezvous store that takes only what an end with the token has put in: torch's store takes any connection."""

    def __init__(self, store: Any, key: bytes) -> None:
        super().__init__()
        self._store, self._key = store, key

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, self._signature(key, value) + value)

    def get(self, key: str) -> bytes:
        told = bytes(self._store.get(key))
        signature, value = told[:_DIGEST], told[_DIGEST:]
        if not hmac.compare_digest(signature, self._signature(key, value)):
            raise ConnectionError("the rendezvous has an entry that was not made with the token of `vlmenv serve`")
        return value

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._store.wait(keys, *([] if timeout is None else [timeout]))

    def check(self, keys: list[str]) -> bool:
        return bool(self._store.check(keys))

    def _signature(self, key: str, value: bytes) -> bytes:
        return hmac.digest(self._key, len(key).to_bytes(4) + key.encode() + value, "sha256")


class Incoming(Iterator[tuple[str, Tensor]]):
    """An iterator over weights, which receives them bucket by bucket.

    Each bucket has its own memory, because vLLM keeps a layer's weights until it has all of them.
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
        """Receives the remaining buckets, so that the trainer does not wait, and checks the fingerprint.

        Raises:
            ChannelFault: The weights did not arrive, or differ from those that were sent.
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
    """Divides weights, in order, into buckets of at most `limit` bytes; a larger weight has its own bucket."""
    plan: list[list[tuple[str, list[int]]]] = [[]]
    room = limit
    for name, weight in outlines(weights).items():
        size = weight.numel() * dtype.itemsize
        if plan[-1] and size > room:
            plan.append([])
            room = limit
        plan[-1].append((name, list(weight.shape)))
        room -= size
    return list(plan)


def hosted(address: str) -> Any:
    """Starts a rendezvous store at a free port of one address.

    Raises:
        ChannelFault: The address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with _faults(math.inf):
        listening = socket.create_server((address, 0), family=family)
        port = listening.getsockname()[1]
        return _c10d.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )


def _reach(meeting: Meeting, deadline: float) -> None:
    """Connects to the rendezvous and parts again: torch's store would try in silence until its time is up.

    Raises:
        ChannelFault: It cannot be reached.
    """
    seconds = min(_GREETING, _left(deadline).total_seconds())
    try:
        socket.create_connection((meeting.address, meeting.port), seconds).close()
    except OSError as error:
        raise ChannelFault(
            f"the server does not reach the trainer ({error}): open the trainer's ports to it, name the server "
            "by its address in a network that leads back, or use --weight-transfer file"
        ) from error


def backend_between(gpus: Sequence[str | None]) -> str:
    """The backend between ends on these GPUs (None: a CPU): NCCL if each end has its own GPU, else gloo.

    NCCL refuses two ends on one GPU. With gloo weights go through the CPUs, which works everywhere.
    """
    return "nccl" if None not in gpus and len(set(gpus)) == len(gpus) else "gloo"


def _gpus(store: Any, rank: int, size: int, device: torch.device, deadline: float) -> list[str | None]:
    """The unique ids of all ends' GPUs, None for CPUs. Each end tells its own by the rendezvous store."""
    own = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    keys = [f"gpu/{end}" for end in range(size)]
    store.set(keys[rank], own.encode())
    store.wait(keys, _left(deadline))
    return [store.get(key).decode() or None for key in keys]


@contextmanager
def _faults(deadline: float) -> Iterator[None]:
    """Converts torch's errors to ChannelFault."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if time.monotonic() >= deadline - _EARLY:
            raise LateFault("time was up before all had got through") from error
        message = re.sub(r"^\[/\S+\] ", "", str(error))  # without gloo's source file
        raise ChannelFault(f"{type(error).__name__}: {message[:_MAX_MESSAGE]}") from error


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 1e-3))


def _words(bucket: Bucket, dtype: torch.dtype) -> int:
    """Number of 8-byte words of a bucket."""
    return math.ceil(sum(math.prod(shape) for _, shape in bucket) * dtype.itemsize / _WORD.itemsize)


def _room(words: int, device: torch.device) -> Tensor:
    return torch.empty(words, dtype=_WORD, device=device)


def _parts(message: Tensor, bucket: Bucket, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights of a message, as views of it."""
    sizes = [math.prod(shape) for _, shape in bucket]
    parts = torch.split(message.view(dtype)[: sum(sizes)], sizes)
    for (name, shape), part in zip(bucket, parts, strict=True):
        yield name, part.view(tuple(shape))

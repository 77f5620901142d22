"""Weights from process to process: over gloo for real, and over NCCL where there are two GPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from servers import listening
from torch import Tensor, distributed

from vlmenv.agents.engines import channel as channels
from vlmenv.agents.engines.channel import (
    Channel,
    ChannelFault,
    LateFault,
    Meeting,
    buckets,
    hosted,
)

SECONDS = 20.0
TOKEN = "the-secret-of-all-ends"
CPU = torch.device("cpu")
SMALL = 400
"""bytes of a bucket"""
HERE = "127.0.0.1"


def weights() -> dict[str, Tensor]:
    """Some of them larger than a bucket, empty, without a shape, turned round, trained, or of another precision."""
    torch.manual_seed(0)
    return {
        "z.first": torch.randn(7, 3),
        "a.large": torch.randn(50, 11),
        "turned": torch.randn(5, 8).T,
        "scalar": torch.randn(()),
        "none": torch.empty(0, 4),
        "trained": torch.nn.Parameter(torch.randn(13)),
        "double": torch.randn(3, 2, dtype=torch.float64),
        "half": torch.randn(40).bfloat16(),
        "more": torch.randn(90),
    }


def ends(size: int, backend: str = "gloo", address: str = HERE) -> list[Channel]:
    """All ends of a channel, which meet in threads of their own."""
    store = hosted(address)
    meeting = Meeting(address, store.port, "test", size)
    devices = [torch.device("cuda", i) if backend == "nccl" else CPU for i in range(size)]
    made: list[Channel | None] = [None] * size

    def come(rank: int) -> None:
        made[rank] = Channel(meeting, rank, devices[rank], SECONDS, TOKEN, store if rank == 0 else None)

    with at_once(*[lambda rank=rank: come(rank) for rank in range(size)]):
        pass
    return [one for one in made if one is not None]


@contextmanager
def at_once(*works: Callable[[], object]) -> Iterator[None]:
    """Does some work beside the block, and raises what is raised there."""
    faults: list[Exception] = []

    def work(one: Callable[[], object]) -> None:
        try:
            one()
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=[one], daemon=True) for one in works]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "it hangs"
    if faults:
        raise faults[0]


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each end")


@pytest.mark.parametrize(
    ("backend", "size"), [("gloo", 2), ("gloo", 3), pytest.param("nccl", 2, marks=TWO_GPUS)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_arrive_in_order_and_as_converted(backend: str, size: int, dtype: torch.dtype) -> None:
    sender, *receivers = ends(size, backend)
    for change in (1.0, 0.5):  # two updates over one channel
        given = {name: change * weight for name, weight in weights().items()}
        plan = buckets(given, dtype, SMALL)
        taken: list[list[tuple[str, Tensor]]] = [[] for _ in receivers]

        def take(i: int) -> None:
            incoming = receivers[i].receive(plan, dtype, SECONDS)  # noqa: B023
            taken[i] += incoming  # noqa: B023
            incoming.finish()

        with at_once(*[lambda i=i: take(i) for i in range(len(receivers))]):
            sender.send(given, plan, dtype, SECONDS)
        for one in taken:
            assert [name for name, _ in one] == list(given)
            for name, weight in one:
                assert weight.dtype == dtype
                assert torch.equal(weight.cpu(), given[name].detach().to(dtype))


def test_buckets_are_bounded_and_not_smaller_than_need_be() -> None:
    given = weights()
    for dtype in (torch.float32, torch.bfloat16):
        plan = buckets(given, dtype, SMALL)
        assert [name for bucket in plan for name, _ in bucket] == list(given)
        sizes = [sum(given[name].numel() * dtype.itemsize for name, _ in bucket) for bucket in plan]
        assert all(size <= SMALL or len(bucket) == 1 for size, bucket in zip(sizes, plan, strict=True))
        firsts = [given[bucket[0][0]].numel() * dtype.itemsize for bucket in plan]
        assert all(size + first > SMALL for size, first in zip(sizes, firsts[1:], strict=False))
    assert len(buckets(given, torch.float32)) == 1
    even = {str(i): torch.zeros(25) for i in range(10)}
    assert [len(bucket) for bucket in buckets(even, torch.float32, 400)] == [4, 4, 2]
    assert [len(bucket) for bucket in buckets(even, torch.float32, 399)] == [3, 3, 3, 1]
    assert [len(bucket) for bucket in buckets({"large": torch.zeros(101)} | even, torch.float32, 400)] == [1, 4, 4, 2]


def test_weights_are_received_as_they_are_asked_for() -> None:
    sender, receiver = ends(2)
    given = {str(i): torch.full([100], float(i)) for i in range(6)}
    plan = buckets(given, torch.float32, 800)
    received: list[int] = []
    passed, receiver._pass = receiver._pass, lambda *one: (received.append(1), passed(*one))  # type: ignore[assignment]
    with at_once(lambda: sender.send(given, plan, torch.float32, SECONDS)):
        incoming = receiver.receive(plan, torch.float32, SECONDS)
        seen = [len(received) for _ in incoming]
        incoming.finish()
    assert seen == [1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_a_load_that_stops_midway_leaves_nobody_waiting() -> None:
    sender, receiver = ends(2)
    given = {str(i): torch.randn(1 << 20) for i in range(12)}
    plan = buckets(given, torch.float32, 8 << 20)  # more than lies in a socket
    with at_once(lambda: sender.send(given, plan, torch.float32, SECONDS)):
        incoming = receiver.receive(plan, torch.float32, SECONDS)
        next(incoming)
        incoming.finish()
    with at_once(lambda: sender.send(given, plan, torch.float32, SECONDS)):
        incoming = receiver.receive(plan, torch.float32, SECONDS)
        assert all(torch.equal(weight, given[name]) for name, weight in incoming)
        incoming.finish()


def test_what_came_otherwise_than_it_went_is_told() -> None:
    sender, receiver = ends(2)
    plan, deadline = [[("a", [3])]], time.monotonic() + SECONDS

    def send_otherwise() -> None:
        for message in (torch.arange(2), torch.tensor([5])):
            sender._pass(message, deadline)

    with at_once(send_otherwise):
        incoming = receiver.receive(plan, torch.float32, SECONDS)
        with pytest.raises(ChannelFault, match=r"arrived with the fingerprint -?\d+, but were sent with 5"):
            incoming.finish()


def _vanish(port: int, how: signal.Signals) -> None:
    """Comes to a channel, takes the first message, and is no more."""
    end = Channel(Meeting(HERE, port, "test", 2), 1, CPU, SECONDS, TOKEN)
    end._pass(torch.empty(1 << 19, dtype=torch.int64), time.monotonic() + SECONDS)
    os.kill(os.getpid(), how)


@pytest.mark.parametrize(
    ("how", "fault", "told"),
    [(signal.SIGKILL, ChannelFault, "closed by peer|reset"), (signal.SIGSTOP, LateFault, "time was up")],
)
def test_an_end_that_vanishes_midway_is_told(how: signal.Signals, fault: type[ChannelFault], told: str) -> None:
    """One that is gone at once, and one that hangs when time is up."""
    store = hosted(HERE)
    process = multiprocessing.get_context("fork").Process(target=_vanish, args=[store.port, how], daemon=True)
    process.start()
    try:
        sender = Channel(Meeting(HERE, store.port, "test", 2), 0, CPU, SECONDS, TOKEN, store)
        given = {str(i): torch.zeros(1 << 20) for i in range(32)}
        limit = 1.0 if how == signal.SIGSTOP else SECONDS
        with pytest.raises(fault, match=told):
            sender.send(given, buckets(given, torch.float32, 4 << 20), torch.float32, limit)
    finally:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_others_are_waited_for_no_longer_than_given(rank: int) -> None:
    """By the trainer, and by a worker, whose trainer may take a connection and never answer."""
    store = hosted(HERE) if rank == 0 else None
    with socket.create_server((HERE, 0)) as silent:
        port = store.port if store else silent.getsockname()[1]
        with pytest.raises(LateFault):  # else it waits for ever
            Channel(Meeting(HERE, port, "test", 2), rank, CPU, 1.0, TOKEN, store)


class Unanswering(distributed.Store):
    """Takes for ever over all that it is asked, and heeds no limit, as NCCL's start without the other ends does."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.over = threading.Event(), threading.Event()

    def set(self, key: str, value: str) -> None:
        self.asked.set()
        self.over.wait(120)
        raise RuntimeError("nobody has come")


@pytest.mark.slow
def test_a_start_that_heeds_no_limit_is_given_up() -> None:
    store, before = Unanswering(), threading.active_count()
    meeting = Meeting(HERE, 1, "test", 2)
    try:
        with (
            pytest.raises(LateFault, match="time was up"),
            at_once(lambda: Channel(meeting, 0, CPU, 1.0, TOKEN, store)),
        ):
            assert store.asked.wait(SECONDS)
    finally:
        store.over.set()
    deadline = time.monotonic() + SECONDS
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "its thread does not end"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="other machines may have one address of their own")
def test_a_channel_listens_at_its_own_addresses_alone_and_while_it_is_there() -> None:
    before = listening()
    made = ends(2, address="127.0.0.2")
    assert sorted(address for address, _ in listening() - before) == [HERE, "127.0.0.2", "127.0.0.2"]
    made.clear()
    assert listening() <= before


def test_groups_of_nccl_start_no_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end this process when another end dies. Without GPUs only what they are made with can be looked at."""
    seen: list[Any] = []

    class Group:
        class Options:
            _timeout = None

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            seen.append((rank, size, options._timeout.total_seconds(), os.environ["TORCH_NCCL_BLOCKING_WAIT"]))

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Group, raising=False)
    for former in (None, "0"):
        if former is not None:
            monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", former)
        channels.nccl_group(None, 1, 3, channels.timedelta(seconds=7))
        assert os.environ.get("TORCH_NCCL_BLOCKING_WAIT") == former
    assert seen == [(1, 3, 7.0, "1")] * 2


# Ends without the token.


def meet(*tokens: str, kinds: tuple[type[Channel], ...] = (Channel, Channel)) -> list[object]:
    """What becomes of two ends: a channel, or a fault."""
    store = hosted(HERE)
    meeting = Meeting(HERE, store.port, "test", 2)
    made: list[object] = [None, None]

    def come(rank: int) -> None:
        try:
            made[rank] = kinds[rank](meeting, rank, CPU, 5.0, tokens[rank], store if rank == 0 else None)
        except ChannelFault as fault:
            made[rank] = fault

    with at_once(*[lambda rank=rank: come(rank) for rank in range(2)]):
        pass
    return made


def test_ends_with_unlike_tokens_do_not_meet() -> None:
    made = meet(TOKEN, "another-secret-of-one-end")
    assert all(isinstance(one, ChannelFault) for one in made)
    assert any("not made with the token of `vlmenv serve`" in str(one) for one in made)


class Intruder(Channel):
    """One that has come to a group past the rendezvous, and knows all of what is sent but the token."""

    def _proof(self, rank: int, challenge: bytes) -> bytes:
        return self._gathered[-1 - rank] if hasattr(self, "_gathered") else bytes(32)

    def _gather(self, own: bytes, size: int, deadline: float) -> list[bytes]:
        self._gathered = super()._gather(own, size, deadline)
        return self._gathered


@pytest.mark.parametrize("rank", [0, 1])
def test_an_end_that_cannot_prove_the_token_is_refused(rank: int) -> None:
    kinds = (Intruder, Channel) if rank == 0 else (Channel, Intruder)
    fault = meet(TOKEN, TOKEN, kinds=kinds)[1 - rank]
    assert isinstance(fault, ChannelFault)
    assert f"does not have the token of `vlmenv serve`: end {rank} of 2" in str(fault)


@pytest.mark.slow
def test_proofs_are_of_one_meeting_and_one_end() -> None:
    one, other = ends(2)
    assert one._proof(0, b"a") == other._proof(0, b"a")
    assert len({one._proof(0, b"a"), one._proof(1, b"a"), one._proof(0, b"b")}) == 3


def test_entries_of_a_rendezvous_are_signed_for_their_place() -> None:
    hosting = hosted(HERE)
    ours = channels._SignedStore(distributed.PrefixStore("test", hosting), b"key")
    stranger = distributed.TCPStore(HERE, hosting.port, is_master=False, wait_for_workers=False)
    ours.set("a", b"address of a")
    assert ours.get("a") == b"address of a"
    (place,) = [key for key in stranger.list_keys() if key.endswith("/a")]
    kept = stranger.get(place)
    for forged in (b"address of another", bytes(32) + b"address of another", kept[:-1] + b"b", b""):
        stranger.set(place, forged)
        with pytest.raises(ConnectionError, match="not made with the token"):
            ours.get("a")
    stranger.set(place.removesuffix("a") + "b", kept)  # a true entry of another place
    with pytest.raises(ConnectionError, match="not made with the token"):
        ours.get("b")

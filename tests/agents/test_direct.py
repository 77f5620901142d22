"""Weights that go from the trainer straight to servers' workers; what loads them there is stood in for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import stand_in_server
import torch
from servers import free_port, listening
from stand_in_server import (
    Answering,
    Cut,
    Fault,
    Reply,
    Worker,
    agent_of,
    assert_answered,
    change,
    changed,
    hang,
    lose_patience,
)

from vlmenv.agents.engines.access import server_token
from vlmenv.agents.engines.channel import (
    Channel,
    ChannelFault,
    Incoming,
    Meeting,
    backend_between,
    buckets,
    hosted,
)
from vlmenv.agents.vlm import VLMAgent

opened, model, good, bad = stand_in_server.opened, stand_in_server.model, stand_in_server.good, stand_in_server.bad
"""fixtures"""

Load = Callable[[Worker, Incoming], None]


def load(worker: Worker, incoming: Incoming) -> None:
    worker.weights = dict(incoming)


JOIN, RECEIVE = "/init_weight_transfer_engine", "/update_weights"
OVER = threading.Event()
"""set when a test is, for what hangs in it"""


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Load], None]]:
    """Chooses what stands in for vLLM's loading of weights, which come in many buckets."""
    OVER.clear()
    monkeypatch.setattr("vlmenv.agents.engines.direct.buckets", partial(buckets, limit=1 << 18))
    choose = partial(monkeypatch.setattr, Worker, "load")
    choose(load)
    yield choose
    OVER.set()


def orders(server: Answering) -> list[str]:
    """What its workers have been told to do."""
    return [path for path in server.paths() if path in (JOIN, RECEIVE)]


def assert_has_weights(server: Answering, agent: VLMAgent) -> None:
    expected = agent._published_weights()
    dtype = getattr(torch, server.model["dtype"])
    for worker in server.workers:
        assert list(worker.weights) == list(expected)
        for name, tensor in worker.weights.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[name].to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_arrive_whole_by_channels(
    dtype: str, good: Answering, bad: Answering, opened: ExitStack, loading: Callable[[Load], None]
) -> None:
    """At servers of one worker and of two; the channels stay for the next, and go in the end."""
    good.model["dtype"] = bad.model["dtype"] = dtype
    bad.workers.append(Worker(1))
    before = listening()
    agent = agent_of(opened, good.url, bad.url, transfer="direct")
    assert len(listening() - before) > 2
    for _ in range(2):
        change(agent)
        agent.sync()
        for server in (good, bad):
            assert_has_weights(server, agent)
            told = [RECEIVE, "/reset_prefix_cache", "/reset_encoder_cache", "/update_weight_version"]
            assert server.paths()[-4:] == told
    assert_answered(agent)
    for server in (good, bad):
        assert orders(server) == [JOIN, RECEIVE, RECEIVE, RECEIVE]
        for worker in server.workers:
            worker.leave()
    engine = agent.engine
    agent.close()
    assert engine is not None
    assert listening() <= before


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["direct", "file"])
def test_merged_adapters_arrive(
    transfer: str, good: Answering, opened: ExitStack, loading: Callable[[Load], None]
) -> None:
    pytest.importorskip("peft")
    agent = agent_of(opened, good.url, transfer=transfer)
    agent.add_lora(rank=2, alpha=8, vision=True)
    for parameter in agent.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    agent.sync()
    expected, found = agent._published_weights(), good.weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_server_that_is_at_the_channel_no_more_comes_to_a_new_one(
    good: Answering, opened: ExitStack, loading: Callable[[Load], None], recwarn: pytest.WarningsRecorder
) -> None:
    """It was restarted, or has come to another trainer's."""
    agent = agent_of(opened, good.url, transfer="direct")
    good.workers = [Worker(0)]
    agent.sync()
    assert_has_weights(good, agent)
    other = agent_of(opened, good.url, transfer="direct")
    change(other)
    for one in (agent, other, agent):
        one.sync()
        assert_has_weights(good, one)
        assert_answered(one)
    assert orders(good).count(JOIN) == 6
    assert not [one for one in recwarn if one.category is RuntimeWarning]


def fail_midway(worker: Worker, incoming: Incoming) -> None:
    for _ in range(5):
        next(incoming)
    raise LookupError("no such weight")


def stop_midway(worker: Worker, incoming: Incoming) -> None:
    next(incoming)
    raise ValueError("weights were not updated: ['model.norm']")


def die_midway(worker: Worker, incoming: Incoming) -> None:
    """Its connections are closed, but not that over which it was told to receive."""
    next(incoming)
    worker._line = incoming._channel = None  # type: ignore[assignment]
    hang_midway(worker, incoming)


def hang_midway(worker: Worker, incoming: Incoming) -> None:
    OVER.wait(60)


def come_otherwise(worker: Worker, incoming: Incoming) -> None:
    incoming._fingerprint.total += 1
    load(worker, incoming)


def cut_after_it(server: Answering, path: str, usual: Any) -> Reply:
    raise Cut


def no_channel(server: Answering, path: str, usual: Any) -> Reply:
    return 409, b'{"error": "cannot take over weights: no way there"}'


DIRECT_FAULTS: dict[str, tuple[Load, str, Fault | None, str]] = {
    "a load that fails": (fail_midway, RECEIVE, None, "cannot take over weights: LookupError: no such weight"),
    "a load that leaves weights": (stop_midway, RECEIVE, None, r"weights were not updated: \['model.norm'\]"),
    "weights that come otherwise": (
        come_otherwise,
        RECEIVE,
        None,
        r"cannot take over weights: weights arrived with the fingerprint",
    ),
    "a worker that dies": (die_midway, RECEIVE, None, "its weights cannot be sent: .*by peer"),
    "a worker that hangs": (hang_midway, RECEIVE, None, f"no answer from {RECEIVE} within 3 s|time was up"),
    "all hang": (load, RECEIVE, hang, f"no answer from {RECEIVE} within 3 s"),
    "no answer": (load, RECEIVE, cut_after_it, f"RemoteProtocolError at {RECEIVE}"),
    "no channel": (load, JOIN, no_channel, "cannot take over weights: no way there"),
    "another form": (
        load,
        "/get_world_size",
        changed(lambda reply: reply.pop("world_size")),
        "unexpected answer",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", DIRECT_FAULTS)
def test_a_server_to_which_weights_do_not_get_is_left_out_until_they_do(
    fault: str, good: Answering, bad: Answering, opened: ExitStack, loading: Callable[[Load], None]
) -> None:
    """The others are none the worse for it."""
    agent = agent_of(opened, bad.url, good.url, transfer="direct")
    how, bad.at, bad.fault, told = DIRECT_FAULTS[fault]
    loading(lambda worker, incoming: (how if worker in bad.workers else load)(worker, incoming))
    if "hang" in fault:
        lose_patience(agent, bad)
    if bad.at != RECEIVE:
        bad.workers = [Worker(0)]  # it has no channel
    change(agent)
    with pytest.warns(RuntimeWarning, match=f"{bad.url} is excluded .*({told})"):
        agent.sync()
    assert_has_weights(good, agent)
    assert_answered(agent)
    assert "/inference/v1/generate" not in bad.paths()
    loading(load)
    bad.fault = None
    with pytest.warns(RuntimeWarning, match=f"{bad.url} took the update and is in use again"):
        agent.sync()
    assert_has_weights(bad, agent)
    assert orders(bad)[-2:] == [JOIN, RECEIVE]


@pytest.mark.slow
def test_a_transfer_that_breaks_once_is_tried_again(
    good: Answering, opened: ExitStack, loading: Callable[[Load], None], recwarn: pytest.WarningsRecorder
) -> None:
    agent = agent_of(opened, good.url, transfer="direct")
    loads = iter([die_midway, load])
    loading(lambda worker, incoming: next(loads)(worker, incoming))
    change(agent)
    agent.sync()
    assert_has_weights(good, agent)
    assert not [one for one in recwarn if one.category is RuntimeWarning]


@pytest.mark.slow
def test_a_worker_whose_trainer_hangs_answers_and_comes_to_the_next() -> None:
    """The first takes its connection, and is never heard of again."""
    worker = Worker(0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hung = Meeting("127.0.0.1", silent.getsockname()[1], "hung", 2)
        with pytest.raises(ChannelFault, match="time was up"):
            worker.join(1.0, **asdict(hung))
    assert worker._line is None
    store = hosted("127.0.0.1")
    meeting = Meeting("127.0.0.1", store.port, "next", 2)
    with ThreadPoolExecutor() as pool:
        trainer = pool.submit(Channel, meeting, 0, torch.device("cpu"), 20.0, server_token(), store)
        worker.join(20.0, **asdict(meeting))
        trainer.result()
    assert worker._line is not None
    assert worker._line.name == "next"


def test_a_worker_that_does_not_reach_its_trainer_says_so_at_once() -> None:
    port = free_port()
    told = rf"at 127\.0\.0\.1, port {port}: the server does not reach the trainer \(.*refused\)"
    with pytest.raises(ChannelFault, match=told):
        Worker(0).join(20.0, **asdict(Meeting("127.0.0.1", port, "nowhere", 2)))


@pytest.mark.parametrize(
    ("trainer", "workers", "backend"),
    [
        ("a", ["b", "c"], "nccl"),
        (None, [None], "gloo"),
        ("a", [None], "gloo"),
        (None, ["a", "b"], "gloo"),
        ("a", ["a"], "gloo"),
        ("a", ["b", "a"], "gloo"),
        ("a", ["b", "b"], "gloo"),
    ],
)
def test_only_ends_with_a_gpu_each_have_nccl(trainer: str | None, workers: list[str | None], backend: str) -> None:
    assert backend_between([trainer, *workers]) == backend

"""Weights that go from the trainer straight to servers' workers; what loads them there is stood in for."""

from __future__ import annotations

import json
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
from servers import listening
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
from vlmenv.agents.engines.channel import Channel, Incoming, Meeting, buckets, hosted
from vlmenv.agents.engines.direct import backend_between
from vlmenv.agents.vlm import VLMAgent

opened, model, good, bad = stand_in_server.opened, stand_in_server.model, stand_in_server.good, stand_in_server.bad
"""fixtures"""

Load = Callable[[Worker, Incoming], list[str]]


def load(worker: Worker, incoming: Incoming) -> list[str]:
    worker.weights = dict(incoming)
    return []


OVER = threading.Event()
"""set when a test is, for what hangs in it"""


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Load], None]]:
    """Chooses what stands in for vLLM's loading of weights, which come in many buckets."""
    OVER.clear()
    monkeypatch.setattr("vlmenv.agents.engines.direct.buckets", partial(buckets, limit=1 << 18))
    choose = partial(monkeypatch.setattr, "vlmenv.agents.engines.worker.overwrite")
    choose(load)
    yield choose
    OVER.set()


def orders(server: Answering) -> list[str]:
    """What its workers have been told to do."""
    return [body["method"] for path, body in server.asked if path == "/collective_rpc"]


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
            told = ["/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache", "/update_weight_version"]
            assert server.paths()[-4:] == told
    assert_answered(agent)
    for server in (good, bad):
        assert orders(server)[1:3] == ["vlmenv_channel", "vlmenv_join"]
        assert orders(server)[3:] == ["vlmenv_receive", *["vlmenv_channel", "vlmenv_receive"] * 2]
        server.workers.clear()
    engine = agent.engine
    agent.close()
    assert engine is not None
    assert listening() <= before


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
    assert orders(good).count("vlmenv_join") == orders(good).count("vlmenv_receive") == 6
    assert not [one for one in recwarn if one.category is RuntimeWarning]


def fail_midway(worker: Worker, incoming: Incoming) -> list[str]:
    for _ in range(5):
        next(incoming)
    raise LookupError("no such weight")


def stop_midway(worker: Worker, incoming: Incoming) -> list[str]:
    next(incoming)
    return ["model.norm"]


def die_midway(worker: Worker, incoming: Incoming) -> list[str]:
    """Its connections are closed, but not that over which it was told to receive."""
    next(incoming)
    worker.vlmenv_line = incoming._channel = None  # type: ignore[assignment]
    return hang_midway(worker, incoming)


def hang_midway(worker: Worker, incoming: Incoming) -> list[str]:
    OVER.wait(60)
    return []


def come_otherwise(worker: Worker, incoming: Incoming) -> list[str]:
    incoming._fingerprint.total += 1
    return load(worker, incoming)


def cut_after_it(server: Answering, path: str, usual: Any) -> Reply:
    if server.asked[-1][1]["method"] == "vlmenv_receive":
        raise Cut
    return 200, json.dumps(usual).encode()


def no_channel(server: Answering, path: str, usual: Any) -> Reply:
    refused = server.asked[-1][1]["method"] == "vlmenv_join"
    return 200, json.dumps({"results": [{"fault": "no way there"}]} if refused else usual).encode()


DIRECT_FAULTS: dict[str, tuple[Load, Fault | None, str]] = {
    "a load that fails": (fail_midway, None, "cannot take over weights: LookupError: no such weight"),
    "a load that leaves weights": (stop_midway, None, r"weights were not updated: \['model.norm'\]"),
    "weights that come otherwise": (
        come_otherwise,
        None,
        r"cannot take over weights: weights arrived with the fingerprint",
    ),
    "a worker that dies": (die_midway, None, "its weights cannot be sent: .*by peer"),
    "a worker that hangs": (hang_midway, None, "no answer from /collective_rpc within 3 s|time was up"),
    "all hang": (load, hang, "no answer from /collective_rpc within 3 s"),
    "no answer": (load, cut_after_it, "RemoteProtocolError at /collective_rpc"),
    "no channel": (load, no_channel, "cannot take over weights: no way there"),
    "another form": (load, changed(lambda reply: reply["results"][0].pop("gpu", 0)), "unexpected answer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", DIRECT_FAULTS)
def test_a_server_to_which_weights_do_not_get_is_left_out_until_they_do(
    fault: str, good: Answering, bad: Answering, opened: ExitStack, loading: Callable[[Load], None]
) -> None:
    """The others are none the worse for it."""
    agent = agent_of(opened, bad.url, good.url, transfer="direct")
    how, bad.fault, told = DIRECT_FAULTS[fault]
    bad.at = "/collective_rpc"
    loading(lambda worker, incoming: (how if worker in bad.workers else load)(worker, incoming))
    if "hang" in fault:
        lose_patience(agent, bad)
    if bad.fault is no_channel:
        bad.workers = [Worker(0)]
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
    assert orders(bad)[-2:] == ["vlmenv_join", "vlmenv_receive"]


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
        hung = Meeting("127.0.0.1", silent.getsockname()[1], "hung", 2, "gloo")
        assert "time was up" in worker.vlmenv_join(1.0, **asdict(hung))["fault"]
    assert worker.vlmenv_channel() == {"fault": None, "name": None, "gpu": None}
    store = hosted("127.0.0.1")
    meeting = Meeting("127.0.0.1", store.port, "next", 2, "gloo")
    with ThreadPoolExecutor() as pool:
        trainer = pool.submit(Channel, meeting, 0, torch.device("cpu"), 20.0, server_token(), store)
        assert worker.vlmenv_join(20.0, **asdict(meeting)) == {"fault": None}
        trainer.result()
    assert worker.vlmenv_channel() == {"fault": None, "name": "next", "gpu": None}


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

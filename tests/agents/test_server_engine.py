"""What the engine of servers does about servers that fail. They are faulty ones, so that it needs no vLLM."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import observations
from PIL import Image
from safetensors.torch import load_file
from servers import free_port, listening

from vlmenv.agents.engines.channel import Incoming, buckets
from vlmenv.agents.engines.direct import backend_between
from vlmenv.agents.engines.remote import Patience, check_address
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.engines.worker import WeightReceiver, checksum_of, weight_shapes
from vlmenv.agents.sampling import Sampling
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.errors import ConfigError, EngineError
from vlmenv.core.rollout import Observation, unbatch

PATIENT = Patience(answer=60, greeting=60, attempts=2, pause=0.01)
HASTY = Patience(answer=3, greeting=3, attempts=2, pause=0.01)
"""with servers that are about to hang"""
TOKENS = 3
"""of each completion"""
ASKED: list[Observation] = [{"images": (), "prompt": f"How many is {i} and 3?"} for i in range(8) for _ in range(2)]
LATER: list[Observation] = [one | {"prompt": one["prompt"] + " Later."} for one in ASKED]

Reply = tuple[int, bytes]
Fault = Callable[["Answering", str, Any], Reply]


class Worker(WeightReceiver):
    """One of vLLM's, without a model to load weights into."""

    def __init__(self, rank: int) -> None:
        self.rank, self.device = rank, torch.device("cpu")
        self.weights: dict[str, torch.Tensor] = {}


@dataclass
class Answering:
    """Answers in vLLM's form, with tokens of its own; `fault` may change what it says."""

    model: dict[str, Any]
    max_length: int = 256
    version: str = "default"
    fault: Fault | None = None
    at: str = "/inference/v1/generate"
    """the path whose answers it changes"""
    asked: list[tuple[str, Any]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=lambda: [Worker(0)])
    """to which weights go directly"""
    url: str = ""

    def reply(self, path: str, body: Any) -> Reply:
        self.asked.append((path, body))
        usual = getattr(self, f"_{path.rpartition('/')[2]}")(body)
        if self.fault is not None and path == self.at:
            return self.fault(self, path, usual)
        return 200, b"" if usual is None else json.dumps(usual).encode()

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def _models(self, body: Any) -> Any:
        return {"data": [{"id": "a", "max_model_len": self.max_length}]}

    def _collective_rpc(self, body: Any) -> Any:
        method, arguments = body["method"], body.get("kwargs", {})
        if method == "vlmenv_model":
            return {"results": [self.model]}
        if method != "vlmenv_overwrite":
            with ThreadPoolExecutor() as pool:  # each is a process of vLLM's
                orders = [pool.submit(getattr(worker, method), **arguments) for worker in self.workers]
                return {"results": [order.result() for order in orders]}
        path = Path(body["kwargs"]["path"])
        assert checksum_of(path) == body["kwargs"]["checksum"]
        self.weights = load_file(path)
        return {"results": [{"fault": None}]}

    def _reset_prefix_cache(self, body: Any) -> Any:
        return {"success": True}

    def _reset_encoder_cache(self, body: Any) -> None:
        return None

    def _update_weight_version(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {"success": True}

    def _generate(self, body: Any) -> Any:
        choices = [self._choice(i) for i in range(body["sampling_params"]["n"])]
        return {"choices": choices, "prompt_token_ids": body["token_ids"]}

    def _choice(self, i: int) -> Any:
        ids = [20 + i, 21, 22]
        return {
            "index": i,
            "token_ids": ids,
            "logprobs": {"content": [{"token_id": token, "logprob": -0.5} for token in ids]},
            "finish_reason": "length",
            "weight_versions": [{"version": self.version, "start": 0, "end": TOKENS}],
        }


@contextmanager
def answering(served: Answering, port: int = 0) -> Iterator[Answering]:
    """Lets it answer over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, told = served.reply(self.path, json.loads(content) if content else None)
            self.send_response(status)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        do_GET = do_POST = answer

        def log_message(self, *args: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except (ConnectionError, Cut):
                self.close_connection = True

    class Silent(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    with Silent(("127.0.0.1", port), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield served
        server.shutdown()


class Cut(Exception):
    """Ends the connection without an answer."""


@pytest.fixture(scope="module")
def model() -> dict[str, Any]:
    agent = VLMAgent.from_pretrained("builtin")
    weights = weight_shapes(agent.folder)
    banned = agent.family.banned_tokens.tolist()
    return {"weights": weights, "banned": banned, "dtype": "float32", "logprobs": "processed_logprobs"}


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def good(model: dict[str, Any], opened: ExitStack) -> Answering:
    return opened.enter_context(answering(Answering(dict(model))))


@pytest.fixture
def bad(model: dict[str, Any], opened: ExitStack) -> Answering:
    return opened.enter_context(answering(Answering(dict(model))))


def agent_of(opened: ExitStack, *urls: str, **how: Any) -> VLMAgent:
    """An agent whose answers come from servers that have been given its weights."""
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=TOKENS))
    agent.engine = VLLMServerEngine(urls, agent.folder, agent.family, patience=PATIENT, **how)
    opened.callback(agent.close)
    agent.sync()
    return agent


def lose_patience(agent: VLMAgent, *servers: Answering) -> None:
    """With some servers."""
    for server in agent.engine._servers:
        if server.url in [one.url for one in servers]:
            server._patience = HASTY


def asked_later(agent: VLMAgent, server: Answering) -> int:
    """How many prompts of `LATER` a server was given; those of `ASKED` may arrive when it has been left out."""
    chats = [agent.family.chat(one) for one in LATER]
    bodies = [body for path, body in server.asked if path == "/inference/v1/generate" and body]  # given up: none
    return sum(agent.family.processor.tokenizer.decode(body["token_ids"]) in chats for body in bodies)


def assert_answered(agent: VLMAgent, asked: list[Observation] = ASKED) -> None:
    """Every prompt has its completions."""
    rollout = agent.rollout(asked)
    assert [one.token_ids.tolist() for one in rollout.completions] == [[20, 21, 22], [21, 21, 22]] * 8
    assert all((one.logprobs == -0.5).all() and one.finish_reason == "length" for one in rollout.completions)


def test_prompts_are_spread_over_the_servers(good: Answering, bad: Answering, opened: ExitStack) -> None:
    agent = agent_of(opened, good.url, bad.url)
    assert_answered(agent)
    for server in (good, bad):
        assert 3 <= server.paths().count("/inference/v1/generate") <= 5
    bodies = [body for path, body in good.asked + bad.asked if path == "/inference/v1/generate"]
    assert len({body["sampling_params"]["seed"] for body in bodies}) == 8
    chats = {agent.family.chat(one) for one in ASKED}
    assert {agent.family.processor.tokenizer.decode(body["token_ids"]) for body in bodies} == chats


def test_many_completions_of_a_prompt_are_asked_for_in_parts(good: Answering, opened: ExitStack) -> None:
    agent = agent_of(opened, good.url)
    rollout = agent.rollout(ASKED[:1] * 150)
    counts = [body["sampling_params"]["n"] for path, body in good.asked if path.endswith("generate")]
    assert sorted(counts) == [22, 64, 64]
    first = [one.token_ids[0] - 20 for one in rollout.completions]
    assert first == [*range(64), *range(64), *range(22)]


def changed(change: Callable[[Any], Any]) -> Fault:
    """Changes the answer, or its first completion."""

    def fault(server: Answering, path: str, usual: Any) -> Reply:
        change(usual)
        return 200, json.dumps(usual).encode()

    return fault


def first(change: Callable[[Any], Any]) -> Fault:
    return changed(lambda reply: change(reply["choices"][0]))


def hang(server: Answering, path: str, usual: Any) -> Reply:
    time.sleep(60)
    return 200, json.dumps(usual).encode()


def cut(server: Answering, path: str, usual: Any) -> Reply:
    raise Cut


def shorten(choice: Any) -> None:
    choice["token_ids"].pop()
    choice["logprobs"]["content"].pop()


def lengthen(choice: Any) -> None:
    choice["token_ids"].append(21)
    choice["logprobs"]["content"].append({"token_id": 21, "logprob": -1.0})


def logprob(value: Any) -> Fault:
    return first(lambda choice: choice["logprobs"]["content"][1].update(logprob=value))


FAULTS: dict[str, tuple[Fault, str]] = {
    "hangs": (hang, "no answer from /inference/v1/generate within 3 s"),
    "cuts the connection": (cut, "RemoteProtocolError at /inference/v1/generate"),
    "status 500": (lambda *_: (500, b"the engine is dead"), "status 500 .*the engine is dead"),
    "status 400": (lambda *_: (400, b"too many images"), "status 400 .*too many images"),
    "not JSON": (lambda *_: (200, b"<html>a proxy's page</html>"), "not JSON: .*a proxy's page"),
    "not even text": (lambda *_: (200, bytes(range(128, 256))), "not JSON"),
    "a list": (lambda *_: (200, b"[1, 2]"), "not of vLLM's form"),
    "no completions": (changed(lambda reply: reply.pop("choices")), "not of vLLM's form .KeyError: 'choices'"),
    "too few completions": (changed(lambda reply: reply["choices"].pop()), "1 completions came where 2 were asked"),
    "one twice": (first(lambda choice: choice.update(index=1)), "2 completions came where 2 were asked"),
    "text for tokens": (first(lambda choice: choice.update(token_ids=["a"])), "no list of integers"),
    "fractions of tokens": (first(lambda choice: choice.update(token_ids=[1.5])), "no list of integers"),
    "no log-probabilities": (first(lambda choice: choice.update(logprobs=None)), "not of vLLM's form"),
    "no number": (logprob(float("nan")), "log-probabilities came that are none"),
    "vLLM's word for no number": (logprob(-9999.0), "log-probabilities came that are none"),
    "a probability above 1": (logprob(0.5), "log-probabilities came that are none"),
    "null": (logprob(None), "not of vLLM's form"),
    "other tokens": (first(lambda choice: choice["token_ids"].reverse()), "with the log-probabilities of 3, or of"),
    "unknown tokens": (changed(lambda reply: lift(reply["choices"][0])), "tokens came that the model does not have"),
    "too few tokens": (first(shorten), "a completion of 2 tokens came, ended by 'length'"),
    "too many tokens": (first(lengthen), "a completion of 4 tokens came"),
    "aborted": (first(lambda choice: choice.update(finish_reason="abort")), "a completion ended by 'abort'"),
    "no word of the weights": (first(lambda choice: choice.update(weight_versions=None)), "not of vLLM's form"),
    "other weights": (
        first(lambda choice: choice["weight_versions"][0].update(version="default")),
        "its weights are not those that it was last given",
    ),
}


def lift(choice: Any) -> None:
    choice["token_ids"][0] = choice["logprobs"]["content"][0]["token_id"] = 10**6


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_is_left_out(fault: str, good: Answering, bad: Answering, opened: ExitStack) -> None:
    """The others do its work. Alone it ends the rollout; nothing it says is taken for a completion."""
    agent, alone = agent_of(opened, bad.url, good.url), agent_of(opened, bad.url)
    agent.sync()  # `alone` has given it weights of its own version
    bad.fault, told = FAULTS[fault]
    if bad.fault is hang:
        lose_patience(agent, bad)
        lose_patience(alone, bad)
    with pytest.warns(RuntimeWarning, match=f"the server {bad.url} is left out until .*: .*{told}"):
        assert_answered(agent)
    assert_answered(agent, LATER)
    assert not asked_later(agent, bad)
    alone.engine._version = bad.version
    with pytest.raises(EngineError, match=f"no server is left to generate. {bad.url}: .*{told}"):
        alone.rollout(ASKED)


def test_a_fault_that_passes_is_not_told(good: Answering, opened: ExitStack, recwarn: pytest.WarningsRecorder) -> None:
    agent = agent_of(opened, good.url)
    left = threading.Semaphore(3)

    def fault(server: Answering, path: str, usual: Any) -> Reply:
        return (503, b"busy") if left.acquire(blocking=False) else (200, json.dumps(usual).encode())

    good.fault = fault
    agent.engine._servers[0]._patience = Patience(attempts=5, pause=0.01)
    assert_answered(agent)
    assert not [one for one in recwarn if one.category is RuntimeWarning]


def test_a_server_that_was_started_anew_waits_for_the_next_update(
    good: Answering, bad: Answering, opened: ExitStack
) -> None:
    """It has the weights of its folder until then, and answers as if nothing had been."""
    agent = agent_of(opened, bad.url, good.url)
    bad.version = "default"
    with pytest.warns(RuntimeWarning, match=f"{bad.url} is left out .*started anew"):
        assert_answered(agent)
    with pytest.warns(RuntimeWarning, match=f"{bad.url} has taken the update and is in use again"):
        agent.sync()
    assert_answered(agent, LATER)
    assert asked_later(agent, bad) == 4


def test_a_server_that_is_away_at_first_joins_later(model: dict[str, Any], good: Answering, opened: ExitStack) -> None:
    port = free_port()
    late = f"http://127.0.0.1:{port}"
    with pytest.warns(RuntimeWarning, match=f"{late} is left out .*ConnectError"):
        agent = agent_of(opened, late, good.url)
    assert_answered(agent)
    server = opened.enter_context(answering(Answering(dict(model)), port))
    with pytest.warns(RuntimeWarning, match=f"{late} .* in use again"):
        agent.sync()
    assert_answered(agent)
    assert "/inference/v1/generate" in server.paths()


def test_without_any_server_there_is_no_engine(opened: ExitStack) -> None:
    away = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    with pytest.raises(EngineError, match=f"{away[0]}: ConnectError.*{away[1]}: ConnectError"):
        agent_of(opened, *away)


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "names": ({"weights": {"a": [1]}}, "it serves another model than .* weights have other names or shapes, such as a"),
    "tokens": ({"banned": [1]}, "bans other tokens"),
    "log-probabilities": ({"logprobs": "raw_logprobs"}, "its log-probabilities are raw_logprobs"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_a_server_of_another_model_is_refused(what: str, good: Answering, bad: Answering, opened: ExitStack) -> None:
    change, told = UNLIKE[what]
    bad.model |= change
    with pytest.raises(EngineError, match=f"{bad.url}: .*{told}"):
        agent_of(opened, good.url, bad.url)


def test_a_server_with_weights_of_other_shapes_is_refused(bad: Answering, opened: ExitStack) -> None:
    name = "model.language_model.norm.weight"
    bad.model["weights"] = bad.model["weights"] | {name: [64]}
    with pytest.raises(EngineError, match=rf"1 weights have other names or shapes, such as {name}, \[64\] there"):
        agent_of(opened, bad.url)


def test_servers_of_unlike_precision_are_refused(good: Answering, bad: Answering, opened: ExitStack) -> None:
    bad.model["dtype"] = "bfloat16"
    with pytest.raises(EngineError, match=f"{bad.url}: it works in bfloat16, and another server in float32"):
        agent_of(opened, good.url, bad.url)


def test_a_server_that_comes_back_with_another_model_stays_out(
    good: Answering, bad: Answering, opened: ExitStack
) -> None:
    agent = agent_of(opened, bad.url, good.url)
    bad.fault = cut
    with pytest.warns(RuntimeWarning, match="left out"):
        agent.rollout(ASKED)
    bad.fault, bad.model = None, bad.model | {"weights": {"a": [1]}}
    agent.sync()
    assert_answered(agent, LATER)
    assert not asked_later(agent, bad)


def test_the_shortest_server_bounds_the_length(good: Answering, bad: Answering, opened: ExitStack) -> None:
    bad.max_length = 100
    assert agent_of(opened, good.url, bad.url).engine.max_length == 100


def test_what_is_no_server_of_ours_is_told(bad: Answering, opened: ExitStack) -> None:
    bad.at, bad.fault = "/collective_rpc", lambda *_: (404, b'{"detail": "Not Found"}')
    with pytest.raises(EngineError, match=f"{bad.url}: it was not started by `vlmenv serve` .*status 404"):
        agent_of(opened, bad.url)


# Updates.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_arrive_whole_and_their_files_go(
    dtype: str, good: Answering, bad: Answering, opened: ExitStack, tmp_path: Path
) -> None:
    good.model["dtype"] = bad.model["dtype"] = dtype
    agent = agent_of(opened, good.url, bad.url, weights_folder=tmp_path)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(0.1)
    agent.sync()
    expected = agent._published_weights()
    for server in (good, bad):
        assert server.weights.keys() == expected.keys()
        for name, tensor in server.weights.items():
            assert torch.equal(tensor, expected[name].to(getattr(torch, dtype)))
        told = ["/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache", "/update_weight_version"]
        assert server.paths()[-4:] == told
    assert not list(tmp_path.iterdir())
    agent.close()


def test_a_folder_that_cannot_be_written_is_named(good: Answering, opened: ExitStack, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"updates cannot be written: .*{tmp_path}/none"):
        agent_of(opened, good.url, weights_folder=tmp_path / "none")


UPDATE_FAULTS: dict[str, tuple[str, Fault, str]] = {
    "a fault of a worker": (
        "/collective_rpc",
        lambda *_: (200, b'{"results": [{"fault": null}, {"fault": "FileNotFoundError: gone"}]}'),
        "cannot take over weights: FileNotFoundError: gone",
    ),
    "no worker": ("/collective_rpc", lambda *_: (200, b'{"results": []}'), "no worker answers"),
    "another form": ("/collective_rpc", lambda *_: (200, b'{"results": 1}'), "an answer of another form"),
    "prompts that it goes on with": (
        "/reset_prefix_cache",
        lambda *_: (200, b'{"success": false}'),
        "it still works at requests",
    ),
    "features that stay": ("/reset_encoder_cache", lambda *_: (500, b"no"), "status 500 from /reset_encoder_cache"),
    "no version": ("/update_weight_version", hang, "no answer from /update_weight_version within 3 s"),
}


@pytest.mark.parametrize("fault", UPDATE_FAULTS)
def test_a_server_that_does_not_take_an_update_is_left_out(
    fault: str, good: Answering, bad: Answering, opened: ExitStack
) -> None:
    agent = agent_of(opened, bad.url, good.url)
    bad.at, bad.fault, told = UPDATE_FAULTS[fault]
    if bad.fault is hang:
        lose_patience(agent, bad)
    with pytest.warns(RuntimeWarning, match=f"{bad.url} is left out .*{told}"):
        agent.sync()
    assert_answered(agent)
    assert "/inference/v1/generate" not in bad.paths()
    good.at, good.fault = bad.at, bad.fault
    if good.fault is hang:
        lose_patience(agent, good)
    with pytest.raises(EngineError, match=f"no server is left .*{good.url}: .*{told}"):
        agent.sync()
    with pytest.raises(EngineError, match="have not been given the policy's weights"):
        agent.rollout(ASKED)


def test_a_worker_tells_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    receiver = WeightReceiver()
    assert "FileNotFoundError" in receiver.vlmenv_overwrite(str(tmp_path / "none"), 1)["fault"]
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"half of it")
    assert "has the checksum" in receiver.vlmenv_overwrite(str(file), checksum_of(file) + 1)["fault"]


# Updates from process to process.

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


def change(agent: VLMAgent) -> None:
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(0.1)


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


def test_a_server_that_is_at_the_channel_no_more_comes_to_a_new_one(
    good: Answering, opened: ExitStack, loading: Callable[[Load], None], recwarn: pytest.WarningsRecorder
) -> None:
    """It was started anew, or has come to another trainer's."""
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
    incoming._checksum.total += 1
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
    "a load that leaves weights": (stop_midway, None, r"weights were left as they were: \['model.norm'\]"),
    "weights that come otherwise": (come_otherwise, None, r"cannot take over weights: weights came with the checksum"),
    "a worker that dies": (die_midway, None, "its weights cannot be sent: .*by peer"),
    "a worker that hangs": (hang_midway, None, "no answer from /collective_rpc within 3 s|time was up"),
    "all hang": (load, hang, "no answer from /collective_rpc within 3 s"),
    "no answer": (load, cut_after_it, "RemoteProtocolError at /collective_rpc"),
    "no channel": (load, no_channel, "cannot take over weights: no way there"),
    "another form": (load, changed(lambda reply: reply["results"][0].pop("device", 0)), "another form"),
}


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
    began = time.monotonic()
    with pytest.warns(RuntimeWarning, match=f"{bad.url} is left out .*({told})"):
        agent.sync()
    assert time.monotonic() - began < 20
    assert_has_weights(good, agent)
    assert_answered(agent)
    assert "/inference/v1/generate" not in bad.paths()
    loading(load)
    bad.fault = None
    with pytest.warns(RuntimeWarning, match=f"{bad.url} has taken the update and is in use again"):
        agent.sync()
    assert_has_weights(bad, agent)
    assert orders(bad)[-2:] == ["vlmenv_join", "vlmenv_receive"]


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


@pytest.mark.parametrize(
    ("trainer", "workers", "backend"),
    [
        ("cuda", ["cuda", "cuda"], "nccl"),
        ("cpu", ["cpu"], "gloo"),
        ("cuda", ["cpu"], "gloo"),
        ("cpu", ["cuda", "cuda"], "gloo"),
    ],
)
def test_only_gpus_have_nccl(trainer: str, workers: list[str], backend: str) -> None:
    assert backend_between(trainer, workers) == backend


# Callers.


def test_it_works_where_an_event_loop_runs(good: Answering, opened: ExitStack) -> None:
    """As in a notebook."""

    async def cell() -> None:
        assert_answered(agent_of(opened, good.url))

    asyncio.run(cell())


def test_an_interrupt_ends_the_waiting(good: Answering, opened: ExitStack) -> None:
    agent, good.fault = agent_of(opened, good.url), hang
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        agent.rollout(ASKED)
    deadline = time.monotonic() + 10
    while asyncio.all_tasks(agent.engine._loop._loop):
        assert time.monotonic() < deadline, "it is still being waited for"
        time.sleep(0.01)
    good.fault = None
    assert_answered(agent)


def test_no_proxy_is_asked(good: Answering, opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setitem(os.environ, name, f"http://127.0.0.1:{free_port()}")
    assert_answered(agent_of(opened, good.url))


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "http://", "http://a:8000/v1", "ftp://a", "http://a:port", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="no address of a server"):
        check_address(address)


def test_images_go_as_they_are(good: Answering, opened: ExitStack) -> None:
    agent, shown = agent_of(opened, good.url), observations(2, 1)
    with pytest.raises(EngineError, match="reads a prompt otherwise"):  # it leaves one token for each image
        agent.act(shown)
    bodies = [body for path, body in good.asked if path.endswith("generate")]
    sent = [base64.b64decode(body["content_parts"][0]["url"].removeprefix("data:image/png;base64,")) for body in bodies]
    images = [np.asarray(Image.open(io.BytesIO(one))) for one in sent]
    expected = [one["images"][0] for one in unbatch(shown)]
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in expected)

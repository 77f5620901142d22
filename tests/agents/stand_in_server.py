"""A server that answers in vLLM's form without vLLM, and fails as a test has it; and an agent whose engine asks it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from vlmenv.agents.engines.access import server_token
from vlmenv.agents.engines.guard import NOT_TAKEN
from vlmenv.agents.engines.remote import RetryPolicy
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.engines.settings import vocabulary_digest
from vlmenv.agents.engines.worker import REFUSED, Receiver, fault_of, weight_shapes
from vlmenv.agents.sampling import Sampling
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.rollout import Observation

PATIENT = RetryPolicy(answer=60, greeting=60, attempts=2, pause=0.01)
HASTY = RetryPolicy(answer=3, greeting=3, attempts=2, pause=0.01)
"""with servers that are about to hang"""
TOKENS = 3
"""of each completion"""
ASKED: list[Observation] = [{"images": (), "prompt": f"How many is {i} and 3?"} for i in range(8) for _ in range(2)]
LATER: list[Observation] = [one | {"prompt": one["prompt"] + " Later."} for one in ASKED]

Reply = tuple[int, bytes]
Fault = Callable[["Answering", str, Any], Reply]


class Worker(Receiver):
    """One of vLLM's, without a model to load weights into."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, torch.device("cpu"), lambda weights: self.load(weights))
        self.weights: dict[str, torch.Tensor] = {}

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.weights = dict(weights)


class NotTakenError(Exception):
    """What the guard answers for a worker's fault."""


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
    workers: list[Worker] = field(default_factory=lambda: [Worker(0)])
    """which load the weights that it is sent"""
    url: str = ""
    token: str = field(default_factory=server_token)

    def reply(self, path: str, body: Any) -> Reply:
        self.asked.append((path, body))
        try:
            usual = getattr(self, f"_{path.rpartition('/')[2]}")(body)
        except NotTakenError as error:
            return NOT_TAKEN, json.dumps({"error": str(error)}).encode()
        if self.fault is not None and path == self.at:
            return self.fault(self, path, usual)
        return 200, b"" if usual is None else json.dumps(usual).encode()

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Those of its first worker."""
        return self.workers[0].weights

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def _models(self, body: Any) -> Any:
        return {"data": [{"id": "a", "max_model_len": self.max_length}]}

    def _model(self, body: Any) -> Any:
        return self.model

    def _get_world_size(self, body: Any) -> Any:
        return {"world_size": len(self.workers)}

    def _init_weight_transfer_engine(self, body: Any) -> Any:
        return self._by_workers(lambda worker: worker.join(**body["init_info"]))

    def _update_weights(self, body: Any) -> Any:
        order = body["update_info"]
        take = Receiver.read if "path" in order else Receiver.receive
        return self._by_workers(lambda worker: take(worker, **order))

    def _by_workers(self, work: Callable[[Worker], None]) -> Any:
        """Each is a process of vLLM's."""
        with ThreadPoolExecutor() as pool:
            faults = [order.exception() for order in [pool.submit(work, worker) for worker in self.workers]]
        for fault in faults:
            if isinstance(fault, Exception):
                raise NotTakenError(REFUSED + fault_of(fault))
        return {"message": "done"}

    def _reset_prefix_cache(self, body: Any) -> Any:
        return {"success": True}

    def _reset_encoder_cache(self, body: Any) -> None:
        return None

    def _update_weight_version(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {"success": True}

    def _generate(self, body: Any) -> Any:
        ids, params = body["token_ids"], body["sampling_params"]
        choices = [self._choice(i) for i in range(params.get("n", 1))]
        scores = [None, *({str(token): {"logprob": -token / 1000}} for token in ids[1:])]
        return {
            "choices": choices,
            "prompt_token_ids": ids,
            "prompt_logprobs": None if params.get("prompt_logprobs") is None else scores,
        }

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
def answering(served: Answering, port: int = 0, host: str = "127.0.0.1") -> Iterator[Answering]:
    """Lets it answer over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers["Authorization"] == f"Bearer {served.token}":
                status, told = served.reply(self.path, json.loads(content) if content else None)
            else:
                status, told = 401, b"no"
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

    with Silent((host, port), Handler) as server:
        served.url = f"http://{host}:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield served
        server.shutdown()


def described(agent: VLMAgent) -> dict[str, Any]:
    """What a server tells of an agent's model."""
    return {
        "weights": weight_shapes(agent.folder),
        "banned": agent.family.banned_tokens.tolist(),
        "vocabulary": vocabulary_digest(agent.family),
        "dtype": "float32",
        "logprobs": "processed_logprobs",
        "images": 4,
        "videos": 2,
    }


class Cut(Exception):
    """Ends the connection without an answer."""


@pytest.fixture(scope="module")
def model() -> dict[str, Any]:
    return described(VLMAgent.from_pretrained("builtin"))


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
    agent.engine = VLLMServerEngine(urls, agent.folder, agent.family, retry_policy=PATIENT, **how)
    opened.callback(agent.close)
    agent.sync()
    return agent


def change(agent: VLMAgent) -> None:
    """As learning does."""
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(0.1)


def lose_patience(agent: VLMAgent, *servers: Answering) -> None:
    """With some servers."""
    for server in agent.engine._servers:
        if server.url in [one.url for one in servers]:
            server._retry_policy = HASTY


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


def changed(change: Callable[[Any], Any]) -> Fault:
    """Changes the answer."""

    def fault(server: Answering, path: str, usual: Any) -> Reply:
        change(usual)
        return 200, json.dumps(usual).encode()

    return fault


def hang(server: Answering, path: str, usual: Any) -> Reply:
    time.sleep(60)
    return 200, json.dumps(usual).encode()


def cut(server: Answering, path: str, usual: Any) -> Reply:
    raise Cut

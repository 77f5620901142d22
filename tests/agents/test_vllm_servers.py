"""Servers of the real vLLM that die, hang and come back."""

from __future__ import annotations

import base64
import io
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Literal

import httpx2
import psutil
import pytest
import torch
from batches import logprobs_of, ragged
from PIL import Image
from servers import Served, free_port, serve

from vlmenv.agents.engines.access import server_token
from vlmenv.agents.engines.channel import buckets
from vlmenv.agents.engines.checksums import UNREADABLE, checksums, clear
from vlmenv.agents.engines.remote import RetryPolicy, Server
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.sampling import Sampling
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.errors import EngineError
from vlmenv.core.files import file_digest
from vlmenv.core.rollout import Observation

pytestmark = pytest.mark.vllm
LENGTH = ["--engine-length", "512"]
HASTY = RetryPolicy(answer=30, greeting=10, attempts=2, pause=0.05)
LONG: list[Observation] = [{"images": (), "prompt": f"How many is {i} and 3?"} for i in range(64) for _ in range(8)]
"""more than a server does in a moment"""


@pytest.fixture(scope="module")
def lasting() -> Iterator[Served]:
    """A server that outlives its tests."""
    with serve("builtin", *LENGTH) as served:
        yield served
        served.end(signal.SIGINT)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def agent_of(opened: ExitStack, *urls: str, transfer: Literal["file", "direct"] = "file") -> VLMAgent:
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=160, top_k=400))
    agent.engine = VLLMServerEngine(urls, agent.folder, agent.family, transfer=transfer, retry_policy=HASTY)
    opened.callback(agent.close)
    change(agent)  # so that the folder's weights are not those of the policy
    agent.sync()
    return agent


def change(agent: VLMAgent) -> None:
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.mul_(1.05)


def assert_in_step(agent: VLMAgent) -> None:
    agent.sampling, former = Sampling(max_new_tokens=8), agent.sampling
    rollout = agent.rollout(ragged())
    agent.sampling = former
    expected = logprobs_of(agent, rollout)
    for row, completion in enumerate(rollout.completions):
        found = torch.from_numpy(completion.logprobs)
        torch.testing.assert_close(found, expected[row, : len(found)], atol=1e-4, rtol=0)


def dies_meanwhile(served: Served) -> None:
    """Kills a server while a rollout is on its way, in which it has not come to an answer: it is stopped before."""
    served.send(signal.SIGSTOP)
    threading.Timer(0.4, served.send, [signal.SIGKILL]).start()


def test_a_server_that_dies_is_replaced_by_the_others_until_it_has_taken_an_update(
    lasting: Served, opened: ExitStack
) -> None:
    port = free_port()
    with serve("builtin", *LENGTH, port=port) as dying:
        agent = agent_of(opened, dying.url, lasting.url, transfer="direct")
        assert_in_step(agent)
        dies_meanwhile(dying)
        with pytest.warns(RuntimeWarning, match=f"the server {dying.url} is excluded"):
            assert len(agent.rollout(LONG)) == len(LONG)
        agent.sync()
        assert_in_step(agent)
    with serve("builtin", *LENGTH, port=port) as again:
        agent.engine._servers[0].fault = None  # as if nobody had asked it anything in the meantime
        with pytest.warns(RuntimeWarning, match=f"{again.url} is excluded .*restarted"):
            assert_in_step(agent)
        with pytest.warns(RuntimeWarning, match=f"{again.url} took the update and is in use again"):
            agent.sync()
        assert_in_step(agent)
        other = agent_of(opened, again.url)  # gives it other weights
        assert_in_step(other)
        with pytest.warns(RuntimeWarning, match=f"{again.url} is excluded .*another trainer uses it"):
            assert_in_step(agent)
        dies_meanwhile(again)
        with pytest.raises(EngineError, match=f"no server is left. {again.url}: .*Error"):
            other.rollout(LONG)
        with pytest.raises(EngineError, match=f"no server is left. {again.url}"):
            other.sync()


def test_a_server_that_hangs_is_left_out(lasting: Served, opened: ExitStack) -> None:
    """All of it, or the engine behind what answers."""
    with serve("builtin", *LENGTH) as hanging:
        agent = agent_of(opened, hanging.url, lasting.url)
        for stopped in (hanging.family(), [one for one in hanging.family() if "Engine" in one.name()]):
            agent.engine._servers[0]._retry_policy = RetryPolicy(answer=4, greeting=4, attempts=1)
            assert stopped
            for process in stopped:
                process.suspend()
            with pytest.warns(RuntimeWarning, match=f"{hanging.url} is excluded .*no answer from .* within 4 s"):
                assert_in_step(agent)
            agent.sync()
            assert_in_step(agent)
            for process in stopped:
                process.resume()
            agent.engine._servers[0]._retry_policy = HASTY
            with pytest.warns(RuntimeWarning, match=f"{hanging.url} took the update and is in use again"):
                agent.sync()
            assert_in_step(agent)
        hanging.end(signal.SIGKILL)  # of the command alone


def test_updates_arrive_by_either_way(lasting: Served, opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """By file and in many messages by channel, in turn; log-probabilities are those of the weights that came last."""
    monkeypatch.setattr("vlmenv.agents.engines.direct.buckets", partial(buckets, limit=1 << 18))
    by_file, by_channel = agent_of(opened, lasting.url), agent_of(opened, lasting.url, transfer="direct")
    for _ in range(3):
        for agent in (by_channel, by_file):
            change(agent)
            agent.sync()
            assert_in_step(agent)


def test_servers_tell_checksums_of_their_weights(lasting: Served, opened: ExitStack) -> None:
    agent = agent_of(opened, lasting.url)
    held = checksums(agent.engine)
    assert any(name.startswith(lasting.url) and "norm.weight" in name for name in held)
    clear(agent.engine)
    zeros = checksums(agent.engine)
    assert zeros.keys() == held.keys()
    assert all(zeros[name] != held[name] for name in held if held[name] != UNREADABLE)
    agent.sync()
    assert checksums(agent.engine) == held
    assert_in_step(agent)


def test_a_load_that_fails_midway_is_told_and_does_no_harm(
    lasting: Served, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes a weight in the middle for one that its model does not have."""
    agent, update = agent_of(opened, lasting.url, transfer="direct"), Server.update

    async def misnaming(server: Server, order: dict[str, Any]) -> None:
        plan = [list(bucket) for bucket in order["plan"]]
        middle = len(plan) // 2
        plan[middle][0] = ("model.nobody.weight", plan[middle][0][1])
        await update(server, order | {"plan": plan})

    with monkeypatch.context() as patched:
        patched.setattr("vlmenv.agents.engines.direct.buckets", partial(buckets, limit=1 << 18))
        patched.setattr(Server, "update", misnaming)
        with pytest.raises(
            EngineError, match="it cannot take over weights: ValueError: There is no module or parameter"
        ):
            agent.sync()
    with pytest.warns(RuntimeWarning, match="in use again"):
        agent.sync()
    assert_in_step(agent)
    lasting._told["stderr"].clear()  # vLLM logs a worker's fault with a traceback


def test_half_an_update_is_refused_and_does_no_harm(
    lasting: Served, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = agent_of(opened, lasting.url)

    def half(file: Path, *of_what: object) -> str:
        file.write_bytes(b"\x08" + bytes(7) + b'{"a": 1}')
        return file_digest(file)

    with monkeypatch.context() as patched:
        patched.setattr("vlmenv.agents.engines.server.write_file", half)
        with pytest.raises(EngineError, match=r"it cannot take over weights: .*Error"):
            agent.sync()
    with pytest.warns(RuntimeWarning, match="in use again"):
        agent.sync()
    assert_in_step(agent)
    lasting._told["stderr"].clear()


def test_a_server_of_another_model_is_refused(lasting: Served, qwen2_5_vl_folder: Path) -> None:
    agent = VLMAgent.from_pretrained(qwen2_5_vl_folder)
    with pytest.raises(EngineError, match=f"{lasting.url}: it serves another model than the one in training"):
        VLLMServerEngine([lasting.url], agent.folder, agent.family)


# Strangers. The guard alone is tested in test_guard.py.


class Hits(BaseHTTPRequestHandler):
    """Notes what is fetched from here."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.send_error(404)


def post(served: Served, path: str, body: dict[str, Any], token: str | None = None, **headers: str) -> httpx2.Response:
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    return httpx2.post(
        served.url + path, content=json.dumps(body), headers={"Content-Type": "application/json"} | headers, timeout=30
    )


def test_a_stranger_writes_reads_and_changes_nothing(lasting: Served, opened: ExitStack, tmp_path: Path) -> None:
    """A page or another account posts what vLLM's development mode does for anybody."""
    agent = agent_of(opened, lasting.url)
    held = checksums(agent.engine)
    orders: list[tuple[str, dict[str, Any]]] = [
        ("/collective_rpc", {"method": "save_sharded_state", "kwargs": {"path": str(tmp_path), "pattern": "a"}}),
        ("/weight_checker", {"action": "reset"}),
        ("/update_weights", {"update_info": {"path": "/dev/zero", "digest": ""}}),
    ]
    for path, order in orders:
        call = partial(post, lasting, path, order)
        assert call().status_code == 401
        assert call("not-the-token-of-it").status_code == 401
        assert call(server_token(), Host="evil.example").status_code == 403
        plain = call(server_token(), **{"Content-Type": "text/plain"})
        assert plain.status_code == (404 if path == "/collective_rpc" else 415)
    for path in ("/health", "/v1/models", "/metrics", "/docs", "/server_info", "/load", "/ping", "/version"):
        assert httpx2.get(lasting.url + path).status_code == 401
    assert not list(tmp_path.iterdir())
    assert checksums(agent.engine) == held


def test_nor_does_a_trainer_beyond_what_training_needs(lasting: Served, tmp_path: Path) -> None:
    token = server_token()
    order = {"method": "save_sharded_state", "kwargs": {"path": str(tmp_path), "pattern": "authorized_keys"}}
    assert post(lasting, "/collective_rpc", order, token).status_code == 404
    assert not list(tmp_path.iterdir())
    for path in ("/sleep", "/pause", "/start_weight_update", "/v1/completions"):
        assert post(lasting, path, {}, token).status_code == 404
    secret = tmp_path / "id_rsa"
    secret.write_text("a key")
    secret.chmod(0o600)
    for file in ("/dev/zero", "/dev/stdin", str(secret), str(tmp_path), "/proc/self/environ"):
        told = post(lasting, "/update_weights", {"update_info": {"path": file, "digest": ""}}, token)
        assert told.status_code == 409
        fault = f"PermissionError: {file} is not a trainer's file of weights"
        assert told.json() == {"error": f"cannot take over weights: {fault}"}
    assert post(lasting, "/update_weights", {"update_info": {"weights": []}}, token).status_code == 409
    assert post(lasting, "/update_weights", {"update_info": {"path": [], "digest": ""}}, token).status_code == 409
    assert post(lasting, "/update_weights", {}, token).status_code == 400
    lasting._told["stderr"].clear()
    assert httpx2.get(f"{lasting.url}/health", headers={"Authorization": f"Bearer {token}"}).status_code == 200


def chat(served: Served, *parts: dict[str, Any]) -> httpx2.Response:
    """A question in OpenAI's chat, as lmms-eval and others ask it."""
    headers = {"Authorization": f"Bearer {server_token()}"}
    model = httpx2.get(f"{served.url}/v1/models", headers=headers).json()["data"][0]["id"]
    asked = [*parts, {"type": "text", "text": "Locate the circle."}]
    body = {"model": model, "messages": [{"role": "user", "content": asked}], "max_tokens": 8, "temperature": 0}
    return post(served, "/v1/chat/completions", body, server_token())


def test_a_holder_of_the_token_can_chat(lasting: Served) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (96, 96)).save(stream, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    told = chat(lasting, {"type": "image_url", "image_url": {"url": image}})
    assert told.status_code == 200
    assert told.json()["choices"][0]["message"]["content"]
    assert post(lasting, "/v1/chat/completions", {}).status_code == 401


def test_files_of_videos_are_refused_and_do_no_harm(lasting: Served, opened: ExitStack) -> None:
    """Frames and times come as trainers send them; whatever else would have to be decoded, and frames chosen."""
    video = {"url": f"data:video/mp4;base64,{base64.b64encode(b'ftypmp42').decode()}"}
    told = chat(lasting, {"type": "video_url", "video_url": video})
    assert 400 <= told.status_code < 500
    assert "take videos as trainers of vlmenv send them" in told.text
    assert_in_step(agent_of(opened, lasting.url))


def test_images_are_fetched_from_nowhere(lasting: Served, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(file)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hits) as there:
        threading.Thread(target=there.serve_forever, args=(0.01,), daemon=True).start()
        for url in (
            f"http://127.0.0.1:{there.server_port}/x.png",
            f"http://none.invalid:{there.server_port}/",
            f"file://{file}",
        ):
            body = {
                "token_ids": [5],
                "content_parts": [{"type": "image_url", "url": url}],
                "sampling_params": {"max_tokens": 1},
            }
            assert post(lasting, "/inference/v1/generate", body, server_token()).status_code >= 400
            assert chat(lasting, {"type": "image_url", "image_url": {"url": url}}).status_code >= 400
        there.shutdown()
    assert not Hits.seen
    while lasting.told("stderr").count("Cannot load local files") < 2:  # vLLM logs each with a traceback
        time.sleep(0.05)
    lasting._told["stderr"].clear()


def test_the_token_is_on_no_command_line_and_ports_are_those_of_this_machine(lasting: Served) -> None:
    family = [psutil.Process(lasting.process.pid), *lasting.family()]
    assert not any(server_token() in " ".join(one.cmdline()) for one in family)
    assert server_token() not in lasting.told() + lasting.told("stderr")
    open_there = [
        there.laddr for one in family for there in one.net_connections() if there.status == psutil.CONN_LISTEN
    ]
    assert ("127.0.0.1", lasting.port) in open_there
    assert {address for address, _ in open_there} == {"127.0.0.1"}


def test_a_trainer_with_another_token_has_no_channel(
    lasting: Served, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its requests are let through."""
    agent = agent_of(opened, lasting.url, transfer="direct")
    held = checksums(agent.engine)
    agent.engine._direct.close()
    agent.engine._direct._token = "another-token-of-a-trainer"
    change(agent)
    with pytest.raises(EngineError, match="no server is left"):
        agent.sync()
    agent.engine._servers[0].fault = None
    assert checksums(agent.engine) == held
    lasting._told["stderr"].clear()

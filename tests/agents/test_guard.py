"""Who may use a server, and for what: the middleware around an application that notes what reaches it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import save_file

from vlmenv.agents.engines.access import VARIABLE
from vlmenv.agents.engines.admission import Message, Receive, Send
from vlmenv.agents.engines.guard import HOST, MODEL, NOT_TAKEN, ROUTES, Guard

TOKEN = "the-token-of-this-server"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}


START, UPDATE, FINISH = "/start_weight_update", "/update_weights", "/finish_weight_update"


class Noting:
    """An application that notes its requests, and may fail."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []
        self.faults: dict[str, Exception] = {}
        self.status: dict[str, int] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message["body"]
        length = dict(scope["headers"]).get(b"content-length", b"0")
        assert int(length) == len(body)
        self.taken.append((scope["path"], body))
        await asyncio.sleep(0)  # others' requests may come between
        if scope["path"] in self.faults:
            raise self.faults[scope["path"]]
        await send({"type": "http.response.start", "status": self.status.get(scope["path"], 200), "headers": []})
        await send({"type": "http.response.body", "body": b"taken"})


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Noting:
    monkeypatch.setenv(VARIABLE, TOKEN)
    monkeypatch.setenv(HOST, "gpu-box.lan")
    return Noting()


def ask(app: Noting, method: str, path: str, host: str = "127.0.0.1:8000", **more: Any) -> int:
    """The status that a request gets; the application gets those that are answered by 200, and no others."""

    async def request() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=Guard(app))  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, headers={"Host": host} | more.pop("headers", RIGHT), **more)

    before = len(app.taken)
    reply = asyncio.run(request())
    assert (path in [taken for taken, _ in app.taken[before:]]) == (
        reply.status_code in (200, NOT_TAKEN) and path != MODEL
    )
    assert (reply.content == b"taken") == (reply.status_code == 200 and path != MODEL)
    return reply.status_code


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES - {("GET", MODEL)}))
def test_each_route_of_trainers_needs_the_token(method: str, path: str, app: Noting) -> None:
    body = {"json": {"update_info": {}}} if method == "POST" else {}
    assert ask(app, method, path, **body) == 200
    wrong = [
        {},
        {"Authorization": ""},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"bearer {TOKEN.upper()}"},
        {"X-Token": TOKEN},
    ]
    assert [ask(app, method, path, headers=headers, **body) for headers in wrong] == [401] * len(wrong)


def test_a_token_beside_another_is_none(app: Noting) -> None:
    twice = [("Host", "localhost"), ("Authorization", "Bearer x"), *RIGHT.items()]

    async def request() -> int:
        transport = httpx2.ASGITransport(app=Guard(app))  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get("/health", headers=twice)).status_code

    assert asyncio.run(request()) == 401


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/metrics", "/server_info", "/sleep",
                                  "/v1/completions", "/collective_rpc", "/update_weights/", "//update_weights",
                                  "/pause", START, FINISH, "/tokenize", "/start_profile"])  # fmt: skip
def test_other_routes_are_none(path: str, app: Noting) -> None:
    assert ask(app, "GET", path) == 404
    assert ask(app, "POST", path, json={}) == 404


def test_other_verbs_are_none(app: Noting) -> None:
    for verb in ("OPTIONS", "PUT", "HEAD", "GET"):
        assert ask(app, verb, UPDATE) == 404


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "",
                                  "text/json", "text/plain; application/json"])  # fmt: skip
def test_what_a_web_page_may_post_is_refused(kind: str, app: Noting) -> None:
    for path in (UPDATE, "/reset_prefix_cache"):
        assert ask(app, "POST", path, content=b"{}", headers=RIGHT | {"Content-Type": kind}) == 415
    json_too = RIGHT | {"Content-Type": "Application/JSON; charset=utf-8"}
    assert ask(app, "POST", UPDATE, content=b"{}", headers=json_too) == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200),
        ("[::1]", 200), ("192.0.2.7:80", 200), ("gpu-box.lan:8000", 200),
        ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("evil.example#@localhost", 403), ("gpu-box", 403), ("", 403), ("127.1", 403),
        (":8000", 403), ("[x]:8000", 403),
    ],
)  # fmt: skip
def test_only_known_hosts_are_answered(host: str, status: int, app: Noting) -> None:
    """A web page that rebinds its name to this machine sends its own name."""
    assert ask(app, "GET", "/v1/models", host=host) == status


def test_what_is_served_is_told_with_the_token_alone(app: Noting, tmp_path: Path) -> None:
    """As vLLM's configuration has it, and not its folder."""
    save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    model = SimpleNamespace(model=str(tmp_path), dtype=torch.bfloat16, logprobs_mode="processed_logprobs")
    own = {"vlmenv_banned": [7, 8], "vlmenv_images": 3, "vlmenv_videos": 2, "vlmenv_vocabulary": "ab12"}
    config = SimpleNamespace(model_config=model, additional_config=own)
    vllm = SimpleNamespace(state=SimpleNamespace(vllm_config=config))

    async def served(scope: Message, receive: Receive, send: Send) -> None:
        await Guard(app)(scope | {"app": vllm}, receive, send)

    async def request(headers: dict[str, str]) -> httpx2.Response:
        transport = httpx2.ASGITransport(app=served)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(MODEL, headers=headers)

    assert asyncio.run(request({})).status_code == 401
    told = {"weights": {"a.weight": [2, 3]}, "banned": [7, 8], "dtype": "bfloat16", "logprobs": "processed_logprobs"}
    assert asyncio.run(request(RIGHT)).json() == told | {"images": 3, "videos": 2, "vocabulary": "ab12"}
    assert not app.taken


# Updates.


def update(app: Noting, times: int = 1) -> list[httpx2.Response]:
    guarded = Guard(app)

    async def request() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=guarded)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            bodies = [json.dumps({"update_info": i}) for i in range(times)]
            asked = [client.post(UPDATE, content=body, headers=RIGHT | JSON) for body in bodies]
            return await asyncio.gather(*asked)

    return asyncio.run(request())


def test_an_update_is_begun_and_finished_before_the_next(app: Noting) -> None:
    replies = update(app, 3)
    assert [(one.status_code, one.content) for one in replies] == [(200, b"taken")] * 3
    assert [path for path, _ in app.taken] == [START, UPDATE, FINISH] * 3
    assert sorted(body for _, body in app.taken) == [b""] * 6 + [b'{"update_info": %d}' % i for i in range(3)]


@pytest.mark.parametrize("ending", ["", "', please check the stack trace above for the root cause"])
def test_a_workers_fault_is_told_and_the_update_is_over(ending: str, app: Noting) -> None:
    """vLLM refuses to finish what a worker could not do; others may have to finish it."""
    fault = "cannot take over weights: OSError: /tmp/a's file"
    app.faults = {
        UPDATE: Exception(f"Call to collective_rpc method failed: {fault}{ending}"),
        FINISH: Exception("none"),
    }
    (reply,) = update(app)
    assert (reply.status_code, reply.json()) == (NOT_TAKEN, {"error": fault})
    assert [path for path, _ in app.taken] == [START, UPDATE, FINISH]
    app.faults.clear()
    assert [one.status_code for one in update(app, 2)] == [200, 200]


def test_a_channel_that_workers_cannot_join_is_told(app: Noting) -> None:
    app.faults = {"/init_weight_transfer_engine": Exception("cannot take over weights: time was up")}
    assert ask(app, "POST", "/init_weight_transfer_engine", json={"init_info": {}}) == NOT_TAKEN


@pytest.mark.parametrize("path", [START, UPDATE, FINISH])
def test_other_faults_are_vllms_own_and_the_next_update_is_taken(path: str, app: Noting) -> None:
    """Raised, as by a dead engine, so that vLLM answers; or answered by vLLM itself."""
    app.faults = {path: ValueError("the engine is dead")}
    with pytest.raises(ValueError, match="is dead"):
        update(app)
    app.faults, app.status = {}, {path: 500}
    if path == UPDATE:
        assert update(app)[0].status_code == 500
    else:
        with pytest.raises(RuntimeError, match="vLLM refused a part of an update, with status 500"):
            update(app)
    app.status.clear()
    assert update(app)[0].status_code == 200


def test_websockets_are_closed_and_the_start_goes_on(app: Noting) -> None:
    reached: list[str] = []
    sent: list[Message] = []

    async def noting(scope: Message, receive: Receive, send: Send) -> None:
        reached.append(scope["type"])

    async def nothing() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None:
        sent.append(message)

    for kind in ("lifespan", "websocket"):
        asyncio.run(Guard(noting)({"type": kind, "path": "/v1/realtime", "headers": []}, nothing, send))
    assert (reached, sent) == (["lifespan"], [{"type": "websocket.close", "code": 1008}])

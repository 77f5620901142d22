"""Who may use a server, and for what: the middleware around an application that notes what reaches it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest

from vlmenv.agents.engines.access import VARIABLE
from vlmenv.agents.engines.guard import HOST, METHODS, ROUTES, Guard, Message, Receive, Send

TOKEN = "the-token-of-this-server"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}


class Noting:
    """An application that notes its requests."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message["body"]
        length = dict(scope["headers"]).get(b"content-length", b"0")
        assert int(length) == len(body)
        self.taken.append((scope["path"], body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
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
    assert len(app.taken) - before == (reply.status_code == 200)
    assert (reply.content == b"taken") == (reply.status_code == 200)
    return reply.status_code


def call(app: Noting, order: Any, **more: Any) -> int:
    content = order if isinstance(order, bytes) else json.dumps(order).encode()
    return ask(app, "POST", "/collective_rpc", content=content, **({"headers": RIGHT | JSON} | more))


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
def test_each_route_of_trainers_needs_the_token(method: str, path: str, app: Noting) -> None:
    body = {"json": {"method": "vlmenv_model"}} if method == "POST" else {}
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
                                  "/v1/completions", "/collective_rpc/", "//collective_rpc", "/pause",
                                  "/weight_checker", "/update_weights", "/tokenize", "/start_profile"])  # fmt: skip
def test_other_routes_are_none(path: str, app: Noting) -> None:
    assert ask(app, "GET", path) == 404
    assert ask(app, "POST", path, json={"method": "vlmenv_model"}) == 404


def test_other_verbs_are_none(app: Noting) -> None:
    for verb in ("OPTIONS", "PUT", "HEAD", "GET"):
        assert ask(app, verb, "/collective_rpc") == 404


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "",
                                  "text/json", "text/plain; application/json"])  # fmt: skip
def test_what_a_web_page_may_post_is_refused(kind: str, app: Noting) -> None:
    assert call(app, {"method": "vlmenv_model"}, headers=RIGHT | {"Content-Type": kind}) == 415
    assert ask(app, "POST", "/reset_prefix_cache", content=b"{}", headers=RIGHT | {"Content-Type": kind}) == 415
    assert (
        call(app, {"method": "vlmenv_model"}, headers=RIGHT | {"Content-Type": "Application/JSON; charset=utf-8"})
        == 200
    )


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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_trainers_call_goes_on_as_it_is(method: str, app: Noting) -> None:
    order = {"method": method, "kwargs": {"path": "é", "plan": [[["a", [1, 2]]]], "seconds": 1.5}}
    assert call(app, order) == 200
    assert json.loads(app.taken[-1][1]) == order


@pytest.mark.parametrize(
    "order",
    [
        {"method": "save_sharded_state", "kwargs": {"path": "/root/.ssh"}},
        {"method": "load_model"}, {"method": "__class__"}, {"method": "vlmenv_line"}, {"method": "VLMENV_MODEL"},
        {"method": ["vlmenv_model"]}, {"method": None}, {"method": {}}, {}, [], "vlmenv_model", 1, None,
        {"method": "vlmenv_model", "kwargs": []}, {"method": "vlmenv_model", "kwargs": "x"},
        b"", b"{", b"\xff", b"[" * 100_000, b'{"method": "vlmenv_model", "method": "save_sharded_state"}',
    ],
    ids=str,
)  # fmt: skip
def test_other_methods_of_workers_are_refused(order: Any, app: Noting) -> None:
    assert call(app, order) == 403


def test_vllm_reads_what_was_checked(app: Noting) -> None:
    """Of names that are given twice, the last counts; arguments by position and others go."""
    assert (
        call(app, b'{"method": "save_sharded_state", "args": ["/"], "method": "vlmenv_model", "timeout": 1e9}') == 200
    )
    assert app.taken[-1][1] == b'{"method": "vlmenv_model", "kwargs": {}}'


def test_a_call_in_parts_is_read_whole_and_a_huge_one_is_not(app: Noting) -> None:
    async def parts(*given: bytes) -> Any:
        for part in given:
            yield part

    guarded = Guard(app)

    async def request(*given: bytes) -> int:
        transport = httpx2.ASGITransport(app=guarded)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.post("/collective_rpc", content=parts(*given), headers=RIGHT | JSON)).status_code

    assert asyncio.run(request(b'{"method": ', b'"vlmenv_model"}')) == 200
    assert app.taken == [("/collective_rpc", b'{"method": "vlmenv_model", "kwargs": {}}')]
    assert (
        asyncio.run(request(b'{"method": "vlmenv_model", "kwargs": {"a": "', *[b"a" * (1 << 20)] * 17, b'"}}')) == 403
    )


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

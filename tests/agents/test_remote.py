"""What one server is asked over HTTP, and how long it is waited for."""

from __future__ import annotations

import json
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import stand_in_server
from servers import free_port
from stand_in_server import ASKED, Answering, Fault, Reply, agent_of, assert_answered, hang, lose_patience

from vlmenv.agents.engines.access import VARIABLE
from vlmenv.agents.engines.remote import RetryPolicy, check_address
from vlmenv.core.errors import ConfigError, EngineError

opened, model, good, bad = stand_in_server.opened, stand_in_server.model, stand_in_server.good, stand_in_server.bad
"""fixtures"""


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "http://", "http://a:8000/v1", "ftp://a", "http://a:port", "",
                                     "http://u:secret@a:8000", "http://a:8000/?key=secret", "u:secret@a"])  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="not the address of a server") as told:
        check_address(address)
    assert "secret" not in str(told.value)


@pytest.mark.slow
def test_each_request_has_the_token_and_posts_are_json(bad: Answering, opened: ExitStack) -> None:
    bad.at = "/reset_prefix_cache"
    agent = agent_of(opened, bad.url)
    assert_answered(agent)
    assert all(body is not None for path, body in bad.asked if path not in ("/v1/models", "/vlmenv/model"))


@pytest.mark.slow
def test_a_server_with_another_token_is_told_at_once(
    good: Answering, bad: Answering, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad.token = "another-token-of-a-server"
    with pytest.raises(EngineError, match=f"{bad.url}: it has another token: set {VARIABLE} to that of `vlmenv serve`"):
        agent_of(opened, good.url, bad.url)
    monkeypatch.setenv(VARIABLE, bad.token)
    assert_answered(agent_of(opened, bad.url))


@pytest.mark.slow
def test_a_server_that_comes_back_with_another_token_stays_out(
    good: Answering, bad: Answering, opened: ExitStack
) -> None:
    agent = agent_of(opened, good.url, bad.url)
    bad.token = "another-token-of-a-server"
    with pytest.warns(RuntimeWarning, match=f"{bad.url} is excluded .*another token"):
        agent.sync()
    assert_answered(agent)


def test_without_a_token_it_is_told_where_to_get_one(
    good: Answering, opened: ExitStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"set {VARIABLE} to the content of {tmp_path}"):
        agent_of(opened, good.url)
    assert not good.asked


def test_what_is_no_server_of_ours_is_told(bad: Answering, opened: ExitStack) -> None:
    bad.at, bad.fault = "/vlmenv/model", lambda *_: (404, b'{"detail": "Not Found"}')
    with pytest.raises(EngineError, match=f"{bad.url}: it was not started by `vlmenv serve` .*status 404"):
        agent_of(opened, bad.url)


@pytest.mark.slow
def test_a_slow_server_is_told_from_one_that_is_gone(good: Answering, opened: ExitStack) -> None:
    agent, good.fault = agent_of(opened, good.url), hang
    agent.engine._servers[0]._retry_policy = RetryPolicy(answer=0.2)
    with pytest.raises(EngineError, match=r"no answer from .* within 0\.2 s; .* raise --server-timeout"):
        agent.rollout(ASKED)


@pytest.mark.slow
def test_no_proxy_is_asked(good: Answering, opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setitem(os.environ, name, f"http://127.0.0.1:{free_port()}")
    assert_answered(agent_of(opened, good.url))


@pytest.mark.slow
def test_a_fault_that_passes_is_not_told(good: Answering, opened: ExitStack, recwarn: pytest.WarningsRecorder) -> None:
    agent = agent_of(opened, good.url)
    left = threading.Semaphore(3)

    def fault(server: Answering, path: str, usual: Any) -> Reply:
        return (503, b"busy") if left.acquire(blocking=False) else (200, json.dumps(usual).encode())

    good.fault = fault
    agent.engine._servers[0]._retry_policy = RetryPolicy(attempts=5, pause=0.01)
    assert_answered(agent)
    assert not [one for one in recwarn if one.category is RuntimeWarning]


UPDATE_FAULTS: dict[str, tuple[str, Fault, str]] = {
    "a fault of a worker": (
        "/update_weights",
        lambda *_: (409, b'{"error": "cannot take over weights: FileNotFoundError: gone"}'),
        "it cannot take over weights: FileNotFoundError: gone",
    ),
    "a dead engine": ("/update_weights", lambda *_: (500, b"EngineDeadError"), "status 500 from /update_weights"),
    "prompts that it goes on with": (
        "/reset_prefix_cache",
        lambda *_: (200, b'{"success": false}'),
        "it has running requests",
    ),
    "features that stay": ("/reset_encoder_cache", lambda *_: (500, b"no"), "status 500 from /reset_encoder_cache"),
    "no version": ("/update_weight_version", hang, "no answer from /update_weight_version within 3 s"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", UPDATE_FAULTS)
def test_a_server_that_does_not_take_an_update_is_left_out(
    fault: str, good: Answering, bad: Answering, opened: ExitStack
) -> None:
    agent = agent_of(opened, bad.url, good.url)
    bad.at, bad.fault, told = UPDATE_FAULTS[fault]
    if bad.fault is hang:
        lose_patience(agent, bad)
    with pytest.warns(RuntimeWarning, match=f"{bad.url} is excluded .*{told}"):
        agent.sync()
    assert_answered(agent)
    assert "/inference/v1/generate" not in bad.paths()
    good.at, good.fault = bad.at, bad.fault
    if good.fault is hang:
        lose_patience(agent, good)
    with pytest.raises(EngineError, match=f"no server is left.*{good.url}: .*{told}"):
        agent.sync()
    with pytest.raises(EngineError, match="do not have the policy's weights"):
        agent.rollout(ASKED)

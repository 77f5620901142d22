"""The real vLLM behind a Unix socket and behind https."""

from __future__ import annotations

import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from batches import logprobs_of, ragged
from servers import self_signed, serve

from vlmenv.agents.engines.remote import RetryPolicy
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.sampling import Sampling
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.errors import EngineError

pytestmark = pytest.mark.vllm
LENGTH = ["--engine-length", "512"]
HASTY = RetryPolicy(answer=30, greeting=10, attempts=2, pause=0.05)


def agent_of(opened: ExitStack, url: str, transfer: Literal["file", "direct"] = "file", **how: Any) -> VLMAgent:
    """An agent whose policy is no longer its folder's model."""
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=8))
    agent.engine = VLLMServerEngine([url], agent.folder, agent.family, transfer=transfer, retry_policy=HASTY, **how)
    opened.callback(agent.close)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.mul_(1.05)
    agent.sync()
    return agent


def assert_in_step(agent: VLMAgent) -> None:
    rollout = agent.rollout(ragged())
    expected = logprobs_of(agent, rollout)
    for row, completion in enumerate(rollout.completions):
        found = torch.from_numpy(completion.logprobs)
        torch.testing.assert_close(found, expected[row, : len(found)], atol=1e-4, rtol=0)


def test_behind_a_socket_it_generates_and_learns_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "in here" / "server.sock"
    with serve("builtin", *LENGTH, "--socket", str(path)) as served, ExitStack() as opened:
        assert f"--server 'unix:{path}'" in served.told()
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with socket.socket() as tried, pytest.raises(ConnectionRefusedError):
            tried.connect(("127.0.0.1", served.port))
        for transfer in ("file", "direct"):
            assert_in_step(agent_of(opened, f"unix:{path}", transfer))
        served.end(signal.SIGTERM)
    assert not path.exists()


def test_behind_https_it_generates_and_learns_and_an_unknown_certificate_gets_nothing(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "127.0.0.1")
    with serve("builtin", *LENGTH, "--tls-cert", str(cert), "--tls-key", str(key)) as served, ExitStack() as opened:
        url = f"https://127.0.0.1:{served.port}"
        assert f"--server {url}" in served.told()
        assert_in_step(agent_of(opened, url, ca=cert))
        with pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED"):
            agent_of(opened, url)
        served.end(signal.SIGTERM)

"""`vlmenv serve`, as far as it goes without vLLM; with it in tests/agents/test_vllm_servers.py."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from servers import free_port
from test_cli import fails

from vlmenv.agents.engines.access import VARIABLE, server_token, server_token_or_new
from vlmenv.agents.engines.guard import Guard
from vlmenv.agents.engines.settings import vocabulary_digest
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.commands.serve import _address, _arguments, _flags, _prepare_socket, _ready, _wait_until_ready
from vlmenv.core.errors import EngineError
from vlmenv.options.fields import replaced
from vlmenv.options.serve import ServeConfig


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the checks before vLLM is started go on to the next."""
    monkeypatch.setattr("vlmenv.commands.serve.require_vllm", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "port is a number from 1 to 65535"),
        (["--engine-length", "1"], "engine_length must leave room"),
        (["--engine-memory", "2"], "share between 0 and 1"),
        (["--engine-memory", "0.5"], "no CUDA GPU here"),
        (["--host", "192.0.2.1"], "192.0.2.1 cannot be listened on"),
        (["--model", "none/of/these"], "no such model folder"),
        (["--socket", "a/b", "--port", "8001"], "port cannot go with socket"),
        (["--socket", "a/b", "--tls-cert", "a", "--tls-key", "b"], "tls_cert cannot go with socket"),
        (["--socket", "a/" + "b" * 120], "give a shorter one"),
        (["--tls-cert", "a"], "tls_cert and tls_key go together"),
        (["--tls-cert", "none.pem", "--tls-key", "none.pem"], "tls_cert: there is no file none.pem"),
        (["--tls-cert", __file__, "--tls-key", __file__], "no certificate and key in PEM"),
    ],
)
def test_options_are_checked(
    options: list[str], message: str, installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    port = [] if {"--port", "--socket"} & set(options) else ["--port", str(free_port())]
    assert message in fails(capsys, "serve", *port, *options)


def test_a_port_that_is_taken_is_told(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "give another --port" in fails(capsys, "serve", "--port", port)


def test_without_vllm_it_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert 'pip install "vlmenv[vllm]"' in fails(capsys, "serve")


@pytest.mark.parametrize("name", ["builtin", "qwen2_5_vl"])
def test_the_server_is_told_what_the_trainer_goes_by(name: str, qwen2_5_vl_folder: Path) -> None:
    """Tokens that are banned are found without the weights."""
    model = "builtin" if name == "builtin" else str(qwen2_5_vl_folder)
    agent = VLMAgent.from_pretrained(model)
    options = {"weights": "bf16", "engine_length": 300, "engine_images": 3, "engine_videos": 2}
    videos = 2 if name == "builtin" else 0  # which vLLM reads otherwise
    told = _arguments(replaced(ServeConfig(model), options), torch.device("cpu"))
    assert told["additional_config"] == {
        "vlmenv_banned": agent.family.banned_tokens.tolist(),
        "vlmenv_images": 3,
        "vlmenv_videos": videos,
        "vlmenv_vocabulary": vocabulary_digest(agent.family),
    }
    assert told["limit_mm_per_prompt"] == {"image": 3, "video": videos}
    assert ("mm_processor_kwargs" in told) == (videos > 0)
    assert (told["model"], told["dtype"], told["max_model_len"]) == (str(find_model(model)), "bfloat16", 300)
    flags = list(_flags(told))
    assert {"--enforce-eager", "--no-enable-chunked-prefill", "--host=127.0.0.1"} <= set(flags)
    (banned,) = [flag.partition("=")[2] for flag in flags if flag.startswith("--additional-config=")]
    assert json.loads(banned) == told["additional_config"]


def test_the_length_is_at_most_the_models() -> None:
    agent = VLMAgent.from_pretrained("builtin")
    told = _arguments(replaced(ServeConfig(), {"engine_length": 10**6}), torch.device("cpu"))
    assert told["max_model_len"] == agent.max_length


def test_on_a_gpu_it_takes_a_share_of_the_memory() -> None:
    told = _arguments(replaced(ServeConfig(), {"engine_memory": 0.7}), torch.device("cuda"))
    assert told["gpu_memory_utilization"] == 0.7
    assert not {"enforce_eager", "kv_cache_memory_bytes", "max_num_seqs"} & told.keys()


@pytest.mark.parametrize(
    ("host", "address", "warned"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000", False),
        ("::1", "http://[::1]:8000", False),
        ("0.0.0.0", "http://localhost:8000", True),
        ("192.0.2.1", "http://192.0.2.1:8000", True),
    ],
)
def test_what_to_type_is_told_and_what_is_not_encrypted(host: str, address: str, warned: bool) -> None:
    config = ServeConfig(model="a/b", host=host)
    assert _address(config) == address
    ready = _ready(config)
    shown = f"http://{socket.gethostname()}:8000" if host == "0.0.0.0" else address
    assert f"vlmenv train --engine vllm-server --server {shown} --model a/b" in ready
    assert ("Nothing is encrypted" in ready) == warned
    tls = _ready(replaced(config, {"tls_cert": Path("c"), "tls_key": Path("k")}))
    assert f"--server {shown.replace('http:', 'https:')} " in tls
    assert "Requests are encrypted; weights are not" in tls


def test_a_socket_is_in_a_private_folder_and_that_of_an_ended_server_goes(
    tmp_path: Path, installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "made" / "a server.sock"
    _prepare_socket(path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        assert "is taken: a server listens there" in fails(capsys, "serve", "--socket", str(path))
    _prepare_socket(path)
    assert not path.exists()
    path.write_text("precious")
    assert "is taken" in fails(capsys, "serve", "--socket", str(path))
    assert path.read_text() == "precious"
    path.unlink()
    path.parent.chmod(0o755)
    assert "is not private to this account: name a socket" in fails(capsys, "serve", "--socket", str(path))
    ready = _ready(ServeConfig(socket=path))
    assert f"--server 'unix:{path}'" in ready
    assert "encrypted" not in ready


def test_where_the_token_is_is_told_and_not_the_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert f"Trainers need the same {VARIABLE} as this command" in _ready(ServeConfig())
    assert server_token() not in _ready(ServeConfig())
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    token = server_token_or_new()
    assert f"read the token from {tmp_path}/vlmenv/server-token; others need it as {VARIABLE}" in _ready(ServeConfig())
    assert token not in _ready(ServeConfig())


def test_the_guard_is_around_the_server_and_no_image_is_fetched() -> None:
    flags = list(_flags(_arguments(ServeConfig(), torch.device("cpu"))))
    for flag, value in (
        ("--middleware", f"{Guard.__module__}.{Guard.__name__}"),
        ("--allowed-media-domains", "none.invalid"),
    ):
        assert flags[flags.index(flag) + 1] == value


def test_a_start_that_takes_long_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("vlmenv.commands.serve._EVERY", 0.5)
    starting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.8)"])
    with pytest.raises(EngineError, match="did not start: it ended with status 0"):
        _wait_until_ready(ServeConfig(port=free_port()), starting, Console(width=200), server_token())
    told = capsys.readouterr().out.splitlines()
    assert told
    assert all("starting for" in line and "VLLM_LOGGING_LEVEL=INFO" in line for line in told)

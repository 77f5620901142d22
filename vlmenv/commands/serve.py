"""`vlmenv serve`: a server of vLLM's that generates for training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import httpx2
import torch
from rich.console import Console

from vlmenv.agents.engines.access import VARIABLE, server_token_or_new, token_file
from vlmenv.agents.engines.guard import HOST
from vlmenv.agents.engines.settings import engine_settings, environment
from vlmenv.agents.engines.vllm import require_vllm
from vlmenv.agents.families import weightless_family
from vlmenv.agents.pixels import prepared_folder
from vlmenv.agents.vlm import BUILTIN
from vlmenv.building import DTYPES
from vlmenv.core.errors import ConfigError, EngineError
from vlmenv.core.loading import import_modules
from vlmenv.options.parsing import parse_plain
from vlmenv.options.serve import ServeConfig
from vlmenv.runs.models import adapter_folder, checkpoint_name

_IMAGES = 8
_GRACE, _MOMENT = 30.0, 5.0
"""Seconds that the server has to end by itself, more than it gives its own processes; and these after it."""
_EVERY = 30.0
"""Seconds between lines that say that it is still waited for. It has no limit: large models take long to load."""
_QUIET = {"PYTHONWARNINGS": "ignore"}  # vLLM's are about its own ways
_UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Else vLLM wants a NUMA node of CPUs for each part of a model."""
_INSIDE = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
"""vLLM's own groups, which have no password, listen to this machine alone."""
_EVERYWHERE = ("0.0.0.0", "::")


def parse(args: Sequence[str], program: str) -> ServeConfig:
    """The options of a command line."""
    config: ServeConfig = parse_plain(args, ServeConfig(), program)
    import_modules(config.imports)
    return config


def run(config: ServeConfig) -> None:
    """Serves until the server ends, or raises what a signal stands for."""
    require_vllm()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.vllm.engine_memory != ServeConfig().vllm.engine_memory and device.type == "cpu":
        raise ConfigError("engine_memory is a share of a GPU's memory, but there is no CUDA GPU here")
    _check_free(config)
    token = server_token_or_new()
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"starting vLLM with {config.model} on {device.type}")
    if (adapter := adapter_folder(config.model)) is not None:
        console.print(f"{adapter} holds adapters: the base model is served until the trainer's first update adds them")
    with _ending_on_signals(), _started(_arguments(config, device), device, token) as process:
        _wait_until_ready(config, process, console, token)
        console.print(_ready(config), markup=False)
        raise EngineError(f"vLLM's server ended by itself, with status {process.wait()}; see above for what it said")


def _arguments(config: ServeConfig, device: torch.device) -> dict[str, Any]:
    """What vLLM's server is told."""
    folder = prepared_folder(checkpoint_name(config.model), config.pixels)
    family = weightless_family(folder)
    alone = device.type == "cpu" and config.vllm.tensor_parallel == 1
    longest = int(family.model.config.get_text_config().max_position_embeddings)
    return engine_settings(
        folder,
        family,
        device,
        dtype=DTYPES[config.weights],
        max_length=min(longest, config.vllm.engine_length),
        max_images=_IMAGES,
        memory_share=config.vllm.engine_memory,
        tensor_parallel=config.vllm.tensor_parallel,
    ) | {
        **({"distributed_executor_backend": "uni"} if alone else {}),  # one process less
        "host": config.host,
        "port": config.port,
        "worker_extension_cls": "vlmenv.agents.engines.worker.WeightReceiver",
        "enable_scale_out": True,  # tokens in, tokens out
        "middleware": ["vlmenv.agents.engines.guard.Guard"],
        "allowed_media_domains": ["none.invalid"],  # a name that cannot exist: images come within requests
        "uvicorn_log_level": "error",
    }


def _flags(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Arguments of the command line, as vLLM reads them."""
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, list):
            yield from (f"--{flag}", *value)
        else:
            yield f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}"


@contextmanager
def _started(arguments: Mapping[str, Any], device: torch.device, token: str) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process, which ends with the context, and with it all those that it has started."""
    divided = _UNBOUND if arguments["tensor_parallel_size"] > 1 else {}
    own = {"VLLM_SERVER_DEV_MODE": "1", VARIABLE: token, HOST: arguments["host"]}
    with tempfile.TemporaryDirectory(prefix="vlmenv-serve-") as sockets:  # of vLLM's processes, private to this account
        process = subprocess.Popen(
            [sys.executable, "-m", "vlmenv.agents.engines.serving", *_flags(arguments)],
            env=_QUIET | _INSIDE | divided | environment(device) | os.environ | own | {"VLLM_RPC_BASE_PATH": sockets},
            stdin=subprocess.PIPE,  # closed when this process ends, however that comes about
            start_new_session=True,  # signals of the terminal come here alone
        )
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            _end_group(process.pid)
            process.wait()


def _end_group(group: int) -> None:
    """Gives what is left of a group of processes a moment to end, and ends it."""
    deadline = time.monotonic() + _MOMENT
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)  # fails where none is left
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Lets SIGTERM end the block as SIGINT does, with the status that it stands for."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _wait_until_ready(config: ServeConfig, process: subprocess.Popen[bytes], console: Console, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    start, lines = time.monotonic(), 0
    while process.poll() is None:
        with suppress(httpx2.HTTPError):
            reply = httpx2.get(f"{_address(config)}/health", headers=headers, trust_env=False, timeout=5)
            if reply.status_code == 200:
                return
        if (waited := time.monotonic() - start) >= (lines + 1) * _EVERY:
            lines = int(waited / _EVERY)
            console.print(
                f"vLLM has been starting for {waited:.0f} s. A large model takes minutes to load; with "
                "VLLM_LOGGING_LEVEL=INFO in the environment vLLM says what it is at"
            )
        time.sleep(0.2)
    raise EngineError(f"vLLM's server did not start: it ended with status {process.returncode}; see above for why")


def _check_free(config: ServeConfig) -> None:
    """Raises ConfigError where the address cannot be listened on."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"{config.host} cannot be listened on at port {config.port} ({error.strerror or error}): "
                "give another --port or --host"
            ) from error


def _address(config: ServeConfig) -> str:
    """Where the server is reached from this machine."""
    host = "localhost" if config.host in _EVERYWHERE else config.host
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _ready(config: ServeConfig) -> str:
    url = f"http://{socket.gethostname()}:{config.port}" if config.host in _EVERYWHERE else _address(config)
    model = "" if config.model == BUILTIN else f" --model {config.model}"
    local = config.host in ("127.0.0.1", "localhost", "::1")
    risk = "" if local else " Nothing is encrypted, the token included: use a network that nobody else is on."
    return (
        f"ready: {config.model} is served at {url}.{risk} {_whose_token()} Train with:\n"
        f"vlmenv train --engine vllm-server --server {url}{model}"
    )


def _whose_token() -> str:
    """What a trainer needs, without the token itself."""
    if VARIABLE in os.environ:
        return f"Trainers need the same {VARIABLE} as this command."
    return f"Trainers of this account read the token from {token_file()}; others need it as {VARIABLE}."

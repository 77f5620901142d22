"""`vlmenv serve`: a server of vLLM's that generates for training."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import torch
from rich.console import Console

from vlmenv.agents.engines.access import VARIABLE, require_private, server_token_or_new, whose_token
from vlmenv.agents.engines.addresses import LONGEST_SOCKET
from vlmenv.agents.engines.admission import LOCAL
from vlmenv.agents.engines.guard import HOST
from vlmenv.agents.engines.settings import TO_SERVER, engine_settings, environment
from vlmenv.agents.engines.videos import LOADER
from vlmenv.agents.engines.vllm import require_vllm
from vlmenv.agents.families import weightless_family
from vlmenv.agents.pixels import prepared_folder
from vlmenv.agents.vlm import BUILTIN
from vlmenv.building import DTYPES
from vlmenv.core.console import open_console, say
from vlmenv.core.errors import ConfigError, EngineError
from vlmenv.core.loading import import_modules
from vlmenv.options.parsing import parse_plain
from vlmenv.options.serve import ServeConfig
from vlmenv.runs.models import adapter_folder, checkpoint_name

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
    if config.tls_cert is not None:
        _check_certificate(config)
    if config.socket is None:
        _check_free(config)
    else:
        _prepare_socket(config.socket.absolute())
    token = server_token_or_new()
    console = open_console()
    say(f"starting vLLM with {config.model} on {device.type}", console)
    if (adapter := adapter_folder(config.model)) is not None:
        told = f"{adapter} holds adapters: the base model is served until the trainer's first update adds them"
        say(told, console)
    with _ending_on_signals(), _started(_arguments(config, device), device, token) as process:
        _wait_until_ready(config, process, console, token)
        console.print(_ready(config), soft_wrap=True)
        raise EngineError(f"vLLM's server ended by itself, with status {process.wait()}; see above for what it said")


def _arguments(config: ServeConfig, device: torch.device) -> dict[str, Any]:
    """What vLLM's server is told."""
    folder = prepared_folder(checkpoint_name(config.model), config.pixels)
    family = weightless_family(folder)
    longest = int(family.model.config.get_text_config().max_position_embeddings)
    return engine_settings(
        folder,
        family,
        device,
        dtype=DTYPES[config.weights],
        max_length=min(longest, config.vllm.engine_length),
        max_images=config.vllm.engine_images,
        max_videos=config.vllm.engine_videos,
        memory_share=config.vllm.engine_memory,
        tensor_parallel=config.vllm.tensor_parallel,
        transfer=TO_SERVER,
    ) | {
        **_listening(config),
        "enable_scale_out": True,  # tokens in, tokens out
        "media_io_kwargs": {"video": {"video_backend": LOADER}},
        "middleware": ["vlmenv.agents.engines.guard.Guard"],
        "allowed_media_domains": ["none.invalid"],  # a name that cannot exist: images come within requests
        "uvicorn_log_level": "error",
    }


def _listening(config: ServeConfig) -> dict[str, Any]:
    """What vLLM is told of the place to listen at."""
    if config.socket is not None:
        return {"uds": str(config.socket.absolute())}
    tls = {} if config.tls_cert is None else {"ssl_certfile": str(config.tls_cert), "ssl_keyfile": str(config.tls_key)}
    return {"host": config.host, "port": config.port, **tls}


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
    # Routes of updates are part of vLLM's development mode; the guard refuses the rest of it.
    own = {"VLLM_SERVER_DEV_MODE": "1", VARIABLE: token, HOST: arguments.get("host", "localhost")}
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
            if (path := arguments.get("uds")) is not None:
                Path(path).unlink(missing_ok=True)


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
    start, lines = time.monotonic(), 0
    with _client(config, token) as client:
        while process.poll() is None:
            with suppress(httpx2.HTTPError):
                if client.get("/health").status_code == 200:
                    return
            if (waited := time.monotonic() - start) >= (lines + 1) * _EVERY:
                lines = int(waited / _EVERY)
                say(
                    f"vLLM has been starting for {waited:.0f} s. A large model takes minutes to load; with "
                    "VLLM_LOGGING_LEVEL=INFO in the environment vLLM says what it is at",
                    console,
                )
            time.sleep(0.2)
    raise EngineError(f"vLLM's server did not start: it ended with status {process.returncode}; see above for why")


def _client(config: ServeConfig, token: str) -> httpx2.Client:
    """An HTTP client of the server that has been started."""
    uds = None if config.socket is None else str(config.socket.absolute())
    verified = True if config.tls_cert is None else _of_certificate(config.tls_cert)
    transport = httpx2.HTTPTransport(verify=verified, uds=uds, trust_env=False)
    base = "http://localhost" if uds is not None else _address(config)
    headers = {"Authorization": f"Bearer {token}"}
    return httpx2.Client(base_url=base, transport=transport, headers=headers, timeout=5, trust_env=False)


def _of_certificate(file: Path) -> ssl.SSLContext:
    """A context that accepts this certificate alone, by whatever name the server is asked."""
    context = ssl.create_default_context(cafile=file)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _check_certificate(config: ServeConfig) -> None:
    """Raises ConfigError where certificate and key cannot be used."""
    assert config.tls_cert is not None
    assert config.tls_key is not None
    for name, file in (("tls_cert", config.tls_cert), ("tls_key", config.tls_key)):
        if not file.is_file():
            raise ConfigError(f"{name}: there is no file {file}")
    try:
        # without a password, which vLLM would ask for
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{config.tls_cert} and {config.tls_key} are no certificate and key in PEM, without a password: {error}"
        ) from error


def _prepare_socket(path: Path) -> None:
    """Makes the folder of a Unix socket, and removes what an ended server has left.

    Raises:
        ConfigError: The folder is not private, the path is too long or taken, or nothing can be made there.
    """
    if (length := len(os.fsencode(path))) > LONGEST_SOCKET:
        raise ConfigError(
            f"socket {path} has {length} bytes, and at most {LONGEST_SOCKET} are possible: give a shorter one"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private(path.parent)
        if path.is_socket() and not _answers(path):
            path.unlink()
    except PermissionError as error:
        raise ConfigError(
            f"{error}: name a socket in a folder of mode 0700, or in one that is not there yet"
        ) from error
    except OSError as error:
        raise ConfigError(f"socket {path} cannot be made: {error.strerror or error}") from error
    if path.exists():
        raise ConfigError(f"{path} is taken: a server listens there, or it is no socket. Give another --socket")


def _answers(path: Path) -> bool:
    """True if a process listens at a socket."""
    with socket.socket(socket.AF_UNIX) as tried:
        try:
            tried.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


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


def _address(config: ServeConfig, named: str | None = None) -> str:
    """Where the server is reached: from this machine, or at the host that is named."""
    host = named or ("localhost" if config.host in _EVERYWHERE else config.host)
    scheme = "http" if config.tls_cert is None else "https"
    return f"{scheme}://[{host}]:{config.port}" if ":" in host else f"{scheme}://{host}:{config.port}"


def _ready(config: ServeConfig) -> str:
    if config.socket is not None:
        url = f"unix:{config.socket.absolute()}"
    else:
        url = _address(config, socket.gethostname() if config.host in _EVERYWHERE else None)
    model = "" if config.model == BUILTIN else f" --model {config.model}"
    return (
        f"ready: {config.model} is served at {url}.{_risk(config)} {whose_token('Trainers')} Train with:\n"
        f"vlmenv train --engine vllm-server --server {url if config.socket is None else shlex.quote(url)}{model}"
    )


def _risk(config: ServeConfig) -> str:
    if config.tls_cert is not None:
        return (
            " Requests are encrypted; weights are not if they are sent with --weight-transfer direct. A "
            "certificate that no authority of the system has signed goes to trainers as --server-ca."
        )
    if config.socket is not None or config.host in LOCAL:
        return ""
    return " Nothing is encrypted, the token included: give --tls-cert, or use a network that nobody else is on."

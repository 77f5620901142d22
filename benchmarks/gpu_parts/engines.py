"""vLLM beside the training: how fast it generates, and what each way to hand weights over takes on one card."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Case, Spread, observations, seconds_of

from gpu_parts.context import FAILED, Context, SkippedError, head, row
from vlmenv.agents.engines.access import VARIABLE
from vlmenv.agents.engines.base import Engine
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.engines.vllm import VLLMEngine
from vlmenv.agents.trials import kind_of
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.core.rollout import Observation

_SHARE = 0.4
"""Of the card's memory, which vLLM may take."""
_GRACE = 45.0
"""Seconds that a server has to end."""


def vllm(context: Context) -> Iterator[str]:
    """The engine in the same process."""
    require_vllm()
    case = context.args.cases[0]
    agent = context.agent(case)
    asked = requests(agent, case)
    started = time.perf_counter()
    engine = VLLMEngine(context.folder(), agent.family, **engine_options(context, case))
    yield f"It started in {time.perf_counter() - started:.0f} s. {SPEEDS}"
    engine.sleep()
    taken = [turn(agent, engine, asked) for _ in range(context.args.rounds + 1)][1:]
    found = {what: Spread(tuple(one[what] for one in taken)) for what in taken[0]}
    hf, fast = (case.count * case.new_tokens / found[name].median for name in ("hf", "vllm"))
    around = [f"{found[what].median:.2f}" for what in ("wake", "sync", "sleep")]
    yield from head(
        *("T", "G", "P", "L", "hf, tokens/s", "vllm, tokens/s", "vllm to hf", "wake, s", "sync, s", "sleep, s"),
        "log-probs apart",
    )
    yield row(*case.cells[1:], f"{hf:,.0f}", f"{fast:,.0f}", f"{fast / hf:.1f}×", *around, apart(agent, asked))
    agent.close()


SPEEDS = (
    "Tokens per second from observations to texts, right after an update of the weights; and seconds that it takes to "
    "wake, to take the weights over and to sleep. hf is the trainer's own sampler. Log-probs: the mean difference of "
    "vLLM's from the trainer's, for the tokens that it drew with the trainer's weights."
)


def servers(context: Context) -> Iterator[str]:
    """A server on the same card, to which weights go in each way."""
    require_vllm()
    case = context.args.cases[0]
    sampling = Sampling(max_new_tokens=case.new_tokens)  # to end tokens too: servers refuse other bans than their own
    agent = VLMAgent.from_pretrained(context.folder(), sampling=sampling, device=context.device, dtype=context.dtype)
    asked, size = requests(agent, case), sum(one.nbytes for one in agent.family.model.parameters())
    yield f"{size / 1e9:.2f} GB of weights, to a server of `vlmenv serve`. In the same process they take `sync` above."
    started = time.perf_counter()
    with served(context, case) as address:
        yield f"The server started in {time.perf_counter() - started:.0f} s."
        yield from head("weight transfer", "first, s", "next, s", "GB/s", "generate, tokens/s", "log-probs apart")
        for way in ("file", "direct"):
            yield row(way, *transferred(way, address, agent, asked, size, context))


def transferred(
    way: Any, address: str, agent: VLMAgent, asked: list[Observation], size: int, context: Context
) -> list[str]:
    """The cells of a way of weights."""
    try:
        agent.engine = VLLMServerEngine([address], context.folder(), agent.family, transfer=way)
        first, following = seconds_of(agent.sync), seconds_of(agent.sync)
        started = time.perf_counter()
        tokens = sum(len(one.token_ids) for one in agent.rollout(asked).completions)
        speed = tokens / (time.perf_counter() - started)
        cells = [f"{first:.2f}", f"{following:.2f}", f"{size / 1e9 / following:.2f}", f"{speed:,.0f}"]
        return [*cells, apart(agent, asked)]
    except Exception as error:  # the other way goes on
        return [f"{FAILED}{kind_of(error)}", *[""] * 4]
    finally:
        if agent.engine is not None:
            agent.engine.close()
        agent.engine = None


def require_vllm() -> None:
    """Raises SkippedError without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise SkippedError("vLLM is not installed (docs/vllm.md)")


def engine_options(context: Context, case: Case) -> dict[str, Any]:
    length = case.tokens + case.new_tokens
    return {"device": context.device, "dtype": context.dtype, "max_length": length, "memory_share": _SHARE}


def requests(agent: VLMAgent, case: Case) -> list[Observation]:
    return [one for one in observations(agent.family, case) for _ in range(case.group_size)]


def turn(agent: VLMAgent, engine: Engine, asked: list[Observation]) -> dict[str, float]:
    """Seconds of generating by the trainer's own sampler and by vLLM, and of what vLLM needs around it."""
    agent.engine = None
    taken = {"hf": seconds_of(lambda: agent.rollout(asked))}
    agent.engine = engine
    steps = {"wake": agent.wake, "sync": agent.sync, "vllm": lambda: agent.rollout(asked), "sleep": agent.sleep}
    return taken | {what: seconds_of(step) for what, step in steps.items()}


@torch.no_grad()
def apart(agent: VLMAgent, asked: list[Observation]) -> str:
    """The mean difference of the engine's log-probabilities from the trainer's."""
    agent.wake()
    rollout = agent.rollout(asked)
    found = agent.logprobs(rollout)
    own = found.values[found.mask].float().cpu().numpy()
    return f"{np.abs(own - np.concatenate([one.logprobs for one in rollout.completions])).mean():.1e}"


@contextmanager
def served(context: Context, case: Case) -> Iterator[str]:
    """The address of a server with the model, which ends with the context.

    Raises:
        RuntimeError: It does not start.
    """
    os.environ.setdefault(VARIABLE, secrets.token_urlsafe())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vlmenv", "serve", "--model", str(context.folder()), "--port", str(port)]
    command += ["--weights", context.precision, "--engine-length", str(case.tokens + case.new_tokens)]
    command += ["--engine-memory", str(_SHARE)] if context.device.type == "cuda" else []
    log = context.scratch / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    while "ready:" not in (said := log.read_text(errors="replace")):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}: {said.strip()[-500:]}")
        time.sleep(0.2)

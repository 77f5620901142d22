"""How the engine of servers deals prompts and updates out, also to servers that fail. No vLLM is needed for that."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_in_server
import torch
from batches import observations
from PIL import Image
from servers import free_port
from stand_in_server import (
    ASKED,
    LATER,
    Answering,
    agent_of,
    answering,
    asked_later,
    assert_answered,
    change,
    cut,
    hang,
)

from vlmenv.agents.engines.files import NAME, private_folder
from vlmenv.core.errors import EngineError
from vlmenv.core.rollout import Observation, Turn, unbatch

opened, model, good, bad = stand_in_server.opened, stand_in_server.model, stand_in_server.good, stand_in_server.bad
"""fixtures"""


@pytest.mark.slow
def test_prompts_are_spread_over_the_servers(good: Answering, bad: Answering, opened: ExitStack) -> None:
    agent = agent_of(opened, good.url, bad.url)
    assert_answered(agent)
    for server in (good, bad):
        assert 3 <= server.paths().count("/inference/v1/generate") <= 5
    bodies = [body for path, body in good.asked + bad.asked if path == "/inference/v1/generate"]
    assert len({body["sampling_params"]["seed"] for body in bodies}) == 8
    chats = {agent.family.chat(one) for one in ASKED}
    assert {agent.family.processor.tokenizer.decode(body["token_ids"]) for body in bodies} == chats


@pytest.mark.slow
def test_many_completions_of_a_prompt_are_asked_for_in_parts(good: Answering, opened: ExitStack) -> None:
    agent = agent_of(opened, good.url)
    rollout = agent.rollout(ASKED[:1] * 150)
    counts = [body["sampling_params"]["n"] for path, body in good.asked if path.endswith("generate")]
    assert sorted(counts) == [22, 64, 64]
    first = [one.token_ids[0] - 20 for one in rollout.completions]
    assert first == [*range(64), *range(64), *range(22)]


@pytest.mark.slow
def test_a_server_that_was_started_anew_waits_for_the_next_update(
    good: Answering, bad: Answering, opened: ExitStack
) -> None:
    """It has the weights of its folder until then, and answers as if nothing had been."""
    agent = agent_of(opened, bad.url, good.url)
    bad.version = "default"
    with pytest.warns(RuntimeWarning, match=f"{bad.url} is excluded .*restarted"):
        assert_answered(agent)
    with pytest.warns(RuntimeWarning, match=f"{bad.url} took the update and is in use again"):
        agent.sync()
    assert_answered(agent, LATER)
    assert asked_later(agent, bad) == 4


@pytest.mark.slow
def test_a_server_that_is_away_at_first_joins_later(model: dict[str, Any], good: Answering, opened: ExitStack) -> None:
    port = free_port()
    late = f"http://127.0.0.1:{port}"
    with pytest.warns(RuntimeWarning, match=f"{late} is excluded .*ConnectError"):
        agent = agent_of(opened, late, good.url)
    assert_answered(agent)
    server = opened.enter_context(answering(Answering(dict(model)), port))
    with pytest.warns(RuntimeWarning, match=f"{late} .* in use again"):
        agent.sync()
    assert_answered(agent)
    assert "/inference/v1/generate" in server.paths()


@pytest.mark.slow
def test_a_server_that_stays_away_is_asked_less_and_less(good: Answering, bad: Answering, opened: ExitStack) -> None:
    """A single question each time, after ever more updates, up to eight."""
    agent = agent_of(opened, bad.url, good.url)
    bad.at, bad.fault = "/v1/models", cut
    agent.engine._servers[0].fault = "gone"
    asked = []
    for _ in range(25):
        before = len(bad.asked)
        agent.sync()
        assert bad.paths()[before:] in ([], ["/v1/models"])
        asked.append(len(bad.asked) - before)
    assert [i for i, count in enumerate(asked) if count] == [0, 1, 3, 7, 15, 23]
    bad.fault = None
    for _ in range(6):
        agent.sync()
    with pytest.warns(RuntimeWarning, match=f"{bad.url} took the update and is in use again"):
        agent.sync()
    assert_answered(agent, LATER)
    assert asked_later(agent, bad) == 4


@pytest.mark.slow
def test_a_server_that_is_away_is_asked_at_once_where_no_other_is_left(
    good: Answering, bad: Answering, opened: ExitStack
) -> None:
    agent = agent_of(opened, bad.url, good.url)
    server = agent.engine._servers[0]
    server.fault, server.due = "gone", 10**6
    agent.sync()
    assert server.fault == "gone"
    good.at, good.fault = "/reset_encoder_cache", lambda *_: (404, b"no")
    with pytest.warns(RuntimeWarning, match=f"({good.url} is excluded|{bad.url} took the update)"):
        agent.sync()
    assert_answered(agent, LATER)
    assert asked_later(agent, bad) == 8


@pytest.mark.slow
def test_a_server_that_hangs_is_not_waited_for_long(
    good: Answering, bad: Answering, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait with it: it has its moment, and not all that a server in use may take (a minute here)."""
    agent = agent_of(opened, bad.url, good.url)
    monkeypatch.setattr("vlmenv.agents.engines.remote._BRIEF", 0.2)
    bad.at, bad.fault = "/v1/models", hang
    agent.engine._servers[0].fault = "gone"
    agent.sync()
    assert agent.engine._servers[0].fault == "no answer from /v1/models within 0.2 s"


def test_without_any_server_there_is_no_engine(opened: ExitStack) -> None:
    away = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    with pytest.raises(EngineError, match=f"{away[0]}: ConnectError.*{away[1]}: ConnectError"):
        agent_of(opened, *away)


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "names": ({"weights": {"a": [1]}}, "it serves another model than .* weights have other names or shapes, such as a"),
    "tokens": ({"banned": [1]}, "bans other tokens"),
    "log-probabilities": ({"logprobs": "raw_logprobs"}, "its log-probabilities are raw_logprobs"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", UNLIKE)
def test_a_server_of_another_model_is_refused(what: str, good: Answering, bad: Answering, opened: ExitStack) -> None:
    unlike, told = UNLIKE[what]
    bad.model |= unlike
    with pytest.raises(EngineError, match=f"{bad.url}: .*{told}"):
        agent_of(opened, good.url, bad.url)


def test_a_server_with_weights_of_other_shapes_is_refused(bad: Answering, opened: ExitStack) -> None:
    name = "model.language_model.norm.weight"
    bad.model["weights"] = bad.model["weights"] | {name: [64]}
    with pytest.raises(EngineError, match=rf"1 weights have other names or shapes, such as {name}, \[64\] there"):
        agent_of(opened, bad.url)


def test_servers_of_unlike_precision_are_refused(good: Answering, bad: Answering, opened: ExitStack) -> None:
    bad.model["dtype"] = "bfloat16"
    with pytest.raises(EngineError, match=f"{bad.url}: it has dtype bfloat16, but another server has float32"):
        agent_of(opened, good.url, bad.url)


@pytest.mark.slow
def test_a_server_that_comes_back_with_another_model_stays_out(
    good: Answering, bad: Answering, opened: ExitStack
) -> None:
    agent = agent_of(opened, bad.url, good.url)
    bad.fault = cut
    with pytest.warns(RuntimeWarning, match="is excluded"):
        agent.rollout(ASKED)
    bad.fault, bad.model = None, bad.model | {"weights": {"a": [1]}}
    agent.sync()
    assert_answered(agent, LATER)
    assert not asked_later(agent, bad)


def test_the_shortest_server_bounds_the_length(good: Answering, bad: Answering, opened: ExitStack) -> None:
    bad.max_length = 100
    assert agent_of(opened, good.url, bad.url).engine.max_length == 100


# Updates.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_arrive_whole_and_their_files_go(
    dtype: str, good: Answering, bad: Answering, opened: ExitStack, tmp_path: Path
) -> None:
    good.model["dtype"] = bad.model["dtype"] = dtype
    agent = agent_of(opened, good.url, bad.url, weights_folder=tmp_path)
    change(agent)
    agent.sync()
    expected = agent._published_weights()
    for server in (good, bad):
        assert server.weights.keys() == expected.keys()
        for name, tensor in server.weights.items():
            assert torch.equal(tensor, expected[name].to(getattr(torch, dtype)))
        told = ["/update_weights", "/reset_prefix_cache", "/reset_encoder_cache", "/update_weight_version"]
        assert server.paths()[-4:] == told
    assert not list(tmp_path.iterdir())
    agent.close()


def test_a_folder_that_cannot_be_written_is_named(good: Answering, opened: ExitStack, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"the file of weights for the servers cannot be written: .*{tmp_path}/none"):
        agent_of(opened, good.url, weights_folder=tmp_path / "none")


def test_a_worker_tells_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    worker = stand_in_server.Worker(0)
    with private_folder(tmp_path) as folder:
        file = folder / NAME
        with pytest.raises(FileNotFoundError, match="not on the server's machine: give a shared --weights-folder"):
            worker.read(str(file), "")
        file.write_bytes(b"half of it")
        with pytest.raises(ValueError, match="its SHA-256 differs"):
            worker.read(str(file), "0" * 64)


# Callers.


@pytest.mark.slow
def test_it_works_where_an_event_loop_runs(good: Answering, opened: ExitStack) -> None:
    """As in a notebook."""

    async def cell() -> None:
        assert_answered(agent_of(opened, good.url))

    asyncio.run(cell())


@pytest.mark.slow
def test_an_interrupt_ends_the_waiting(good: Answering, opened: ExitStack) -> None:
    agent, good.fault = agent_of(opened, good.url), hang
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        agent.rollout(ASKED)
    deadline = time.monotonic() + 10
    while asyncio.all_tasks(agent.engine._loop._loop):
        assert time.monotonic() < deadline, "it is still being waited for"
        time.sleep(0.01)
    good.fault = None
    assert_answered(agent)


@pytest.mark.slow
def test_images_go_as_they_are(good: Answering, opened: ExitStack) -> None:
    agent, shown = agent_of(opened, good.url), observations(2, 1)
    with pytest.raises(EngineError, match="encodes a prompt differently"):  # it leaves one token for each image
        agent.act(shown)
    bodies = [body for path, body in good.asked if path.endswith("generate")]
    sent = [base64.b64decode(body["content_parts"][0]["url"].removeprefix("data:image/png;base64,")) for body in bodies]
    images = [np.asarray(Image.open(io.BytesIO(one))) for one in sent]
    expected = [one["images"][0] for one in unbatch(shown)]
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in expected)


def test_images_between_texts_go_in_their_order(good: Answering, opened: ExitStack) -> None:
    """Tokens with one mark for each image, where it stands, and the images in the same order."""
    agent, (first, second) = agent_of(opened, good.url), observations(2, 1)["images"]
    turns: tuple[Turn, ...] = ({"role": "system", "text": "Look."}, {"role": "user", "text": "Is <image> red?"})
    shown: Observation = {"images": (*first, *second), "prompt": "Or <image>?", "turns": turns}
    with pytest.raises(EngineError, match="encodes a prompt differently"):  # it leaves one token for each image
        agent.act([shown])
    body = next(body for path, body in good.asked if path.endswith("generate"))
    text = agent.family.processor.tokenizer.decode(body["token_ids"])
    turns_of = text.replace("<|vision_start|><|image_pad|><|vision_end|>", "[IMG]").split("<|im_start|>")
    assert [one.split("\n")[1] for one in turns_of[1:]] == [
        "Look.<|im_end|>",
        "Is [IMG] red?<|im_end|>",
        "Or [IMG]?<|im_end|>",
        "",
    ]
    sent = [base64.b64decode(part["url"].removeprefix("data:image/png;base64,")) for part in body["content_parts"]]
    images = [np.asarray(Image.open(io.BytesIO(one))) for one in sent]
    assert all(np.array_equal(a, b) for a, b in zip(images, shown["images"], strict=True))

"""What a server answers that cannot be used for completions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import stand_in_server
from stand_in_server import (
    ASKED,
    LATER,
    Answering,
    Fault,
    agent_of,
    asked_later,
    assert_answered,
    changed,
    cut,
    hang,
    lose_patience,
)

from vlmenv.core.errors import EngineError

opened, model, good, bad = stand_in_server.opened, stand_in_server.model, stand_in_server.good, stand_in_server.bad
"""fixtures"""


def first(change: Callable[[Any], Any]) -> Fault:
    """Changes the answer's first completion."""
    return changed(lambda reply: change(reply["choices"][0]))


def shorten(choice: Any) -> None:
    choice["token_ids"].pop()
    choice["logprobs"]["content"].pop()


def lengthen(choice: Any) -> None:
    choice["token_ids"].append(21)
    choice["logprobs"]["content"].append({"token_id": 21, "logprob": -1.0})


def lift(choice: Any) -> None:
    choice["token_ids"][0] = choice["logprobs"]["content"][0]["token_id"] = 10**6


def logprob(value: Any) -> Fault:
    return first(lambda choice: choice["logprobs"]["content"][1].update(logprob=value))


FAULTS: dict[str, tuple[Fault, str]] = {
    "hangs": (hang, "no answer from /inference/v1/generate within 3 s"),
    "cuts the connection": (cut, "RemoteProtocolError at /inference/v1/generate"),
    "status 500": (lambda *_: (500, b"the engine is dead"), "status 500 .*the engine is dead"),
    "status 400": (lambda *_: (400, b"too many images"), "status 400 .*too many images"),
    "not JSON": (lambda *_: (200, b"<html>a proxy's page</html>"), "not JSON: .*a proxy's page"),
    "not even text": (lambda *_: (200, bytes(range(128, 256))), "not JSON"),
    "a list": (lambda *_: (200, b"[1, 2]"), "not of vLLM's form"),
    "no completions": (changed(lambda reply: reply.pop("choices")), "not of vLLM's form .KeyError: 'choices'"),
    "too few completions": (changed(lambda reply: reply["choices"].pop()), r"completions \[0\], not the 2 requested"),
    "one twice": (first(lambda choice: choice.update(index=1)), r"completions \[1, 1\], not the 2 requested"),
    "text for tokens": (first(lambda choice: choice.update(token_ids=["a"])), "no list of integers"),
    "fractions of tokens": (first(lambda choice: choice.update(token_ids=[1.5])), "no list of integers"),
    "no log-probabilities": (first(lambda choice: choice.update(logprobs=None)), "not of vLLM's form"),
    "no number": (logprob(float("nan")), "its log-probabilities are invalid"),
    "vLLM's word for no number": (logprob(-9999.0), "its log-probabilities are invalid"),
    "a probability above 1": (logprob(0.5), "its log-probabilities are invalid"),
    "null": (logprob(None), "not of vLLM's form"),
    "other tokens": (first(lambda choice: choice["token_ids"].reverse()), "its 3 tokens do not match their 3"),
    "unknown tokens": (changed(lambda reply: lift(reply["choices"][0])), "outside the vocabulary"),
    "too few tokens": (first(shorten), "a completion has 2 tokens and the finish reason 'length'"),
    "too many tokens": (first(lengthen), "a completion has 4 tokens"),
    "aborted": (
        first(lambda choice: choice.update(finish_reason="abort")),
        "a completion has the finish reason 'abort'",
    ),
    "no word of the weights": (first(lambda choice: choice.update(weight_versions=None)), "not of vLLM's form"),
    "other weights": (
        first(lambda choice: choice["weight_versions"][0].update(version="default")),
        "its weights are not those of the last update",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_is_left_out(fault: str, good: Answering, bad: Answering, opened: ExitStack) -> None:
    """The others do its work. Alone it ends the rollout; nothing it says is taken for a completion."""
    agent, alone = agent_of(opened, bad.url, good.url), agent_of(opened, bad.url)
    agent.sync()  # `alone` has given it weights of its own version
    bad.fault, told = FAULTS[fault]
    if bad.fault is hang:
        lose_patience(agent, bad)
        lose_patience(alone, bad)
    with pytest.warns(RuntimeWarning, match=f"the server {bad.url} is excluded until .*: .*{told}"):
        assert_answered(agent)
    assert_answered(agent, LATER)
    assert not asked_later(agent, bad)
    alone.engine._version = bad.version
    with pytest.raises(EngineError, match=f"no server is left. {bad.url}: .*{told}"):
        alone.rollout(ASKED)

"""Answers of a vLLM server, validated before use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmenv.agents.sampling import Sampled

_NO_NUMBER = -9999.0
"""vLLM's placeholder for log-probabilities that are not finite."""
_ROUNDING = 1e-3
"""Tolerance by which a log-probability may exceed 0."""


class ServerFault(Exception):
    """A fault of a server."""


class PassingFault(ServerFault):
    """A fault that may be temporary."""


class OtherModelFault(ServerFault):
    """A permanent fault: the server serves another model."""


class RefusedTokenFault(ServerFault):
    """A permanent fault: the server has another token."""


@dataclass(frozen=True, slots=True)
class Served:
    """The model that a server serves."""

    weights: dict[str, list[int]]
    """shapes by name"""
    banned: list[int]
    """ids of tokens that are never sampled"""
    vocabulary: str
    """`vocabulary_digest` of its tokenizer"""
    dtype: str
    max_length: int
    """length limit of prompt and completion together, in tokens"""
    max_images: int
    """most images of a conversation"""
    max_videos: int
    """most videos of a prompt"""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request."""

    prompt_ids: list[int]
    """the prompt as the server encodes it"""
    completions: list[Sampled]


def read_served(models: Any, told: Any) -> Served:
    """Reads the answers to `/v1/models` and to the guard's route `MODEL`.

    Args:
        models: Answer to `/v1/models`.
        told: Answer to `MODEL`.

    Raises:
        ServerFault: The answers are not of vLLM's form.
        OtherModelFault: The log-probabilities are not those of the sampling distribution.
    """
    try:
        weights = {str(name): _integers(shape) for name, shape in told["weights"].items()}
        limits, mode = [models["data"][0]["max_model_len"], told["images"], told["videos"]], told["logprobs"]
        vocabulary, dtype = str(told["vocabulary"]), str(told["dtype"])
        served = Served(weights, _integers(told["banned"]), vocabulary, dtype, *_integers(limits))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _other_form(error) from error
    if mode != "processed_logprobs":
        raise OtherModelFault(f"its log-probabilities are {mode}, not processed_logprobs")
    return served


def read_answer(reply: Any, *, count: int, longest: int, vocabulary: int, version: str) -> Answer:
    """Reads the answer to a request for completions.

    Args:
        reply: The answer.
        count: Number of requested completions.
        longest: Length limit of completions in tokens.
        vocabulary: Size of the vocabulary.
        version: Version of the weights that must have sampled them.

    Raises:
        ServerFault: The answer is not of vLLM's form, has another number of completions, or invalid tokens or
            log-probabilities; or other weights sampled it.
    """
    try:
        choices = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
        indices = [choice["index"] for choice in choices]
        versions = {span["version"] for choice in choices for span in choice["weight_versions"]}
        answer = Answer(
            _integers(reply["prompt_token_ids"]), [_completion(choice, longest, vocabulary) for choice in choices]
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _other_form(error) from error
    if indices != list(range(count)):
        raise ServerFault(f"it gave completions {indices}, not the {count} requested")
    if versions != {version}:
        raise ServerFault("its weights are not those of the last update: it was restarted, or another trainer uses it")
    return answer


def read_scores(reply: Any, *, count: int) -> tuple[list[int], NDArray[np.float32]]:
    """Reads the log-probabilities of a prompt's last `count` tokens.

    Returns:
        The prompt as the server encodes it, and float32 [count].

    Raises:
        ServerFault: The answer is not of vLLM's form, or has invalid log-probabilities.
    """
    try:
        prompt_ids, told = _integers(reply["prompt_token_ids"]), reply["prompt_logprobs"][-count:]
        found = [told[i][str(token)]["logprob"] for i, token in enumerate(prompt_ids[-count:])]
        logprobs = np.array([float(one) for one in found])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _other_form(error) from error
    if len(logprobs) != count or not ((logprobs > _NO_NUMBER) & (logprobs <= _ROUNDING)).all():
        raise ServerFault(f"it gave {len(logprobs)} log-probabilities for {count} tokens, or invalid ones")
    return prompt_ids, logprobs.astype(np.float32)


def _completion(choice: Any, longest: int, vocabulary: int) -> Sampled:
    ids, steps, reason = _integers(choice["token_ids"]), choice["logprobs"]["content"], choice["finish_reason"]
    logprobs = np.array([float(step["logprob"]) for step in steps])
    if [step["token_id"] for step in steps] != ids:
        raise ServerFault(f"its {len(ids)} tokens do not match their {len(steps)} log-probabilities")
    if not all(_NO_NUMBER < logprob <= _ROUNDING for logprob in logprobs):
        raise ServerFault("its log-probabilities are invalid, as from weights that are not finite")
    if not all(0 <= token < vocabulary for token in ids):
        raise ServerFault(f"its tokens are outside the vocabulary of {vocabulary}")
    if reason not in ("stop", "length"):
        raise ServerFault(f"a completion has the finish reason {reason!r}")
    if not 0 < len(ids) <= longest or (reason == "length" and len(ids) < longest):
        raise ServerFault(
            f"a completion has {len(ids)} tokens and the finish reason {reason!r}, with a limit of {longest}"
        )
    return Sampled(np.array(ids, dtype=np.int64), logprobs.astype(np.float32), reason)


def _integers(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"no list of integers: {str(values)[:80]}")
    return values


def _other_form(error: Exception) -> ServerFault:
    return ServerFault(f"its answer is not of vLLM's form ({type(error).__name__}: {error})")

"""What a server of vLLM answers, looked at before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmenv.agents.sampling import Sampled

_NO_NUMBER = -9999.0
"""What vLLM writes in place of log-probabilities that are not finite."""
_ROUNDING = 1e-3
"""A log-probability may exceed 0 by so much."""


class ServerFault(Exception):
    """What a server did wrong."""


class PassingFault(ServerFault):
    """One that may be gone when it is asked again."""


class OtherModelFault(ServerFault):
    """It serves something else than is trained, and will go on doing so."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a server serves."""

    weights: dict[str, list[int]]
    """names and shapes"""
    banned: list[int]
    """ids of tokens that it never samples"""
    dtype: str
    max_length: int
    """tokens of prompt and completion together"""


@dataclass(frozen=True, slots=True)
class Answer:
    """To one request."""

    prompt_ids: list[int]
    """the prompt as the server reads it"""
    completions: list[Sampled]


def read_served(models: Any, results: Any) -> Served:
    """Reads the answers to `/v1/models`, and of each worker to `vlmenv_model`.

    Raises:
        ServerFault: They are of another form.
        OtherModelFault: Its log-probabilities are not those of the distribution that is sampled from.
    """
    try:
        told = results["results"][0]
        weights = {str(name): _integers(shape) for name, shape in told["weights"].items()}
        length, mode = models["data"][0]["max_model_len"], told["logprobs"]
        served = Served(weights, _integers(told["banned"]), str(told["dtype"]), *_integers([length]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _other_form(error) from error
    if mode != "processed_logprobs":
        raise OtherModelFault(f"its log-probabilities are {mode}, not processed_logprobs")
    return served


def read_answer(reply: Any, *, count: int, longest: int, vocabulary: int, version: str) -> Answer:
    """Reads the answer to a request for completions.

    Args:
        reply: As it came.
        count: Completions that were asked for.
        longest: Tokens of a completion at most.
        vocabulary: Number of tokens.
        version: The weights that are to have sampled them.

    Raises:
        ServerFault: It is of another form, has other numbers of tokens or completions, or ones that are no numbers; or
            other weights sampled them.
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
        raise ServerFault(f"{len(indices)} completions came where {count} were asked for")
    if versions != {version}:
        raise ServerFault(
            "its weights are not those that it was last given: it has been started anew, or another trainer uses it"
        )
    return answer


def _completion(choice: Any, longest: int, vocabulary: int) -> Sampled:
    ids, steps, reason = _integers(choice["token_ids"]), choice["logprobs"]["content"], choice["finish_reason"]
    logprobs = np.array([float(step["logprob"]) for step in steps])
    if [step["token_id"] for step in steps] != ids:
        raise ServerFault(f"{len(ids)} tokens came with the log-probabilities of {len(steps)}, or of other ones")
    if not all(_NO_NUMBER < logprob <= _ROUNDING for logprob in logprobs):
        raise ServerFault("log-probabilities came that are none, as from weights that are not finite")
    if not all(0 <= token < vocabulary for token in ids):
        raise ServerFault(f"tokens came that the model does not have: {vocabulary} are known")
    if reason not in ("stop", "length"):
        raise ServerFault(f"a completion ended by {reason!r}")
    if not 0 < len(ids) <= longest or (reason == "length" and len(ids) < longest):
        raise ServerFault(f"a completion of {len(ids)} tokens came, ended by {reason!r}, where {longest} are the most")
    return Sampled(np.array(ids, dtype=np.int64), logprobs.astype(np.float32), reason)


def _integers(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"no list of integers: {str(values)[:80]}")
    return values


def _other_form(error: Exception) -> ServerFault:
    return ServerFault(f"an answer came that is not of vLLM's form ({type(error).__name__}: {error})")

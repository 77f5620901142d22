"""Scores answers by weighted reward terms."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from vlmenv.core.errors import ConfigError, RewardError, VLMEnvError, unknown_name
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.rollout import named_images
from vlmenv.envs.data.source import Sample
from vlmenv.envs.rewards.registry import load_reward
from vlmenv.envs.rewards.terms import BatchTerm, RewardTerm

Rewards = Mapping[str | RewardTerm, float] | Mapping[str, float]
"""Reward terms with their weights: names of the task's own or of registered terms, "module:function", or callables."""

Evaluate = Callable[[Sequence[str], Sequence[Any], Sequence[Sample], Sequence[Any]], Iterable[float]]
"""A function from N texts, targets, samples and parsed answers to N numbers."""

_TAKEN: Final = ("mean", "std", "zero_std_groups")  # "reward/…" metrics of the trainer


@dataclass(slots=True)
class Score:
    """The score of an answer."""

    reward: float
    """weighted sum of the terms"""
    terms: dict[str, float]
    """each term, unweighted"""
    prediction: Any
    """the parsed answer; None if unreadable"""
    seconds: dict[str, float]
    """seconds of each term; for a batch term, this answer's share"""
    weights: dict[str, float] = field(default_factory=dict)
    """the weight of each term"""


class Scorer:
    """Scores answers by weighted terms.

    Args:
        known: The task's terms by name.
        rewards: The terms in use, with their weights.
        answer_format: The argument of this name for the terms that have it.
        count_tokens: The argument of this name for the terms that have it.
        exchangeable: Names of terms that rows may choose. The chosen term replaces the first of them in use.
        registered: Terms of this task by the names of `register_reward`.

    Attributes:
        progress: Part of the training that is done, in [0, 1], for the terms that have an argument of this name.
            Training sets it; everywhere else it is 1.

    Raises:
        ConfigError: A term is unknown, or its name or weight is invalid.
        ModelError: A term's model cannot be loaded.
    """

    def __init__(
        self,
        known: Mapping[str, RewardTerm],
        rewards: Rewards,
        answer_format: AnswerFormat,
        count_tokens: Callable[[str], int],
        exchangeable: Collection[str] = (),
        registered: Mapping[str, RewardTerm] = MappingProxyType({}),
    ) -> None:
        if not isinstance(rewards, Mapping):
            raise ConfigError(f"rewards is a {type(rewards).__name__}: give terms with weights, as {{'accuracy': 1.0}}")
        if not rewards:
            raise ConfigError(f"rewards is empty: name at least one of {', '.join(sorted(known))}")
        self.progress = 1.0
        self._known = known
        self._answer_format = answer_format
        self._given: dict[str, Any] = {"answer_format": answer_format, "count_tokens": count_tokens}
        self.weights: dict[str, float] = {}
        self._evaluate: dict[str, Evaluate] = {}
        for key, weight in rewards.items():
            name, term = _named_term(key, known, registered)
            if name in self.weights:
                raise ConfigError(f"two reward terms have the same name, {name}: rename one of the functions")
            self.weights[name], self._evaluate[name] = _weight(name, weight), self._evaluator(term)
        self._exchangeable = next((name for name in self.weights if name in exchangeable), None)

    def __call__(
        self,
        texts: Sequence[str],
        targets: Sequence[Any],
        samples: Sequence[Sample],
        predictions: Sequence[Any],
        earlier: Sequence[Sequence[str]] | None = None,
    ) -> list[Score]:
        """Scores N answers.

        Args:
            texts: [N].
            targets: [N].
            samples: [N].
            predictions: [N], the parsed answers.
            earlier: [N], the episode's answers before, for the terms that have an argument of this name. Default: none.

        Raises:
            RewardError: A term failed, or its value is not finite.
        """
        earlier = [()] * len(texts) if earlier is None else earlier
        scores = [Score(0.0, {}, prediction, {}) for prediction in predictions]
        for name, weight, evaluate, rows in self._plan(samples):
            started = time.perf_counter()
            arguments = tuple([column[i] for i in rows] for column in (texts, targets, samples, predictions, earlier))
            values = _evaluated(name, evaluate, arguments, [samples[i].id for i in rows])
            share = (time.perf_counter() - started) / len(rows)
            for i, value in zip(rows, values, strict=True):
                if not math.isfinite(value):
                    raise RewardError(
                        f"reward term '{name}' gave {value} for sample {samples[i].id}; it must be finite"
                    )
                scores[i].terms[name], scores[i].seconds[name] = value, share
                scores[i].weights[name] = weight
                scores[i].reward += weight * value
        return scores

    def _plan(self, samples: Sequence[Sample]) -> Iterator[tuple[str, float, Evaluate, list[int]]]:
        """The terms with their rows: name, weight, function, and rows."""
        for name, weight in self.weights.items():
            chosen = [(sample.term if name == self._exchangeable else None) or name for sample in samples]
            for own in dict.fromkeys(chosen):
                rows = [i for i, one in enumerate(chosen) if one == own]
                yield own, weight, self._evaluate[name] if own == name else self._evaluator(self._known[own]), rows

    def _evaluator(self, term: RewardTerm) -> Evaluate:
        if isinstance(term, BatchTerm):
            term.load()
            return functools.partial(_together, term, self._answer_format)
        wanted = _parameters(term)
        given = {name: value for name, value in self._given.items() if name in wanted}
        own = [name for name in _OF_ROWS if name in wanted]
        bound = functools.partial(term, **given)
        if "progress" not in wanted:
            return functools.partial(_each, own, bound)
        return functools.partial(self._with_progress, own, bound)

    def _with_progress(self, own: Sequence[str], term: Callable[..., float], *columns: Any) -> Iterator[float]:
        return _each(own, functools.partial(term, progress=self.progress), *columns)


_OF_ROWS: Final = ("prediction", "earlier")
"""Arguments of terms that differ by answer: see `RewardTerm`."""


def _together(
    term: BatchTerm,
    answer_format: AnswerFormat,
    texts: Sequence[str],
    targets: Sequence[Any],
    samples: Sequence[Sample],
    predictions: Sequence[Any],
    earlier: Sequence[Sequence[str]],
) -> Sequence[float]:
    """A term that scores N answers at once. It gets their questions if it has a parameter for them."""
    named = [named_images(sample.question) if sample.images else sample.question for sample in samples]
    asked = {"questions": named} if "questions" in _parameters(term.batch) else {}
    return term.batch(texts, targets, [sample.asked_images for sample in samples], answer_format, **asked)


def _each(
    own: Sequence[str],
    term: Callable[..., float],
    texts: Sequence[str],
    targets: Sequence[Any],
    samples: Sequence[Sample],
    predictions: Sequence[Any],
    earlier: Sequence[Sequence[str]],
) -> Iterator[float]:
    """Applies a term for single answers to N answers, one by one, with the arguments of rows that it has."""
    columns = dict(zip(_OF_ROWS, (predictions, earlier), strict=True))
    rows = zip(texts, targets, *(columns[name] for name in own), strict=True)
    return (term(text, target, **dict(zip(own, given, strict=True))) for text, target, *given in rows)


def _evaluated(
    name: str,
    evaluate: Evaluate,
    arguments: tuple[Sequence[Any], ...],
    ids: Sequence[str],
) -> list[float]:
    """The values of a term, checked to be finite numbers.

    Raises:
        RewardError: The term failed. The message has the sample's id, except for a batch term.
    """
    values: list[float] = []
    given: Iterable[float] | None = None
    try:
        given = evaluate(*arguments)
        for value in given:
            values.append(float(value))
    except VLMEnvError:
        raise
    except Exception as error:
        known = given is not None and len(values) < len(ids)
        where = f"sample {ids[len(values)]}" if known else f"{len(ids)} answers at once"
        raise RewardError(f"reward term '{name}' failed on {where}: {type(error).__name__}: {error}") from error
    if len(values) != len(ids):
        raise RewardError(f"reward term '{name}' gave {len(values)} values for {len(ids)} answers")
    return values


def _named_term(
    key: str | RewardTerm, known: Mapping[str, RewardTerm], registered: Mapping[str, RewardTerm]
) -> tuple[str, RewardTerm]:
    """The term for a key of `rewards`, and its name in `info`.

    Raises:
        ConfigError: There is none, or its name is invalid.
    """
    if isinstance(key, str) and ":" in key:
        term = load_reward(key)
        name = _name_of(term)
    elif isinstance(key, str):
        name, term = key, _known_term(key, known, registered)
    elif isinstance(key, BatchTerm) or callable(key):
        name, term = _name_of(key), key
    else:
        raise ConfigError(f"reward term {key!r} is neither a name nor a function")
    if name in _TAKEN:
        raise ConfigError(f"reward term {name}: the name is that of a metric; call it something else")
    if name.startswith("_"):
        raise ConfigError(f"reward term {name}: a leading underscore is taken for a mask in vector infos")
    return name, term


def _known_term(name: str, known: Mapping[str, RewardTerm], registered: Mapping[str, RewardTerm]) -> RewardTerm:
    if name in known and name in registered:
        raise ConfigError(f"the task has a reward term '{name}' of its own: register yours by another name")
    if name in known or name in registered:
        return known[name] if name in known else registered[name]
    hint = "A function of your own is named as module:function."
    raise ConfigError(f"{unknown_name('reward term', name, [*known, *registered])} {hint}")


def _weight(name: str, weight: float) -> float:
    if not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ConfigError(f"the weight of reward term '{name}' is {weight}; it must be finite")
    return float(weight)


def _name_of(term: RewardTerm) -> str:
    if isinstance(term, BatchTerm):
        return term.name
    if isinstance(term, functools.partial):
        return _name_of(term.func)
    return getattr(term, "__name__", type(term).__name__)


def _parameters(term: Callable[..., Any]) -> Container[str]:
    try:
        return inspect.signature(term).parameters
    except (TypeError, ValueError):  # of some built-in functions
        return ()

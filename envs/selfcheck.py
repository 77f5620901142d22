"""Scores a task's own right answers and reports those that do not reach the best values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vlmenv.core.errors import DataError
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.scoring import Scorer

CHECKED: Final = 8
"""default number of checked samples"""
_ROUNDING: Final = 0.1
"""tolerance of best values: coordinates are written as whole numbers"""


@dataclass(frozen=True, slots=True)
class Misjudged:
    """A right answer that its own task does not score as right."""

    sample: str
    """the sample's id"""
    term: str
    """the reward term; "parse" for an unreadable answer, "write_answer" for a missing one"""
    told: str
    """the term's value and its best one, or the failure"""
    answer: str
    """the answer of `write_answer`, or the row's own completion"""
    prediction: Any
    """the reading of `parse`"""

    def __str__(self) -> str:
        wrote = f"; the answer is {_cut(self.answer)}, which parse() reads as {_cut(self.prediction)}"
        return f"sample {self.sample}: {self.term} {self.told}{wrote if self.answer else ''}"


def self_check(task: VisualTaskEnv, count: int = CHECKED, *, imitated: bool = False) -> list[Misjudged]:
    """Checks the right answers to some of a task's samples, spread over its data set.

    Example:
        >>> for fault in self_check(PointEnv(dataset="points.jsonl")):
        ...     print(fault)
        sample 3: hit is 0, not 1; the answer is '…', which parse() reads as None

    Args:
        task: The environment.
        count: Number of samples.
        imitated: If true, a row's own completion is checked, which `sft` imitates. Rows without one are checked as
            usual.
    """
    return check_answers(task, some_samples(task.source, count), imitated=imitated)


def check_answers(task: VisualTaskEnv, samples: Iterable[Sample], *, imitated: bool = False) -> list[Misjudged]:
    """Scores the right answers to given samples by the task's default reward terms.

    Each term with a positive weight must reach 1, or the value in the task's `best`, within the rounding of
    coordinates. Terms with None in `best` are left out. A task that knows no answers has nothing to check.

    Args:
        task: The environment.
        samples: Samples of it, with their images.
        imitated: See `self_check`.
    """
    if not task.knows_answers and not imitated:
        return []
    best = {name: task.best.get(name, 1.0) for name, weight in task.default_rewards.items() if weight > 0}
    judged = [name for name, value in best.items() if value is not None]
    scorer = task.scorer(dict.fromkeys(judged, 1.0)) if judged else None
    return [fault for sample in samples for fault in _misjudged(task, sample, scorer, imitated)]


def describe(faults: Sequence[Misjudged], count: int) -> str:
    """A summary for the user: the terms, the number of samples of `count`, and the first case."""
    samples = len({fault.sample for fault in faults})
    terms = ", ".join(f"{term} ({number})" for term, number in Counter(fault.term for fault in faults).items())
    return (
        f"the task does not take its own right answers for right on {samples} of {count} samples: {terms}. {faults[0]}"
    )


def some_samples(source: Source, count: int = CHECKED) -> list[Sample]:
    """Up to `count` samples, spread evenly over a source; unreadable ones are left out."""
    size = count if source.size is None else source.size
    found = []
    for index in sorted({i * size // count for i in range(count)} if size else set()):
        try:
            found.append(source.get(index))
        except DataError:  # which whoever asks for this sample is told
            continue
    return found


def _misjudged(task: VisualTaskEnv, sample: Sample, scorer: Scorer | None, imitated: bool) -> Iterator[Misjudged]:
    try:
        answer = (sample.response if imitated else "") or task.write_answer(sample)
    except Exception as error:
        yield Misjudged(sample.id, "write_answer", f"failed: {_named(error)}", "", None)
        return
    try:
        prediction = task.parse(answer)
    except Exception as error:
        yield Misjudged(sample.id, "parse", f"failed: {_named(error)}", answer, None)
        return
    if prediction is None:
        yield Misjudged(sample.id, "parse", "reads no answer", answer, None)
    try:
        scores = {} if scorer is None else scorer([answer], [task.target(sample)], [sample], [prediction])[0].terms
    except Exception as error:
        yield Misjudged(sample.id, "a reward", f"failed: {_named(error)}", answer, prediction)
        return
    for term, value in scores.items():
        wanted = task.best.get(term, 1.0)
        if wanted is not None and value < wanted - _ROUNDING:
            yield Misjudged(sample.id, term, f"is {value:.3g}, not {wanted:g}", answer, prediction)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _cut(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:119]}…"

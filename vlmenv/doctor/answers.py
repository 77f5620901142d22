"""Checks that the task can use the model's answers."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from vlmenv.agents.families import coordinate_space, resize_rule
from vlmenv.core.coordinates import Coordinates, CoordinateSpace
from vlmenv.core.errors import ModelError
from vlmenv.doctor.overlap import Overlap, clearly_better, overlap
from vlmenv.doctor.subject import GROUP, Seen, Subject, Unchecked
from vlmenv.envs.selfcheck import check_answers, describe
from vlmenv.runs.watch import READABLE, TRUNCATED

_INSIDE = 0.5
"""Minimum share of boxes within the image."""


def coordinates(subject: Subject) -> Seen:
    """Finds the convention of coordinates under which the answers' boxes overlap most with the true ones."""
    taught, used = coordinate_space(subject.agent.folder), subject.task.coordinates.space
    found = {space: _overlap(subject, way) for space, way in _conventions(subject).items()}
    if not any(one.boxes and one.samples for one in found.values()):
        raise Unchecked("no true answer, or none of the model's, holds a box")
    asked = f"asked for {used}" + (f", taught {taught}" if used is not taught else "")
    read = [f"read as {space}: IoU {one.mean:.2f}, {one.inside:.0%} in the image" for space, one in found.items()]
    figure = "; ".join([asked, *read])
    best = max(found, key=lambda space: found[space].mean)
    if clearly_better(found[best], found[used]):
        return figure, f"The answers are in coordinates '{best}': give --coordinates {best}."
    if found[used].inside < _INSIDE:
        return figure, f"Most boxes lie outside the image: remove --coordinates, or give --coordinates {taught}."
    return figure, ""


def right_answers(subject: Subject) -> Seen:
    """Checks that the task gives its own true answers the best rewards."""
    if not subject.samples:
        raise Unchecked("there are no samples")
    misjudged = check_answers(subject.task, subject.samples)
    if not misjudged:
        return f"all {len(subject.samples)} are at their best", ""
    return describe(misjudged, len(subject.samples)), (
        "Mend the task's write_answer(), parse(), target() or reward terms, so that they mean the same; or say in its "
        "`best` what a right answer earns."
    )


def read(subject: Subject) -> Seen:
    """Counts the answers that the task can parse."""
    greedy, sampled = ([one is not None for one in _parsed(subject, i)] for i in (0, 1))
    figure = f"greedy {sum(greedy)} of {len(greedy)}, sampled {sum(sampled)} of {len(sampled)}"
    if _can_be_read(subject):
        return figure, ""
    return f"{figure}; for example {subject.answers[0].texts[0][:80]!r}", (
        "Nearly all rewards will be 0. Use a --prompt-template or --answer-format that the model follows, or train "
        "it with --algo sft first."
    )


def rewards(subject: Subject) -> Seen:
    """Compares the rewards of sampled answers."""
    if not _can_be_read(subject):
        raise Unchecked("hardly an answer can be read")
    values, infos = subject.scored
    terms = {name: infos["rewards"][name] for name in infos["rewards"] if not name.startswith("_")}
    means = ", ".join(f"{name} {one[infos['rewards'][f'_{name}']].mean():.2f}" for name, one in terms.items())
    groups = values.reshape(-1, GROUP)
    differ = int((groups != groups[:, :1]).any(axis=1).sum())
    figure = f"{values.mean():.2f} in the mean: {means}; different within {differ} of {len(groups)} pairs of answers"
    if (values != values[0]).any():
        return figure, ""
    return figure, (
        "All answers have the same reward, which gives no gradient. Use other --rewards, harder or easier samples, or "
        "a higher --temperature."
    )


def cut_off(subject: Subject) -> Seen:
    """Counts the sampled answers that the length limit cuts off."""
    cut = [one.finish_reason == "length" for one in subject.answers[1].completions]
    limit = subject.config.sampling.max_new_tokens
    figure = f"{sum(cut)} of {len(cut)} sampled, at {limit} tokens"
    return figure, f"Give more room: --max-new-tokens {2 * limit}." if np.mean(cut) > TRUNCATED else ""


def _parsed(subject: Subject, which: int) -> list[object]:
    return [subject.task.parse(text) for text in subject.answers[which].texts]


def _can_be_read(subject: Subject) -> bool:
    answers = _parsed(subject, 0) + _parsed(subject, 1)
    return sum(one is not None for one in answers) >= READABLE * len(answers)


def _conventions(subject: Subject) -> dict[CoordinateSpace, Coordinates]:
    """Conventions that the answers may have; "resized" only if an image is resized."""
    found = {space: Coordinates(space) for space in (CoordinateSpace.ORIGINAL, CoordinateSpace.NORM1000)}
    with suppress(ModelError):
        way = Coordinates(CoordinateSpace.RESIZED, resize_rule(subject.agent.folder))
        sizes = [size for sample in subject.samples for size in sample.full_sizes]
        if subject.task.coordinates == way or any(way.shown_size(*size) != size for size in sizes):
            found[CoordinateSpace.RESIZED] = way
    return found


def _overlap(subject: Subject, way: Coordinates) -> Overlap:
    greedy, sampled = _parsed(subject, 0), _parsed(subject, 1)
    answers = [(one, [greedy[i], *sampled[i * GROUP : (i + 1) * GROUP]]) for i, one in enumerate(subject.samples)]
    return overlap(way, answers)

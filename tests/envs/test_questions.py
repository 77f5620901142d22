from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest

from vlmenv.envs.data import questions
from vlmenv.envs.data.questions import VisualQuestions
from vlmenv.envs.data.scenes import COLOURS, SHAPES, Layout, Scene, draw_layout, is_held_out, sample_scene
from vlmenv.envs.data.source import Sample

SUBJECTS = ("choice", "yes_no", "count", "colour", "difference")


class Seen(NamedTuple):
    """A shape as the pixels show it."""

    size: str
    colour: str
    kind: str
    box: tuple[int, int, int, int]


@functools.cache
def samples() -> tuple[Sample, ...]:
    source = VisualQuestions("train")
    return tuple(source.get(index) for index in range(1200))


def asked(subject: str) -> list[Sample]:
    """Some questions of a subject; reading their pixels takes time."""
    return [sample for sample in samples() if sample.subject == subject][:40]


def look(image: np.ndarray) -> list[Seen]:
    """Reads the shapes from the pixels: connected regions of a colour, the kind by the share of the box they fill."""
    seen = []
    for colour, mean in COLOURS.items():
        left = {(int(y), int(x)) for y, x in np.argwhere(np.abs(image.astype(int) - mean).max(axis=2) <= 12)}
        while left:
            region = flood(left)
            ys, xs = zip(*region, strict=True)
            width, height = max(xs) - min(xs) + 1, max(ys) - min(ys) + 1
            filled = len(region) / (width * height)
            kind = next(k for k, least in LEAST_FILLED.items() if filled >= least)
            size = "large" if max(width, height) >= 28 else "small"
            seen.append(Seen(size, colour, kind, (min(xs), min(ys), max(xs) + 1, max(ys) + 1)))
    return seen


LEAST_FILLED = {"square": 0.99, "circle": 0.7, "triangle": 0.46, "star": 0.2}


def flood(left: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Takes one connected region out of a set of pixels."""
    region = [left.pop()]
    for y, x in region:
        for neighbour in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
            if neighbour in left:
                left.remove(neighbour)
                region.append(neighbour)
    return region


def meant(expression: str, shapes: list[Seen]) -> Seen:
    """The one shape that an expression fits."""
    words = expression.split()
    fitting = [s for s in shapes if all(w in s[:3] for w in words if w in {*COLOURS, *SHAPES, "small", "large"})]
    orders = {
        "left-most": lambda s: s.box[0] + s.box[2],
        "right-most": lambda s: -s.box[0] - s.box[2],
        "top-most": lambda s: s.box[1] + s.box[3],
        "bottom-most": lambda s: -s.box[1] - s.box[3],
        "smallest": lambda s: (s.box[2] - s.box[0]) * (s.box[3] - s.box[1]),
        "largest": lambda s: -(s.box[2] - s.box[0]) * (s.box[3] - s.box[1]),
    }
    for word in words:
        if word in orders:
            least = min(map(orders[word], fitting))
            fitting = [s for s in fitting if orders[word](s) == least]
    assert len(fitting) == 1, expression
    return fitting[0]


def options(question: str) -> dict[str, str]:
    """The lettered options of a question."""
    found = dict(re.findall(r"^\((\w)\) (.+)$", question, re.MULTILINE))
    assert list(found) == list("ABCD")
    assert len(set(found.values())) == 4
    return found


def words_of(pattern: str, question: str) -> tuple[str, ...]:
    """What stands in the groups of a pattern that matches the first line of a question."""
    match = re.fullmatch(pattern, question.partition("\n")[0])
    assert match is not None, question
    return match.groups()


def test_the_same_index_gives_the_same_question() -> None:
    first, second = VisualQuestions("train"), VisualQuestions("train")
    for index in (0, 1, 2, 3, 2**62 - 1):
        one, other = first.get(index), second.get(index)
        assert (one.id, one.question, one.target, one.rationale, one.subject) == (
            f"question-train-{index}",
            other.question,
            other.target,
            other.rationale,
            other.subject,
        )
        np.testing.assert_array_equal(one.images, other.images)
    assert VisualQuestions("eval").get(3).id == "question-eval-3"
    assert first.size is None


@pytest.mark.slow
def test_every_subject_occurs_with_its_images() -> None:
    counted = Counter(sample.subject for sample in samples())
    assert set(counted) == set(SUBJECTS)
    assert min(counted.values()) > 180
    for sample in samples():
        assert len(sample.images) == (2 if sample.subject == "difference" else 1)
        assert all(image.dtype == np.uint8 and image.shape == (96, 96, 3) for image in sample.images)


def test_choices_of_a_colour_or_a_kind_are_right() -> None:
    looked = [sample for sample in asked("choice") if sample.question.startswith(("What colour", "What kind"))]
    assert len(looked) > 15
    for sample in looked:
        about, expression = words_of(r"What (colour|kind) (?:of shape )?is (the .+)\?", sample.question)
        values = {"colour": COLOURS, "kind": SHAPES}[about]
        assert not set(expression.split()) & set(values), "the question gives its answer away"
        shape = meant(expression, look(sample.images[0]))
        assert options(sample.question)[sample.target.text] == getattr(shape, about)
        assert sample.target.kind == "choice"
        assert sample.rationale == f"It is the {' '.join(shape[:3])}."


def test_wrong_colours_are_those_of_other_shapes_first() -> None:
    for sample in asked("choice"):
        if sample.question.startswith("What colour"):
            there = {shape.colour for shape in look(sample.images[0])}
            assert len(there & set(options(sample.question).values())) == min(4, len(there))


def test_just_one_of_the_offered_shapes_is_there() -> None:
    looked = [sample for sample in asked("choice") if sample.question.startswith("Which of these")]
    assert len(looked) > 10
    for sample in looked:
        there = {shape[1:3] for shape in look(sample.images[0])}
        right = [letter for letter, shape in options(sample.question).items() if tuple(shape.split()[1:]) in there]
        assert right == [sample.target.text]


def test_yes_and_no_are_right_and_no_is_a_near_miss() -> None:
    for sample in asked("yes_no"):
        article, colour, kind = words_of(r"Is there (an?) (\w+) (\w+)\?", sample.question)
        assert (article == "an") == (colour == "orange")
        there = {shape[1:3] for shape in look(sample.images[0])}
        assert sample.target[:2] == ("yes" if (colour, kind) in there else "no", "yes_no")
        colours, kinds = {shape[0] for shape in there}, {shape[1] for shape in there}
        if sample.target.text == "no":
            near = colour in colours and kind in kinds
            assert near == (len(there) < len(colours) * len(kinds))
            assert colour in colours or kind in kinds


def test_counts_are_right() -> None:
    counts: Counter[int] = Counter()
    for sample in asked("count"):
        (noun,) = words_of(r"How many (.+)s are there\?", sample.question)
        wanted = [word for word in noun.split() if word != "shape"]
        number = sum(all(word in shape[1:3] for word in wanted) for shape in look(sample.images[0]))
        assert sample.target[:2] == (str(number), "numeric")
        assert sample.rationale.endswith(f"so {number}.")
        counts[number] += 1
    assert {0, 1, 2, 3, 4} <= set(counts)


def test_colours_are_right() -> None:
    expressions = set()
    for sample in asked("colour"):
        (expression,) = words_of(r"What colour is (the .+)\?", sample.question)
        shape = meant(expression, look(sample.images[0]))
        assert not set(expression.split()) & set(COLOURS), "the question gives its answer away"
        assert sample.target[:2] == (shape.colour, "exact")
        expressions.add(expression)
    assert len(expressions) > 15


@pytest.mark.slow
def test_changes_are_right_and_nothing_else_changes() -> None:
    for sample in asked("difference"):
        first, second = map(look, sample.images)
        change, changed = compare(set(first), set(second))
        if sample.target.kind == "choice":
            assert options(sample.question)[sample.target.text] == SAID[change]
        else:
            assert sample.question == "Do both images show the same shapes in the same places?"
            assert sample.target[:2] == ("yes" if change == "nothing" else "no", "yes_no")
        touched = np.zeros((96, 96), dtype=bool)
        for x1, y1, x2, y2 in (shape.box for shape in changed):
            touched[y1:y2, x1:x2] = True
        differing = (sample.images[0] != sample.images[1]).any(axis=2)
        assert not (differing & ~touched).any()


SAID = {
    "removed": "a shape was removed",
    "added": "a shape was added",
    "recoloured": "a shape changed its colour",
    "moved": "a shape moved",
    "nothing": "nothing changed",
}


def compare(first: set[Seen], second: set[Seen]) -> tuple[str, list[Seen]]:
    """What happened to which shapes; fails if more than one thing did."""
    gone, come = list(first - second), list(second - first)
    if gone and come:
        (old,), (new,) = gone, come
        if old._replace(colour=new.colour) == new:
            return "recoloured", [old, new]
        assert old[:3] == new[:3]
        shift = np.array(new.box) - old.box
        assert set(shift[:2]) == set(shift[2:])
        assert np.abs(shift).max() >= 12
        return "moved", [old, new]
    assert len(gone) + len(come) <= 1
    return ("removed" if gone else "added" if come else "nothing"), gone + come


def test_answers_are_evenly_spread() -> None:
    seen = samples()
    letters = Counter(sample.target.text for sample in seen if sample.target.kind == "choice")
    assert set(letters) == set("ABCD")
    assert min(letters.values()) > 0.2 * letters.total()
    assert max(letters.values()) < 0.3 * letters.total()
    for subject in ("yes_no", "difference"):
        answers = Counter(s.target.text for s in seen if (s.subject, s.target.kind) == (subject, "yes_no"))
        assert abs(answers["yes"] / answers.total() - 0.5) < 0.1
    changes = Counter(
        options(s.question)[s.target.text] for s in seen if (s.subject, s.target.kind) == ("difference", "choice")
    )
    assert set(changes) == set(SAID.values())
    assert min(changes.values()) > 0.1 * changes.total()
    counts = Counter(sample.target.text for sample in seen if sample.subject == "count")
    assert 0.15 < counts["0"] / counts.total() < 0.4


@pytest.mark.parametrize("split", ["train", "eval"])
def test_all_that_is_shown_belongs_to_the_stream(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scenes of `sample_scene` do; both images of a pair must too."""
    asked_of, layouts = set(), []

    def draw(layout: Layout, rng: np.random.Generator) -> Scene:
        layouts.append(layout)
        return draw_layout(layout, rng)

    def sample(of: Any, *args: Any) -> Any:
        asked_of.add(of)
        return sample_scene(of, *args)

    monkeypatch.setattr(questions, "draw_layout", draw)
    monkeypatch.setattr(questions, "sample_scene", sample)
    for index in range(150):
        VisualQuestions(split).get(index)
    assert asked_of == {split}
    assert len(layouts) > 30
    assert {is_held_out(layout) for layout in layouts} == {split == "eval"}


def test_questions_are_many() -> None:
    contents = {(s.question, *(image.tobytes() for image in s.images)) for s in samples()}
    assert len(contents) == len(samples())

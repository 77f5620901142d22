"""Questions about the built-in scenes with exact answers: choices, yes or no, counts, colours, and changes.

The training and the evaluation stream are endless and disjoint, as those of the scenes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, TypeVar

import numpy as np

from vlmenv.core.answers import Answer
from vlmenv.core.spaces import Image
from vlmenv.envs.data.scenes import (
    COLOURS,
    SHAPES,
    Layout,
    Placed,
    Scene,
    Scenes,
    Shape,
    Split,
    choose_group,
    choose_reference,
    draw_layout,
    find_place,
    is_held_out,
    list_shapes,
    sample_layout,
    sample_scene,
)
from vlmenv.envs.data.source import Sample

CHANGES: Final = {
    "removed": "a shape was removed",
    "added": "a shape was added",
    "recoloured": "a shape changed its colour",
    "moved": "a shape moved",
    "nothing": "nothing changed",
}
"""What may happen to a scene, and how an answer says it."""

_COUNTS = (2, 6)
_LETTERS = "ABCD"
_SHIFT = 12  # pixels by which a shape moves at least

_T = TypeVar("_T")


class _Question(NamedTuple):
    images: tuple[Image, ...]
    text: str
    answer: Answer
    rationale: str


class VisualQuestions(Scenes):
    """Built-in scenes, each with one question; two scenes where it asks for their difference."""

    stream = 1

    def get(self, index: int) -> Sample:
        rng = self.rng(index)
        subject = _pick(list(_ASK), rng)
        images, text, answer, rationale = _ASK[subject](self.split, rng)
        return Sample(f"question-{self.split}-{index}", images, text, answer, rationale, subject)


def _ask_choice(split: Split, rng: np.random.Generator) -> _Question:
    return _pick((_choose_colour, _choose_kind, _choose_present), rng)(split, rng)


def _choose_colour(split: Split, rng: np.random.Generator) -> _Question:
    scene, expression, shape = _described(split, rng, COLOURS)
    there = {other.colour for other in scene.shapes}
    wrong = _nearest([c for c in COLOURS if c != shape.colour], lambda colour: colour in there, rng)
    text, answer = offer(f"What colour is {expression}?", shape.colour, wrong, rng)
    return _Question((scene.image,), text, answer, f"It is the {shape}.")


def _choose_kind(split: Split, rng: np.random.Generator) -> _Question:
    scene, expression, shape = _described(split, rng, SHAPES)
    wrong = [kind for kind in SHAPES if kind != shape.kind]
    text, answer = offer(f"What kind of shape is {expression}?", shape.kind, wrong, rng)
    return _Question((scene.image,), text, answer, f"It is the {shape}.")


def _choose_present(split: Split, rng: np.random.Generator) -> _Question:
    scene = _scene(split, rng)
    shape = _pick(scene.shapes, rng)
    right = _one(shape.colour, shape.kind)
    text, answer = offer("Which of these is in the image?", right, _near_misses(scene, rng), rng)
    return _Question((scene.image,), text, answer, f"There is the {shape}.")


def _ask_yes_no(split: Split, rng: np.random.Generator) -> _Question:
    scene = _scene(split, rng)
    shape = _pick(scene.shapes, rng)
    yes = bool(rng.integers(2))
    asked = _one(shape.colour, shape.kind) if yes else _near_misses(scene, rng)[0]
    answer = Answer("yes" if yes else "no", "yes_no")
    return _Question((scene.image,), f"Is there {asked}?", answer, f"There is {list_shapes(scene.shapes)}.")


def _ask_count(split: Split, rng: np.random.Generator) -> _Question:
    scene = _scene(split, rng)
    noun, group = choose_group(scene.shapes, rng)
    number = len(group)
    rationale = f"There is {list_shapes(group)}, so {number}."
    return _Question((scene.image,), f"How many {noun} are there?", Answer(str(number), "numeric"), rationale)


def _ask_colour(split: Split, rng: np.random.Generator) -> _Question:
    scene, expression, shape = _described(split, rng, COLOURS)
    answer = Answer(shape.colour, "exact")
    return _Question((scene.image,), f"What colour is {expression}?", answer, f"It is the {shape}.")


def _ask_difference(split: Split, rng: np.random.Generator) -> _Question:
    return _pick((_choose_change, _ask_whether_same), rng)(split, rng)


def _choose_change(split: Split, rng: np.random.Generator) -> _Question:
    change = _pick(list(CHANGES), rng)
    wrong = [str(said) for said in rng.permutation([said for name, said in CHANGES.items() if name != change])]
    text, answer = offer("What changed from the first image to the second?", CHANGES[change], wrong[:3], rng)
    images, rationale = _pair(split, change, rng)
    return _Question(images, text, answer, rationale)


def _ask_whether_same(split: Split, rng: np.random.Generator) -> _Question:
    same = bool(rng.integers(2))
    change = "nothing" if same else _pick([name for name in CHANGES if name != "nothing"], rng)
    images, rationale = _pair(split, change, rng)
    text = "Do both images show the same shapes in the same places?"
    return _Question(images, text, Answer("yes" if same else "no", "yes_no"), rationale)


_ASK: Final[dict[str, Callable[[Split, np.random.Generator], _Question]]] = {
    "choice": _ask_choice,
    "yes_no": _ask_yes_no,
    "count": _ask_count,
    "colour": _ask_colour,
    "difference": _ask_difference,
}


def _scene(split: Split, rng: np.random.Generator) -> Scene:
    return sample_scene(split, int(rng.integers(2**62)), _COUNTS)[0]


def _described(split: Split, rng: np.random.Generator, unsaid: Iterable[str]) -> tuple[Scene, str, Shape]:
    """A scene, and an expression for one of its shapes that says none of some words."""
    while True:
        scene = _scene(split, rng)
        reference = choose_reference(scene, rng)
        if not set(unsaid) & set(reference.expression.split()):
            return scene, reference.expression, reference.target


def _pair(split: Split, change: str, rng: np.random.Generator) -> tuple[tuple[Image, ...], str]:
    """Two images, the second with one change or none, and words for it."""
    before, after = _layouts(split, change, rng)
    seed = int(rng.integers(2**32))  # the same tints in both
    images = tuple(draw_layout(layout, np.random.default_rng(seed)).image for layout in (before, after))
    shape = " ".join(max(before, after, key=len)[-1][:3])
    return images, f"I see that {CHANGES[change].replace('a shape', f'the {shape}')}."


def _layouts(split: Split, change: str, rng: np.random.Generator) -> tuple[Layout, Layout]:
    """The layouts before and after a change, both of the stream."""
    while True:
        before, after = _vary(sample_layout(rng, _COUNTS), change, rng)
        of_stream = is_held_out(before) == is_held_out(after) == (split == "eval")
        if of_stream and (before == after) == (change == "nothing"):
            return before, after


def _vary(layout: Layout, change: str, rng: np.random.Generator) -> tuple[Layout, Layout]:
    """The layout before and after a change to its last shape; they are equal where there is no place to move to."""
    *others, last = layout
    rest = tuple(others)
    match change:
        case "removed":
            return layout, rest
        case "added":
            return rest, layout
        case "recoloured":
            return layout, (*rest, _recolour(last, rng))
        case "moved":
            return layout, (*rest, _move(last, rest, rng))
    return layout, layout


def _recolour(shape: Placed, rng: np.random.Generator) -> Placed:
    return (shape[0], _pick([colour for colour in COLOURS if colour != shape[1]], rng), *shape[2:])


def _move(shape: Placed, others: Layout, rng: np.random.Generator) -> Placed:
    size, colour, kind, x, y, width, height = shape
    place = find_place(rng, width, height, others)
    if place is None or max(abs(place[0] - x), abs(place[1] - y)) < _SHIFT:
        return shape
    return (size, colour, kind, *place, width, height)


def _near_misses(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Three shapes that are not there, of colours and kinds that are there, where that can be."""
    there = {(shape.colour, shape.kind) for shape in scene.shapes}
    colours, kinds = ({pair[i] for pair in there} for i in range(2))
    absent = [(colour, kind) for colour in COLOURS for kind in SHAPES if (colour, kind) not in there]
    nearest = _nearest(absent, lambda pair: (pair[0] in colours) + (pair[1] in kinds), rng)
    return [_one(colour, kind) for colour, kind in nearest]


def _nearest(wrong: Sequence[_T], nearness: Callable[[_T], int], rng: np.random.Generator) -> list[_T]:
    """Three of the wrong answers, the nearest first, equals in random order."""
    shuffled = [wrong[i] for i in rng.permutation(len(wrong))]
    return sorted(shuffled, key=nearness, reverse=True)[: len(_LETTERS) - 1]


def offer(question: str, right: str, wrong: Sequence[str], rng: np.random.Generator) -> tuple[str, Answer]:
    """A question with lettered options in random order, and the letter of the right one."""
    options = [str(option) for option in rng.permutation([right, *wrong])]
    lines = [f"({letter}) {option}" for letter, option in zip(_LETTERS, options, strict=True)]
    return "\n".join([question, *lines]), Answer(_LETTERS[options.index(right)], "choice")


def _pick(items: Sequence[_T], rng: np.random.Generator) -> _T:
    return items[int(rng.integers(len(items)))]


def _one(colour: str, kind: str) -> str:
    return f"{'an' if colour == 'orange' else 'a'} {colour} {kind}"

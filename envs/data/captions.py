"""Built-in scenes to describe, each with a question to answer besides."""

from __future__ import annotations

from typing import Final

from vlmenv.core.answers import Answer, Caption
from vlmenv.envs.data.scenes import COLOURS, SHAPES, SIDE, Scene, Scenes, Shape, references, sample_scene
from vlmenv.envs.data.source import Sample

QUESTION: Final = "Describe the image. Then answer: {question}"
PLACES: Final = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the centre", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
"""What the ninths of a scene are called, by row and column."""


class CaptionScenes(Scenes):
    """Built-in scenes to describe; the questions are for numbers and colours of shapes."""

    def get(self, index: int) -> Sample:
        scene, rng = sample_scene(self.split, index)
        asked = questions(scene)
        question, answer = asked[rng.integers(len(asked))]
        return Sample(
            f"caption-{self.split}-{index}",
            (scene.image,),
            QUESTION.format(question=question),
            Caption(keywords(scene), answer),
            describe(scene),
            "caption",
        )


def describe(scene: Scene) -> str:
    """All shapes from left to right, such as "a large red circle on the left and a small blue star at the top"."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.box[0] + shape.box[2])
    told = [f"a {shape} {place(shape)}" for shape in shapes]
    return " and ".join([", ".join(told[:-1]), told[-1]]) if len(told) > 1 else told[0]


def place(shape: Shape) -> str:
    """The ninth of the scene in which the middle of a shape lies, such as "at the top left"."""
    x1, y1, x2, y2 = shape.box
    column, row = (int(3 * (low + high) / 2 / SIDE) for low, high in ((x1, x2), (y1, y2)))
    return PLACES[row][column]


def keywords(scene: Scene) -> tuple[str, ...]:
    """The colours and the kinds of the shapes, each once."""
    colours, kinds = ({getattr(shape, name) for shape in scene.shapes} for name in ("colour", "kind"))
    return (*(colour for colour in COLOURS if colour in colours), *(kind for kind in SHAPES if kind in kinds))


def questions(scene: Scene) -> list[tuple[str, Answer]]:
    """Questions that have one right answer, with it."""
    counts = [("shapes", len(scene.shapes))]
    counts += [(f"{kind}s", sum(shape.kind == kind for shape in scene.shapes)) for kind in SHAPES]
    colours = [
        (f"what colour is {reference.expression}?", Answer(reference.target.colour, "exact"))
        for reference in references(scene)
        if reference.target.colour not in reference.expression
    ]
    return [(f"how many {noun} are there?", Answer(str(count), "numeric")) for noun, count in counts] + colours

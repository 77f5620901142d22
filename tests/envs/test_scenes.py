from __future__ import annotations

import numpy as np
import pytest

from vlmenv.envs.data.scenes import COLOURS, Scene, Shape, choose_reference, references, sample_scene


def scenes(split: str, count: int) -> list[Scene]:
    return [sample_scene(split, index)[0] for index in range(count)]  # type: ignore[arg-type]


def test_the_same_index_gives_the_same_scene() -> None:
    first, rng = sample_scene("train", 7)
    second, again = sample_scene("train", 7)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.shapes == second.shapes
    assert choose_reference(first, rng) == choose_reference(second, again)


def test_training_and_evaluation_scenes_never_coincide() -> None:
    """Positions aside there are few layouts, so that without the split by content some would coincide."""
    train = {repr(sample_scene("train", i, counts=(1, 1))[0].shapes) for i in range(4000)}
    held_out = {repr(sample_scene("eval", i, counts=(1, 1))[0].shapes) for i in range(4000)}
    assert not train & held_out


@pytest.mark.parametrize("index", range(30))
def test_a_box_bounds_exactly_the_pixels_of_its_shape(index: int) -> None:
    scene, _ = sample_scene("train", index)
    covered = np.zeros(scene.image.shape[:2], dtype=bool)
    for shape in scene.shapes:
        x1, y1, x2, y2 = map(int, shape.box)
        inside = scene.image[y1:y2, x1:x2].reshape(-1, 3).astype(int)
        own = np.abs(inside - COLOURS[shape.colour]).max(axis=1).reshape(y2 - y1, x2 - x1) <= 12
        for edge in (own[0], own[-1], own[:, 0], own[:, -1]):
            assert edge.any()
        assert not covered[y1:y2, x1:x2].any()
        covered[y1:y2, x1:x2] = True
    background = scene.image[~covered]
    assert (background == background[0]).all()


def test_sizes_are_told_apart() -> None:
    for scene in scenes("train", 100):
        for shape in scene.shapes:
            longest = max(shape.box[2] - shape.box[0], shape.box[3] - shape.box[1])
            assert (longest >= 28) == (shape.size == "large")


def test_every_expression_means_exactly_one_shape() -> None:
    """Checks them by reading their words, independently of how they were made."""
    for scene in scenes("eval", 60):
        for reference in references(scene):
            assert understand(reference.expression, scene.shapes) == [reference.target], reference.expression


def understand(expression: str, shapes: tuple[Shape, ...]) -> list[Shape]:
    words = expression.split()
    assert words[0] == "the"
    nouns = [word for word in words[1:] if word in {*COLOURS, "circle", "square", "triangle", "star", "small", "large"}]
    fitting = [s for s in shapes if all(noun in (s.size, s.colour, s.kind) for noun in nouns)]
    orders = {
        "left-most": lambda s: s.box[0] + s.box[2],
        "right-most": lambda s: -(s.box[0] + s.box[2]),
        "top-most": lambda s: s.box[1] + s.box[3],
        "bottom-most": lambda s: -(s.box[1] + s.box[3]),
        "smallest": lambda s: (s.box[2] - s.box[0]) * (s.box[3] - s.box[1]),
        "largest": lambda s: -(s.box[2] - s.box[0]) * (s.box[3] - s.box[1]),
    }
    for word, order in orders.items():
        if word in words:
            least = min(map(order, fitting))
            return [s for s in fitting if order(s) == least]
    return fitting


def test_all_kinds_of_expressions_occur() -> None:
    chosen = [choose_reference(*sample_scene("train", i)) for i in range(300)]
    assert {reference.kind for reference in chosen} == {"colour", "shape", "both", "size", "relation"}
    assert len({reference.expression for reference in chosen}) > 60

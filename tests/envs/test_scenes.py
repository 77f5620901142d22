from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmenv.envs.data.scenes import COLOURS, Scene, Shape, choose_reference, is_held_out, references, sample_scene


def scenes(split: Any, count: int, counts: tuple[int, int] = (2, 4)) -> list[Scene]:
    return [sample_scene(split, index, counts)[0] for index in range(count)]


def test_the_same_index_gives_the_same_scene() -> None:
    first, rng = sample_scene("train", 7)
    second, again = sample_scene("train", 7)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.shapes == second.shapes
    assert choose_reference(first, rng) == choose_reference(second, again)


@pytest.mark.slow
def test_training_and_evaluation_scenes_never_coincide() -> None:
    """With one small shape a scene, so few are possible that some coincide within a stream."""
    train = [frozenset(scene.shapes) for scene in scenes("train", 4_000, (1, 1))]
    held_out = [frozenset(scene.shapes) for scene in scenes("eval", 4_000, (1, 1))]
    assert len(set(train)) < len(train)
    assert not set(train) & set(held_out)


def test_the_order_in_which_shapes_are_drawn_does_not_decide_the_stream() -> None:
    layout = (("small", "red", "star", 1, 1, 16, 16), ("large", "blue", "circle", 40, 40, 30, 30))
    assert is_held_out(layout) == is_held_out(layout[::-1])
    assert 0.2 < np.mean([is_held_out(((*layout[0][:3], x, y, 16, 16),)) for x in range(40) for y in range(40)]) < 0.3


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

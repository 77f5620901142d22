"""Places that answers name: read, written, and converted in prompt, score and picture alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmenv.cli import main
from vlmenv.core.answers import NONE, Detection, parse_places, parse_point, write_point
from vlmenv.core.coordinates import Box, ResizeRule
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.envs import (
    BOX,
    BOXES,
    DETECTIONS,
    POINT,
    POINTS,
    Geometry,
    Sample,
    Source,
    VisualTaskEnv,
    format_reward,
    register_task,
    self_check,
)
from vlmenv.envs.data.boxes import turned
from vlmenv.envs.geometry import changed_place, convert, labelled_places, places

WIDTH, HEIGHT = 100, 50


class OneImage(Source):
    """Samples on one white image, 100 x 50."""

    def __init__(self, *targets: Any) -> None:
        self.targets, self.size = targets, len(targets)

    def get(self, index: int) -> Sample:
        image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
        return Sample(f"sample-{index}", (image,), "Point at it.", self.targets[index])


def hit(text: str, target: Any, prediction: Any) -> float:
    if prediction is None or NONE in (prediction, target):
        return float(prediction == target)
    (x, y), (x1, y1, x2, y2) = prediction, target
    return float(x1 <= x <= x2 and y1 <= y <= y2)


class PointEnv(VisualTaskEnv):
    terms = {"hit": hit, "format": format_reward}  # noqa: RUF012
    default_rewards = {"hit": 1.0, "format": 0.1}  # noqa: RUF012
    prompt_template = "{question} Answer as {answer} in {coordinates}."
    geometry = POINT


WAYS: dict[str, tuple[dict[str, Any], tuple[int, int], str]] = {
    "original": ({}, (100, 50), "pixels"),
    "resized": ({"resize": ResizeRule(factor=30)}, (90, 60), "pixels"),
    "norm1000": ({}, (1000, 1000), "coordinates from 0 to 1000"),
}
"""A convention's options, the coordinates of the lower right corner by hand, and what the prompt says."""


@pytest.mark.parametrize("way", WAYS)
def test_a_point_is_asked_for_and_scored_in_one_convention(way: str) -> None:
    options, (right, bottom), told = WAYS[way]
    source = OneImage((20.0, 10.0, 40.0, 20.0), NONE)
    env = PointEnv(dataset=source, coordinates=way, render_mode="rgb_array", **options)
    observation, _ = env.reset(options={"index": 0})
    assert observation["prompt"].endswith(f"<answer>[x,y]</answer> in {told}.")
    assert env.target(source.get(0)) == pytest.approx((0.2 * right, 0.2 * bottom, 0.4 * right, 0.4 * bottom))
    for x, y, inside in ((0.3, 0.3, 1), (0.21, 0.39, 1), (0.45, 0.3, 0), (0.3, 0.45, 0)):
        env.reset(options={"index": 0})
        _, _, _, _, info = env.step(f"<think></think><answer>[{x * right:.2f}, {y * bottom:.2f}]</answer>")
        assert info["rewards"] == {"hit": inside, "format": 1}
        assert info["prediction"] == pytest.approx((x * right, y * bottom), abs=0.01)
        picture = env.render()
        assert picture is not None
        scale = picture.shape[0] // HEIGHT
        drawn = np.argwhere((picture == (213, 94, 0)).all(axis=2))
        assert drawn.mean(axis=0) == pytest.approx((y * HEIGHT * scale, x * WIDTH * scale), abs=scale)
    assert env.write_answer(source.get(0)).endswith(f"[{0.3 * right:.0f},{0.3 * bottom:.0f}]</answer>")
    assert env.write_answer(source.get(1)).endswith("None</answer>")
    assert self_check(env) == []


@pytest.mark.parametrize(
    ("geometry", "target", "written"),
    [
        (POINT, (20.0, 10.0), "[200,200]"),
        (POINTS, ((20.0, 10.0), (50.0, 25.0)), "[[200,200],[500,500]]"),
        (POINTS, (), "None"),
        (BOX, (20.0, 10.0, 40.0, 20.0), "[200,200,400,400]"),
        (BOXES, ((20.0, 10.0, 40.0, 20.0), (0.0, 0.0, 100.0, 50.0)), "[[200,200,400,400],[0,0,1000,1000]]"),
        (
            DETECTIONS,
            (Detection("a", (20.0, 10.0, 40.0, 20.0)), Detection("b", (0.0, 0.0, 9.0, 9.0), crowd=True)),
            '```json\n[{"bbox_2d": [200, 200, 400, 400], "label": "a"}]\n```',
        ),
    ],
)
def test_each_geometry_converts_writes_and_reads(geometry: Geometry, target: Any, written: str) -> None:
    class Task(PointEnv):
        pass

    Task.geometry = geometry
    env, source = Task(dataset=OneImage(target), coordinates="norm1000"), OneImage(target)
    assert env.write_answer(source.get(0)) == f"<think></think><answer>{written}</answer>"
    read = env.parse(env.write_answer(source.get(0)))
    kept = tuple(one for one in target if not getattr(one, "crowd", False)) if geometry is DETECTIONS else target
    pixels = convert(read, lambda place: env.coordinates.to_pixels(place, WIDTH, HEIGHT))
    assert list(places(pixels)) == list(places(kept))
    assert env.draw(source.get(0), read).shape == (7 * HEIGHT, 7 * WIDTH, 3)


def test_rows_hold_places() -> None:
    rows = [{"image": np_image(), "question": "?", "answer": answer} for answer in ([10, 10], [10, 10, 30, 30], "None")]
    env = PointEnv(dataset=rows)
    assert [env.source.get(i).target for i in range(3)] == [(10, 10), (10, 10, 30, 30), NONE]
    with pytest.raises(DataError, match=r"'\[1, 2, 3\]' is neither one point \[x, y\], nor one box"):
        PointEnv(dataset=[rows[0] | {"answer": [1, 2, 3]}])


def np_image() -> Any:
    from PIL import Image

    return Image.new("RGB", (WIDTH, HEIGHT), "white")


def test_coordinates_without_geometry_are_refused() -> None:
    class Plain(PointEnv):
        geometry = None

    with pytest.raises(ConfigError, match=r"Plain declares no geometry.*set geometry = POINT"):
        Plain(dataset=OneImage((1.0, 2.0)))
    assert Plain(dataset=OneImage((1.0, 2.0)), prompt_template="{question}").target(OneImage((1.0, 2.0)).get(0)) == (
        1,
        2,
    )
    with pytest.raises(ConfigError, match="declares no geometry"):
        Plain(dataset=OneImage((1.0, 2.0)), prompt_template="{question} {coordinates}")

    class Blind(PointEnv):
        needs_image = False

    with pytest.raises(ConfigError, match="leave needs_image True"):
        Blind(dataset=OneImage((1.0, 2.0)))


def test_a_sample_without_an_image_is_named() -> None:
    env = PointEnv(dataset=OneImage((1.0, 2.0)))
    with pytest.raises(DataError, match="sample s has no image"):
        env.target(Sample("s", (), "?", (1.0, 2.0)))


class Named(NamedTuple):
    label: str
    corners: tuple[float, ...]
    count: int


def double(place: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(2 * value for value in place)


def test_places_are_found_at_any_depth() -> None:
    truth = {"a": [Named("cat", (1, 2, 3, 4, 5, 6), 7), None], "b": ((1.5, 2), "None", 3, [])}
    assert convert(truth, double) == {
        "a": [Named("cat", (2, 4, 6, 8, 10, 12), 7), None],
        "b": ((3.0, 4), "None", 3, []),
    }
    assert list(places(truth)) == [(1, 2, 3, 4, 5, 6), (1.5, 2)]


@pytest.mark.parametrize(
    ("truth", "message"), [((1, 2, 3), "3 numbers"), (np.zeros(2), "not of ndarray"), ([{1, 2}], "not of set")]
)
def test_what_cannot_be_converted_is_refused(truth: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(truth, double)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2]", (1, 2)),
        ('```json\n{"point_2d": [1.5, 2.25], "label": "cat"}\n```', (1.5, 2.25)),
        ("None", NONE),
        ("[1, 2] [3, 4]", None),
        ("[1, 2, 3, 4]", None),
        ("[1]", None),
        ("[99999, 1]", None),
        ("", None),
        ("[NaN, 1]", None),
        ("[" * 200_000, None),
    ],
)
def test_points_are_read(content: str, expected: Any) -> None:
    assert parse_point(content) == expected


def test_one_bad_place_spoils_the_list() -> None:
    assert parse_places("[[1,2,3,4],[5,6,7,8]]", 4) == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert parse_places("[[1,2,3,4],[5,6,7]]", 4) is None
    assert parse_places("[[1,2,3,4],[7,6,5,8]]", 4) is None
    assert parse_places("[]", 2) == ()


@given(st.tuples(st.floats(0, 900), st.floats(0, 900), st.floats(0.02, 90), st.floats(0.02, 90)))
def test_the_point_that_is_written_for_a_box_is_in_it(edges: tuple[float, float, float, float]) -> None:
    x, y, width, height = edges
    point = parse_point(write_point((x, y, x + width, y + height)))
    assert isinstance(point, tuple)
    assert x <= point[0] <= x + width
    assert y <= point[1] <= y + height


@given(st.text(st.characters()) | st.text("[](){},.0123456789eE-+ None\n", max_size=200))
def test_no_text_raises(text: str) -> None:
    for geometry in (POINT, POINTS, BOX, BOXES, DETECTIONS):
        geometry.read(text)


def test_points_of_a_data_set_are_scaled_as_boxes_are() -> None:
    rows = [{"image": np_image(), "question": "?", "answer": answer} for answer in ([500, 200], [0, 0, 500, 500])]
    env = PointEnv(dataset=rows, boxes_in="norm1000")
    assert [env.source.get(i).target for i in range(2)] == [(50, 10), (0, 0, 50, 25)]


def test_points_turn_with_their_image() -> None:
    """The box between two turned points is the turned box."""
    box = (10.0, 20.0, 30.0, 45.0)
    for orientation in range(1, 9):

        def change(edges: Box, orientation: int = orientation) -> Box:
            return turned(edges, orientation, (WIDTH, HEIGHT))

        x1, y1, x2, y2, x3, y3 = changed_place((*box, 10.0, 45.0), change)
        assert (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) == changed_place(box, change) == change(box)
        assert {x3} < {x1, x2}
        assert {y3} < {y1, y2}


class NearEnv(PointEnv):
    """The truth is a point."""

    terms = {"near": lambda text, target, prediction: float(prediction == target)}  # noqa: RUF012
    default_rewards = {"near": 1.0}  # noqa: RUF012


def test_data_check_takes_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np_image().save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "question": "?", "answer": [10, 10]}')
    register_task("Test-Point-v0", "test_geometry:NearEnv")
    try:
        main(["data", "check", str(tmp_path / "rows.jsonl"), "--env", "Test-Point-v0", "--decode"])
    finally:
        del gymnasium.registry["Test-Point-v0"]
    assert "good" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ((1, 2, 3, 4), [("", (1, 2, 3, 4))]),
        (
            (Detection("a", (1, 2, 3, 4)), Detection("b", (5, 6, 7, 8), crowd=True)),
            [("a", (1, 2, 3, 4)), ("b", (5, 6, 7, 8))],
        ),
        ([["a", [1, 2, 3, 4], False, None]], [("a", (1, 2, 3, 4))]),  # the same as JSON holds it
        ({"label": "a", "points": [[1, 2], [3, 4]]}, [("a", (1, 2)), ("a", (3, 4))]),
        (((1, 2), (3, 4)), [("", (1, 2)), ("", (3, 4))]),
        ("None", []),
        (None, []),
        ((), []),
        (3.5, []),
    ],
)
def test_places_have_the_labels_beside_them(value: Any, found: list[Any]) -> None:
    assert list(labelled_places(value)) == found
    if not isinstance(value, str | float | None):
        assert [place for _, place in labelled_places(value)] == list(places(value))

"""The convention of boxes is found from all rows together, and some odd rows decide nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmenv.envs.data.boxes import BoxForm, BoxOrientation
from vlmenv.envs.data.check import BoxedRow, Convention, likely_convention

SHOWN, STORED = BoxOrientation.SHOWN, BoxOrientation.STORED
GIVEN = Convention(None, SHOWN)
SIZES = {
    "small": [(640, 480), (500, 375), (427, 640)],
    "of about 1000": [(1024, 768), (900, 1100)],
    "large": [(1920, 1080), (4032, 3024)],
}


def rows(form: str, sizes: str, count: int = 60, seed: int = 0, turn: int = 1, **changes: Any) -> list[BoxedRow]:
    """Rows whose boxes lie anywhere in their images, as a data set in this form stores them."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        width, height = SIZES[sizes][i % len(SIZES[sizes])]
        numbers = []
        for _ in range(1 + i % 3):
            (x1, x2), (y1, y2) = np.sort(rng.random((2, 2)) * 0.98, axis=1) + np.array([0, 0.02])
            unit = {"fractions": (1, 1), "norm1000": (1000, 1000)}.get(form, (width, height))
            box = np.array([x1, y1, x2, y2]) * [*unit, *unit]
            box = box if form == "fractions" else np.round(box)
            numbers.append(tuple((box - [0, 0, *box[:2]] if form == "xywh" else box).tolist()))
        shown = (width, height) if turn < 5 or changes.get("of") == "shown" else (height, width)
        made.append(BoxedRow(f"row {i}", tuple(numbers), shown, turn, changes.get("told"), BoxForm.XYXY))
    return made


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", BoxForm)
@pytest.mark.parametrize("seed", range(3))
def test_the_form_is_found(form: BoxForm, sizes: str, seed: int) -> None:
    found = likely_convention(rows(form, sizes, seed=seed), GIVEN)
    if form is BoxForm.XYXY:
        assert found is None
    elif (form, sizes) == (BoxForm.NORM1000, "of about 1000"):
        assert found in (None, Convention(form, SHOWN))  # which cannot always be told
    else:
        assert found == Convention(form, SHOWN)
    assert likely_convention(rows(form, sizes, seed=seed), Convention(form, SHOWN)) is None


@pytest.mark.parametrize("form", [BoxForm.XYWH, BoxForm.FRACTIONS, BoxForm.NORM1000])
@pytest.mark.parametrize("sizes", ["small", "large"])
def test_a_wrong_option_is_told(form: BoxForm, sizes: str) -> None:
    found = likely_convention(rows("xyxy", sizes), Convention(form, SHOWN))
    assert found == Convention(BoxForm.XYXY, SHOWN)


@pytest.mark.parametrize("other", [BoxForm.XYWH, BoxForm.FRACTIONS, BoxForm.NORM1000])
@pytest.mark.parametrize("sizes", SIZES)
def test_some_odd_rows_decide_nothing(other: BoxForm, sizes: str) -> None:
    """A tenth of them or less are in another form; they are told one by one."""
    mixed = rows("xyxy", sizes, count=90) + rows(other, sizes, count=9, seed=1)
    assert likely_convention(mixed, GIVEN) is None
    beyond = rows("xyxy", sizes, count=10)
    beyond[3] = beyond[3]._replace(numbers=((10.0, 10.0, 9000.0, 20.0),))
    beyond[4] = beyond[4]._replace(numbers=((10.0, 10.0, 10.0, 20.0),))
    assert likely_convention(beyond, GIVEN) is None
    assert [one.place for one in beyond if GIVEN.misfit(one)] == ["row 3", "row 4"]


def test_small_boxes_in_a_corner_are_no_thousandths() -> None:
    """Though none of them goes beyond 1000: icons of a screen, all on its left."""
    icons = [
        BoxedRow(str(i), ((20.0, 50.0 * i, 60.0, 50.0 * i + 45),), (1920, 1080), 1, None, BoxForm.XYXY)
        for i in range(20)
    ]
    assert likely_convention(icons, GIVEN) is None


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
@pytest.mark.parametrize("sizes", ["small", "large"])
@pytest.mark.parametrize("others", [0, 500])
def test_the_orientation_is_found(turn: int, sizes: str, others: int) -> None:
    """Of the photos that EXIF turns, however few of all these are."""
    whole = rows("xyxy", sizes, count=others)
    stored, shown = (whole + rows("xyxy", sizes, turn=turn, of=of) for of in ("stored", "shown"))
    assert likely_convention(stored, GIVEN) == Convention(None, STORED)
    assert likely_convention(stored, Convention(None, STORED)) is None
    assert likely_convention(shown, GIVEN) is None
    assert likely_convention(shown, Convention(None, STORED)) == GIVEN
    assert likely_convention(whole + rows("xyxy", sizes, turn=turn, told=STORED), GIVEN) is None


def test_both_are_found_at_once() -> None:
    mixed = rows("xywh", "small", count=30) + rows("xywh", "small", turn=6)
    assert likely_convention(mixed, GIVEN) == Convention(BoxForm.XYWH, STORED)


def test_rows_without_boxes_say_nothing() -> None:
    assert likely_convention([], GIVEN) is None
    assert likely_convention([BoxedRow("row 0", (), (640, 480), 1, None, BoxForm.XYXY)], GIVEN) is None


def test_rows_that_go_beyond_their_images_are_not_all_thousandths() -> None:
    """Thousandths would go beyond images of 640 x 480 in most rows; a sixth of them is labelled on other images."""
    beyond = [
        one._replace(numbers=((10.0, 10.0, 900.0, 470.0),)) if i % 6 == 0 else one
        for i, one in enumerate(rows("xyxy", "small"))
    ]
    assert likely_convention(beyond, GIVEN) is None

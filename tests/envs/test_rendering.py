from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlmenv.core.text import visible
from vlmenv.envs.rendering import ANSWERED, RIM, TRUE, draw_places


@pytest.mark.parametrize("size", [(96, 96), (400, 300), (4000, 3000)])
@pytest.mark.parametrize("background", [TRUE, ANSWERED, (255, 255, 255), (0, 0, 0)])
def test_a_box_is_seen_in_a_small_picture_on_any_ground(
    size: tuple[int, int], background: tuple[int, int, int]
) -> None:
    """As in samples.png, where a photo has some 200 pixels."""
    width, height = size
    image = np.full((height, width, 3), background, dtype=np.uint8)
    box = (width / 4, height / 4, width * 3 / 4, height * 3 / 4)
    for colour in (TRUE, ANSWERED):
        small = Image.fromarray(draw_places(image, [("", box, colour)])).resize((200, 150), Image.Resampling.BOX)
        across = np.asarray(small)[75].astype(int)
        assert np.abs(across - background).sum(axis=1).max() > 150
        sides = across[[48, 49, 50, 51, 52]] if background != colour else across[[47, 48, 49]]
        assert np.abs(sides - background).sum(axis=1).max() > 150


def test_labels_are_written_within_the_picture() -> None:
    image = np.full((400, 400, 3), 128, dtype=np.uint8)
    plain = draw_places(image, [("", (0, 0, 399, 399), TRUE)])
    labelled = draw_places(image, [("a cat \u202e", (0, 0, 399, 399), TRUE), ("", (0, 0, 1, 1), TRUE)])
    assert (plain != labelled).any()
    below = draw_places(image, [("cat", (100, 100, 200, 200), ANSWERED)])
    changed = np.argwhere((below != draw_places(image, [("", (100, 100, 200, 200), ANSWERED)])).any(axis=-1))
    assert changed[:, 0].min() >= 200
    assert (below == RIM).all(axis=-1).any()


def test_labels_of_true_places_stand_above_them() -> None:
    image = np.full((400, 400, 3), 128, dtype=np.uint8)
    plain, labelled = (draw_places(image, [(label, (100, 200, 300, 300), TRUE)]) for label in ("", "cat"))
    changed = np.argwhere((plain != labelled).any(axis=-1))
    assert changed[:, 0].max() <= 200


def test_lines_grow_with_the_picture() -> None:
    widths = []
    for side in (400, 1600):
        drawn = draw_places(np.full((side, side, 3), 128, np.uint8), [("", (side // 4,) * 2 + (side // 2,) * 2, TRUE)])
        widths.append(int((drawn[3 * side // 8] == TRUE).all(axis=-1).sum()))
    assert widths[1] >= 3 * widths[0] > 0


def test_labels_are_short_and_visible() -> None:
    image = np.full((400, 400, 3), 128, dtype=np.uint8)
    long, hidden = "i" * 60, "a\u202eb"
    for label, same in ((long, long[:40]), (hidden, visible(hidden))):
        drawn, expected = (draw_places(image, [(text, (0, 50, 9, 60), TRUE)]) for text in (label, same))
        np.testing.assert_array_equal(drawn, expected)

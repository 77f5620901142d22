from __future__ import annotations

import pytest
from growth import growth
from hypothesis import given
from hypothesis import strategies as st

from vlmenv.core.answers import NONE, Target
from vlmenv.envs.rewards.boxes import box_format_reward, iou50_reward, iou_reward

TRUTH = (10.0, 10.0, 30.0, 30.0)


def answered(content: str) -> str:
    return f"<think>t</think><answer>{content}</answer>"


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        (answered("[10,10,30,30]"), TRUTH, 1.0),
        (answered("[10, 10, 30, 20]"), TRUTH, 0.5),
        (answered("[20, 20, 40, 40]"), TRUTH, 100 / 700),
        (answered("[0, 0, 96, 96]"), TRUTH, 400 / 9216),
        (answered("[40, 40, 60, 60]"), TRUTH, 0.0),
        (answered("[30, 10, 50, 30]"), TRUTH, 0.0),
        (answered("None"), NONE, 1.0),
        (answered("None"), TRUTH, 0.0),
        (answered("[10,10,30,30]"), NONE, 0.0),
        (answered(""), NONE, 0.0),
        ("", NONE, 0.0),
        ("None", NONE, 0.0),
        ("[10,10,30,30]", TRUTH, 0.0),
        ("<think><answer>[10,10,30,30]</answer></think>", TRUTH, 0.0),
        (answered("[10,10,30,30]") + "<answer>[10,10,30,30]</answer>", TRUTH, 0.0),
        (answered("[10,10,30,30] [1,1,2,2]"), TRUTH, 0.0),
    ],
)
def test_iou_reward_by_hand(text: str, target: Target, expected: float) -> None:
    assert iou_reward(text, target) == pytest.approx(expected)
    assert iou50_reward(text, target) == float(expected >= 0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (answered("[1,2,3,4]"), 1.0),
        (answered("None"), 1.0),
        (f"\n {answered('[1,2,3,4]')} \n", 1.0),
        (answered("a box"), 0.0),
        ("<answer>[1,2,3,4]</answer>", 0.0),
        ("<think><answer>[1,2,3,4]</answer></think>", 0.0),
    ],
)
def test_format_reward_by_hand(text: str, expected: float) -> None:
    assert box_format_reward(text, TRUTH) == expected


@given(st.text(st.characters()), st.sampled_from([TRUTH, NONE]))
def test_rewards_of_any_text_are_within_their_range(text: str, target: Target) -> None:
    for candidate in (text, answered(text)):
        assert 0 <= iou_reward(candidate, target) <= 1
        assert box_format_reward(candidate, target) in (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [
        "[" * 10**7,
        "[1,2,3,4]" * 10**6,
        "9" * 10**7,
        "[]" * 5 * 10**6,
        "[a]" * 3 * 10**6,
        "<answer>" * 10**6,
        "9^{9^{9^9}}",
    ],
)
def test_scoring_is_quick_whatever_the_text(bomb: str) -> None:
    def score(size: int) -> None:
        for text in (bomb[:size], answered(bomb[:size])):
            iou_reward(text, TRUTH)
            box_format_reward(text, TRUTH)

    for text in (bomb, answered(bomb)):
        assert iou_reward(text, TRUTH) == 0
        assert box_format_reward(text, TRUTH) == 0
    assert growth(score, len(bomb) // 8) < 24

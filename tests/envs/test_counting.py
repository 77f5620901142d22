"""`VLM-Count-v0`: how numbers are read, what they earn, and the layouts of rows."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest
from PIL import Image

from vlmenv.core.errors import DataError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.counting import CountEnv
from vlmenv.envs.data.scenes import sample_scene
from vlmenv.envs.rewards.counts import parse_count

PICTURE = Image.new("RGB", (40, 30))


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ("5", 5),
        ("0", 0),
        ("Five", 5),
        ("none", 0),
        ("There are 12 dogs.", 12),
        ("\\boxed{7}", 7),
        ("1,204", 1204),
        ("3.0", 3),
        ('<points x1="10.5" y1="20" x2="1" y2="2" alt="dogs">dogs</points>', 2),
        ('<point x="10.5" y="20" alt="a dog">a dog</point> <point x="3" y="4">a dog</point>', 2),
        ('<points x1="10" y1="20" x2="1">dogs</points>', None),
        ("There are five dogs.", 5),
        ("five dogs", 5),
        ("The answer is **five**.", 5),
        ("Twenty-five.", 25),
        ("there are thirty two people", 32),
        ("There are none.", 0),
        ("There are no dogs in the image.", 0),
        ("One can see 5 dogs.", 5),
        ("one dog and two cats", None),
        ("five or six", None),
        ("5 or six", None),
        ("at least five", None),
        ("not five", None),
        ("No one of the two.", None),
        ("There are no two alike.", None),
        ("five hundred", 500),
        ("5 or 6", None),
        ("-5", None),
        ("5.5", None),
        ("100000", None),
        ("1e300", None),
        ("many", None),
        ("", None),
    ],
)
def test_numbers_that_are_read(content: str, count: int | None) -> None:
    assert parse_count(content) == count


@pytest.mark.parametrize(
    ("answer", "true", "accuracy", "closeness", "within_one", "error"),
    [
        ("4", 4, 1, 1, 1, 0),
        ("3", 4, 0, 0.75, 1, 1),
        ("6", 4, 0, 0.5, 0, 2),
        ("9", 4, 0, 0, 0, 5),
        ("0", 4, 0, 0, 0, 4),
        ("some", 4, 0, 0, 0, 4),
        ("0", 0, 1, 1, 1, 0),
        ("1", 0, 0, 0, 1, 1),
        ("some", 0, 0, 0, 0, 1),
        ("95", 100, 0, 0.95, 0, 5),
    ],
)
def test_rewards_by_hand(
    answer: str, true: int, accuracy: float, closeness: float, within_one: float, error: float
) -> None:
    env = CountEnv(
        dataset=[{"image": PICTURE, "question": "?", "answer": true}], rewards=dict.fromkeys(CountEnv.terms, 1)
    )
    text = AnswerFormat.TAGS.write(answer)
    score = env.score(text, env.source.get(0))
    assert score.terms == pytest.approx({"accuracy": accuracy, "closeness": closeness, "format": 1})
    measured = env.measure(text, true, score.terms)
    assert [measured[name] for name in ("accuracy", "accuracy_within_1", "error/mean")] == [accuracy, within_one, error]


@pytest.mark.parametrize(
    ("row", "question", "count"),
    [
        (
            {"label": "dogs", "count": 3, "points": {"x": [1.0], "y": [2.0]}},
            "How many dogs are there?",
            3,
        ),  # PixMo-Count
        ({"label": "cows", "count": 0}, "How many cows are there?", 0),
        ({"problem": "How many items?", "solution": "<answer> 5 </answer>"}, "How many items?", 5),  # R1-V's CLEVR
        ({"question": "How many?", "number": "seven", "label": "x", "count": 1}, "How many?", None),
    ],
)
def test_layouts_of_rows(row: dict[str, Any], question: str, count: int | None) -> None:
    columns = {"answer": "number"} if count is None else {}
    env = CountEnv(dataset=[{"image": PICTURE, **row}], columns=columns)
    sample = env.source.get(0)
    assert (sample.question, sample.target) == (question, 7 if count is None else count)
    assert env.score(env.write_answer(sample), sample).terms["accuracy"] == 1


def test_the_columns_of_a_layout_are_told() -> None:
    env = CountEnv(dataset=[{"image": PICTURE, "label": "dogs", "count": 3, "points": [[1, 2]]}])
    assert env.source.usage is not None
    assert {part: [*columns] for part, columns in env.source.usage.used.items()} == {
        "images": ["image"],
        "question": ["label"],
        "answer": ["count"],
    }
    assert env.source.usage.unused == {"points": 1}


def test_rows_choose_closeness_and_wrong_truths_are_refused() -> None:
    row = {"image": PICTURE, "question": "?", "answer": 4, "accu_reward_method": "closeness"}
    env = CountEnv(dataset=[row])
    assert env.score(AnswerFormat.TAGS.write("3"), env.source.get(0)).terms == {"closeness": 0.75, "format": 1}
    with pytest.raises(DataError, match="row 0: the answer 'many' is no whole number from 0 to 99,999"):
        CountEnv(dataset=[{"image": PICTURE, "question": "?", "answer": "many"}])


def test_the_built_in_numbers_are_those_of_the_scene() -> None:
    env = gymnasium.make("VLM-Count-v0", split="eval").unwrapped
    assert isinstance(env, CountEnv)
    numbers = set()
    for index in range(60):
        sample = env.source.get(index)
        noun = (
            sample.question.removeprefix("How many ")
            .removesuffix(" are there?")
            .removesuffix(" shapes")
            .removesuffix("s")
        )
        shapes = sample_scene("eval", index, (1, 9))[0].shapes
        assert sample.target == sum(noun in ("shape", shape.kind, shape.colour) for shape in shapes)
        numbers.add(sample.target)
    assert {0, 1, 2, 3, 4} <= numbers

"""`VLM-GUI-v0`: forms of actions, what they earn, the layouts of rows, and the built-in screens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmenv.core.errors import DataError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.gui import GUIEnv, write_action
from vlmenv.envs.rewards.actions import Action, is_exact_action, parse_action, word_f1

PICTURE = Image.new("RGB", (400, 200))


@pytest.mark.parametrize(
    ("content", "action", "exact"),
    [
        ('{"action": "click", "point": [10, 20]}', Action("click", (10, 20)), True),
        ('{"action": "type", "text": " hello  you "}', Action("type", None, "hello you"), True),
        ('{"action": "scroll", "direction": "down"}', Action("scroll", None, "down"), True),
        ('[{"action": "click", "point": [1, 2], "input_text": "no input text"}]', Action("click", (1, 2)), True),
        ("[{'action': 'click', 'point': [1, 2], 'input_text': 'no input text'}]", Action("click", (1, 2)), False),
        (
            '<tool_call>{"name": "mobile", "arguments": {"action": "left_click", "coordinate": [5, 6]}}</tool_call>',
            Action("click", (5, 6)),
            False,
        ),
        ("click(x=10, y=20)", Action("click", (10, 20)), False),
        ("pyautogui.click(10, 20)", Action("click", (10, 20)), False),
        ("click(start_box='(100,200)')", Action("click", (100, 200)), False),
        ("type(content='tea')", Action("type", None, "tea"), False),
        ('{"action": "long press", "bbox": [0, 0, 10, 20]}', Action("long_press", (5, 10)), True),
        ('{"action": "terminate"}', Action("complete"), True),
        ("[10, 20]", Action("click", (10, 20)), False),
        ("[10, 20, 30, 60]", Action("click", (20, 40)), False),
        ('<point x="1.5" y="2" alt="Save">Save</point>', Action("click", (1.5, 2)), False),
        ('{"action": "click"}', Action("click"), False),
        ('{"action": "wait", "point": [1, 2]}', Action("wait"), True),
        ('{"name": "click", "arguments": {"x": 10, "y": 20}}', Action("click", (10, 20)), False),
        ('{"type": "click", "x": 10, "y": 20}', Action("click", (10, 20)), False),
        ("pyautogui.hotkey('ctrl', 'shift', 't')", Action("press_key", None, "ctrl shift t"), False),
        ("pyautogui.hotkey(['ctrl', 'c'])", Action("press_key", None, "ctrl c"), False),
        ("hotkey(key='ctrl c')", Action("press_key", None, "ctrl c"), False),
        ("pyautogui.press('enter')", Action("enter"), False),
        ('{"action": "key", "keys": ["Return"]}', Action("enter"), True),
        ('{"action": "swipe", "coordinate": [5, 9], "coordinate2": [7, 2]}', Action("swipe", None, "up"), True),
        ("swipe(start_box=[5, 5], end_box=[1, 6])", Action("swipe", None, "left"), False),
        ('{"action": {"action_type": "click", "x": "10", "y": "20"}}', Action("click", (10, 20)), False),
        ('{"action": "click", "args": {"point": {"x": 10, "y": 20}}}', Action("click", (10, 20)), True),
        ('{"action": "click", "action_inputs": {"start_box": "[10, 20]"}}', Action("click", (10, 20)), True),
        ('{"action": "click", "point": [["10", "20"]]}', Action("click", (10, 20)), True),
        ('{"type": "button", "bbox": [0, 0, 10, 20]}', Action("click", (5, 10)), False),
        ("Thought: I click(it).\nAction: click(point='<point>10 20</point>')", Action("click", (10, 20)), False),
        ("left_single(start_box='(10,20)')", Action("click", (10, 20)), False),
        ("click([10, 20])", Action("click", (10, 20)), False),
        ("pyautogui.click(10, 20, clicks=1)", Action("click", (10, 20)), False),
        ("pyautogui.typewrite('green tea', interval=0.1)", Action("type", None, "green tea"), False),
        ("type(content='press click(now), please')", Action("type", None, "press click(now), please"), False),
        ("click(10, 20)\nclick(10, 20)", Action("click", (10, 20)), False),
        ("click(10, 20)\nclick(30, 40)", None, False),
        ("click(10, 20) type('tea')", None, False),
        ('{"action": "system_button", "button": "Home"}', Action("press_home"), True),
        ('{"action": "terminate", "status": "success"}', Action("complete"), True),
        ('{"action": "terminate", "status": "failure"}', Action("impossible"), True),
        ('{"x": 10, "y": 20}', Action("click", (10, 20)), False),
        ("<point>10 20</point>", Action("click", (10, 20)), False),
        ('{"action": "click", "point": [1, 2]} {"action": "click", "point": [3, 4]}', None, False),
        ('{"action": 3, "point": "x"}', None, False),
        ("I click.", None, False),
        ('{"action": "click", "point": [1, 2]', None, False),
        ("", None, False),
        ('{"action": "click", "point": [1e999, 2]}', Action("click"), False),
        ('{"action": "click", "point": [' + "9" * 500 + ", 2]}", Action("click"), False),
    ],
)
def test_actions_that_are_read(content: str, action: Action | None, exact: bool) -> None:
    assert parse_action(content) == action
    assert is_exact_action(content) is exact


CLICK = {"action": "click", "bbox": [100, 50, 200, 100]}
TYPE = {"action": "type", "text": "green tea please"}


@pytest.mark.parametrize(
    ("answer", "true", "accuracy", "action", "hit", "text"),
    [
        ('{"action": "click", "point": [150, 75]}', CLICK, 1, 1, 1, 1),
        ('{"action": "click", "point": [200, 100]}', CLICK, 1, 1, 1, 1),
        ('{"action": "click", "point": [201, 75]}', CLICK, 0, 1, 0, 1),
        ('{"action": "long_press", "point": [150, 75]}', CLICK, 0, 0, 0, 0),
        ('{"action": "click"}', CLICK, 0, 1, 0, 1),
        ("hm", CLICK, 0, 0, 0, 0),
        ('{"action": "type", "text": "Green tea, please"}', TYPE, 1, 1, 1, 2 / 3),
        ('{"action": "type", "text": "tea"}', TYPE, 1, 1, 1, 0.5),
        ('{"action": "type", "text": "black coffee"}', TYPE, 0, 1, 1, 0),
        ('{"action": "type"}', TYPE, 0, 1, 1, 0),
        ('{"action": "type", "text": "a"}', {"action": "type", "text": "banana"}, 0, 1, 1, 0),
        ('{"action": "scroll", "text": "up"}', {"action": "scroll", "input_text": "UP"}, 1, 1, 1, 1),
        ('{"action": "scroll", "text": "up"}', {"action": "scroll", "text": "down"}, 0, 1, 1, 0),
        ('{"action": "scroll", "text": "scroll down, please"}', {"action": "scroll", "text": "down"}, 1, 1, 1, 1),
        ('{"action": "scroll", "text": "up or down"}', {"action": "scroll", "text": "down"}, 0, 1, 1, 0),
        ('{"action": "swipe", "text": "down up"}', {"action": "swipe", "text": "up"}, 0, 1, 1, 0),
        ('{"action": "swipe"}', {"action": "swipe", "coordinate": [1, 2], "coordinate2": [4, 50]}, 0, 1, 1, 0),
        ('{"action": "swipe", "text": "down"}', {"action": "swipe", "coordinate": [1, 2], "to": [4, 50]}, 1, 1, 1, 1),
        ('{"action": "hotkey", "text": "Ctrl+C"}', {"action": "hotkey", "text": "control c"}, 1, 1, 1, 1),
        ('{"action": "hotkey", "keys": ["c", "ctrl"]}', {"action": "hotkey", "text": "ctrl c"}, 1, 1, 1, 1),
        ('{"action": "hotkey", "text": "ctrl v"}', {"action": "hotkey", "text": "ctrl c"}, 0, 1, 1, 0),
        ('{"action": "hotkey", "text": "ctrl shift c"}', {"action": "hotkey", "text": "ctrl c"}, 0, 1, 1, 0),
        ('{"action": "hotkey", "text": "ctrl"}', {"action": "hotkey", "text": "ctrl +"}, 0, 1, 1, 0),
        ('{"action": "key", "text": "enter"}', {"action": "press_enter"}, 1, 1, 1, 1),
        ('{"action": "press_back"}', {"action": "system_button", "button": "Back"}, 1, 1, 1, 1),
        ('{"action": "press_back"}', {"action": "back", "input_text": "no input text"}, 1, 1, 1, 1),
        ('{"action": "click", "point": [155, 99]}', {"action": "click", "point": [100, 100]}, 1, 1, 1, 1),  # 56 x 28
        ('{"action": "click", "point": [157, 99]}', {"action": "click", "point": [100, 100]}, 0, 1, 0, 1),
        ('{"action": "click", "point": [101, 129]}', {"action": "click", "point": [100, 100]}, 0, 1, 0, 1),
    ],
)
@pytest.mark.parametrize("coordinates", ["original", "norm1000"])
def test_rewards_by_hand(
    answer: str, true: Any, accuracy: float, action: float, hit: float, text: float, coordinates: str
) -> None:
    rewards = {"accuracy": 1.0, "action": 1.0, "hit": 1.0, "text": 1.0}
    rows = [{"image": PICTURE, "question": "?", "answer": true}]
    env = GUIEnv(dataset=rows, rewards=rewards, coordinates=coordinates)
    given = parse_action(answer)
    if coordinates == "norm1000" and given is not None and given.place is not None:
        answer = json.dumps({"action": given.kind, "point": [given.place[0] * 1000 / 400, given.place[1] * 1000 / 200]})
    score = env.score(AnswerFormat.TAGS.write(answer), env.source.get(0))
    assert score.terms == pytest.approx({"accuracy": accuracy, "action": action, "hit": hit, "text": text})


@pytest.mark.parametrize(
    ("true", "message"),
    [
        ({"action": "clik", "bbox": [1, 2, 3, 4]}, "the action 'clik' is not known; known are click, "),
        ({"action": "drag", "coordinate": [1, 2], "coordinate2": [9, 2]}, "the action 'drag' is not known"),
        ({"action": "swipe", "coordinate": [1, 2], "coordinate2": [1, 2]}, "second place of the action swipe is not"),
        ({"action": "swipe", "coordinate2": [1, 2]}, "second place of the action swipe is not read"),
        ({"action": "click", "coordinate": [1, 2], "coordinate2": [1, 2]}, "second place of the action click is not"),
    ],
)
def test_true_actions_that_are_not_understood_are_refused(true: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        GUIEnv(dataset=[{"image": PICTURE, "question": "?", "answer": true}])


def test_words_by_hand() -> None:
    assert word_f1("a b c", "b c d e") == pytest.approx(4 / 7)
    assert (word_f1("", ""), word_f1("a", ""), word_f1("A a", "a")) == (1, 0, 1)


def test_places_and_texts_are_measured_where_the_truth_has_them() -> None:
    rows = [{"image": PICTURE, "question": "?", "answer": true} for true in (CLICK, TYPE)]
    env = GUIEnv(dataset=rows)
    answers = ['{"action": "click", "point": [150, 75]}', '{"action": "type", "text": "milk"}']
    names = ("accuracy", "action_accuracy", "places/hit", "places/true", "texts/right", "texts/true")
    measured = [
        [env.measure(AnswerFormat.TAGS.write(text), env.target(env.source.get(i)), {})[name] for name in names]
        for i, text in enumerate(answers)
    ]
    assert measured == [[1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("row", "question", "action"),
    [
        (  # GUI-R1
            {
                "instruction": "Open the mail",
                "history": "None",
                "gt_action": "click",
                "gt_bbox": [0.25, 0.5, 0.5, 0.75],
                "gt_input_text": "no input text",
                "task_type": "low",
            },
            "Open the mail",
            Action("click", (100, 100, 200, 150)),
        ),
        (
            {"instruction": "Go on", "history": "step 0: wait", "gt_action": "scroll", "gt_bbox": [-100, -100]}
            | {"gt_input_text": "DOWN"},
            "Go on\nActions so far: step 0: wait",
            Action("scroll", None, "DOWN"),
        ),
        (
            {"instruction": "Tap", "history": None, "gt_action": "click", "gt_bbox": [40, 60], "gt_input_text": ""},
            "Tap",
            Action("click", (40, 60)),
        ),
        (  # ScreenSpot on the hub
            {
                "instruction": "close this window",
                "bbox": [0.25, 0.5, 0.5, 0.75],
                "data_type": "icon",
                "data_source": "ios",
            },
            "close this window",
            Action("click", (100, 100, 200, 150)),
        ),
        (  # ScreenSpot's own files
            {"instruction": "close", "bbox": [100, 50, 20, 10], "data_type": "icon", "data_source": "ios"},
            "close",
            Action("click", (100, 50, 120, 60)),
        ),
        (  # ScreenSpot-Pro
            {"instruction": "close", "bbox": [100, 50, 120, 60], "ui_type": "icon", "application": "blender"},
            "close",
            Action("click", (100, 50, 120, 60)),
        ),
        ({"problem": "close", "answer": [100, 50, 120, 60]}, "close", Action("click", (100, 50, 120, 60))),
        (  # AndroidControl
            {"question": "Tap OK", "answer": {"action_type": "click", "x": 40, "y": 60}},
            "Tap OK",
            Action("click", (40, 60)),
        ),
        (
            {"question": "Hold", "answer": '{"action_type": "long_press", "x": 40, "y": 60}'},
            "Hold",
            Action("long_press", (40, 60)),
        ),
        (
            {"question": "Go", "answer": {"action_type": "open_app", "app_name": "Mail", "x": None, "y": None}},
            "Go",
            Action("open_app", None, "Mail"),
        ),
    ],
)
@pytest.mark.parametrize("coordinates", ["original", "norm1000"])
def test_own_truths_score_1_in_each_layout(
    row: dict[str, Any], question: str, action: Action, coordinates: str
) -> None:
    env = GUIEnv(dataset=[{"image": PICTURE, **row}], coordinates=coordinates)
    sample = env.source.get(0)
    assert (sample.question, sample.target) == (question, action)
    assert env.score(env.write_answer(sample), sample).terms == {"accuracy": 1, "format": 1}


def test_screenspot_files_name_their_images(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    row = {"img_filename": "a.png", "instruction": "close", "bbox": [100, 50, 20, 10], "data_source": "ios"}
    (tmp_path / "screenspot_mobile.json").write_text(json.dumps([row | {"data_type": "text"}]))
    env = GUIEnv(dataset=tmp_path / "screenspot_mobile.json", columns={"subject": "data_type"})
    assert env.source.get(0).subject == "text"
    assert env.source.get(0).target.place == (100, 50, 120, 60)
    with pytest.raises(DataError, match="is neither"):  # the stated form goes before that of the layout
        GUIEnv(dataset=tmp_path / "screenspot_mobile.json", boxes_in="xyxy")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("Save", "is not JSON"),
        ({"action": "click"}, "has no place"),
        ({"action": "click", "x": 1, "y": None}, "has no place"),
        ([[1, 2], [3, 4]], "has no place"),
        ([], "has no place"),
    ],
)
def test_wrong_truths_are_told(answer: Any, told: str) -> None:
    with pytest.raises(DataError, match=f"row 0: .*{told}"):
        GUIEnv(dataset=[{"image": PICTURE, "question": "?", "answer": answer}])


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"bbox": None}, "bbox"),
        ({"bbox": None, "data_source": "ios"}, "bbox"),
        ({"gt_action": "click", "gt_bbox": None, "gt_input_text": ""}, "gt_bbox"),
    ],
)
def test_a_layout_without_its_truth_is_told(row: dict[str, Any], column: str) -> None:
    with pytest.raises(DataError, match=f"question in 'instruction', but its answer is empty: '{column}' is null"):
        GUIEnv(dataset=[{"image": PICTURE, "instruction": "close", **row}])


def test_boxes_of_a_table_are_read(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    rows = "a.png,Save,{box},ios\na.png,Save,{parts},ios\n".format(box='"[10, 20, 30, 40]"', parts='"[0.1, 0, 0.5, 1]"')
    (tmp_path / "rows.csv").write_text(f"img_filename,instruction,bbox,data_source\n{rows}")
    source = GUIEnv(dataset=tmp_path / "rows.csv").source
    assert source.get(0).target.place == (10, 20, 40, 60)
    assert source.get(1).target.place == pytest.approx((PICTURE.width / 10, 0, PICTURE.width / 2, PICTURE.height))


@pytest.mark.parametrize("box", [[], "there", "[10 20 30 40]", 5])
def test_wrong_boxes_name_their_columns(box: Any) -> None:
    with pytest.raises(DataError, match=r"row 0: the columns .*'bbox' do not hold what they should"):
        GUIEnv(dataset=[{"image": PICTURE, "instruction": "Save", "bbox": box}])


def test_a_place_beyond_the_screen_is_in_no_fractions() -> None:
    row = {"gt_action": "click", "gt_bbox": [-100, -100], "gt_input_text": "", "history": "None"}
    source = GUIEnv(dataset=[{"image": PICTURE, "instruction": "Save", **row}]).source
    assert source.get(0).target.place == (-100, -100)


def test_the_built_in_screens_show_what_they_ask_for() -> None:
    """Both streams have all types of actions, and no sample in common."""
    kinds, asked = set(), []
    for split in ("train", "eval"):
        env = GUIEnv(split=split)
        samples = [env.source.get(index) for index in range(60)]
        kinds |= {(split, sample.target.kind) for sample in samples}
        asked.append({(sample.question, sample.images[0].tobytes()) for sample in samples})
        for sample in samples:
            name = sample.question.split()[-1].strip(".")
            assert name in write_action(sample.target) or sample.target.kind == "click" or name[1:-1] in sample.question
            if sample.target.place is not None:
                x1, y1, x2, y2 = map(int, sample.target.place)
                assert len({tuple(pixel) for row in sample.images[0][y1:y2, x1:x2] for pixel in row}) > 1
    assert kinds == {(split, kind) for split in ("train", "eval") for kind in ("click", "type", "scroll")}
    assert not asked[0] & asked[1]

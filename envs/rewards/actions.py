"""Rewards for answers that are one action on a screen: its type, where it goes, and its text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from vlmenv.core.answers import denies_a_place, parse_box
from vlmenv.core.coordinates import Point, is_point
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.literals import Cut, find_values
from vlmenv.core.points import LONGEST, parse_points
from vlmenv.envs.regions import Region, holds

PLACED: Final = ("click", "double_click", "right_click", "long_press", "move_to")
"""Types of actions that go to a place."""
OTHERS: Final = (
    *("type", "select", "scroll", "swipe", "open_app", "press_key"),
    *("press_back", "press_home", "press_recent", "enter", "wait", "complete", "impossible"),
)
"""Other types of actions that prompts and data sets name."""
LEAST_F1: Final = 0.5
"""F1 of its words from which a text counts as right (GUI-R1, arXiv 2504.10458)."""
_LONGEST_TEXT = 2_000

_SAME: Final = {
    **dict.fromkeys(("tap", "left_click", "leftclick", "left_single", "mouse_click"), "click"),
    **dict.fromkeys(("doubleclick", "double_tap", "left_double"), "double_click"),
    **dict.fromkeys(("rightclick", "right_single"), "right_click"),
    **dict.fromkeys(("longpress", "long_tap"), "long_press"),
    **dict.fromkeys(("moveto", "mouse_move", "hover"), "move_to"),
    **dict.fromkeys(("input", "input_text", "write", "type_text", "typewrite", "enter_text"), "type"),
    **dict.fromkeys(("open", "launch"), "open_app"),
    **dict.fromkeys(("back", "navigate_back"), "press_back"),
    **dict.fromkeys(("home", "navigate_home"), "press_home"),
    **dict.fromkeys(("press_enter", "keyboard_enter"), "enter"),
    **dict.fromkeys(("key", "hotkey", "press"), "press_key"),
    **dict.fromkeys(("finish", "finished", "terminate", "done", "completed", "status"), "complete"),
}
_KIND_KEYS = ("action", "action_type", "gt_action")
_PLACE_KEYS = (
    *("point", "point_2d", "coordinate", "coordinates", "position", "start_box", "bbox_2d", "bbox", "gt_bbox"),
    *("box", "box_2d", "location", "element", "target", "start", "start_point", "from"),
)
_PARTS = ("arguments", "args", "parameters", "params", "action_inputs")
_END_KEYS = ("coordinate2", "end_box", "end_point", "end_coordinate", "end", "to")
_DIRECTED: Final = ("scroll", "swipe")
_DIRECTIONS: Final = frozenset({"up", "down", "left", "right"})
_KNOWN: Final = frozenset(
    (*PLACED, *OTHERS, *(f"{kind}_{direction}" for kind in _DIRECTED for direction in _DIRECTIONS))
)
_SAME_KEYS: Final = {
    "control": "ctrl",
    "command": "cmd",
    "escape": "esc",
    "return": "enter",
    "delete": "del",
    "option": "alt",
    "pageup": "page_up",
    "pagedown": "page_down",
}
_BUTTONS: Final = ("enter", "press_back", "press_home")
_FAILED: Final = frozenset({"failure", "fail", "failed", "infeasible", "impossible"})
_TEXT_KEYS = (
    "text",
    "input_text",
    "gt_input_text",
    "value",
    "content",
    "direction",
    "scroll_direction",
    "app_name",
    "app",
    "button",
    "keys",
    "key",
    "input",
    "message",
)
_CALL = re.compile(r"(?<![\w.])(?:pyautogui\.)?([A-Za-z_]{2,20})(?=\()")
_FIRST_CALL = re.compile(r"\s*(?:pyautogui\.)?([A-Za-z_]{2,20})\s*(?=\()")
_MOST_CALLS: Final = 20
_BEGUN = re.compile(r"^[ \t]{0,9}Actions? ?:", re.MULTILINE)
_BY_WORD = re.compile(r"([A-Za-z]{2,20}(?:_[A-Za-z]{2,10}){0,2}) ?([\[(<].*|[A-Za-z]{2,5})?", re.DOTALL)
_TEXT_IN_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_BY_NAME = re.compile(r",\s*[A-Za-z_]{1,20}\s*=[^,()\[\]]{0,80}(?=[,)])")
_NUMBER = re.compile(r"[+-]?[0-9]{1,9}(?:\.[0-9]{0,17})?")
_NO_TEXT = ("", "no input text", "none", "null")


class Action(NamedTuple):
    """An action on a screen."""

    kind: str
    """its type, as in `PLACED` and `OTHERS`"""
    place: Region | None = None
    """a point; for a true action, the region of the element that it goes to"""
    text: str = ""
    """what is typed or selected, or the direction of scrolling"""
    reach: Point | tuple[()] = ()
    """for a true action: half axes of the ellipse around a true point within which it is hit"""


def kind_of(name: str) -> str:
    """The type of an action by any of its names."""
    plain = re.sub(r"[\s-]+", "_", name.strip().lower())[:40]
    return _SAME.get(plain, plain)


def parse_action(content: str) -> Action | None:
    """Reads one action from the content of an answer.

    An object with `action`, as GUI-R1's, InfiGUI-R1's and Qwen's rows and tool calls have it; a call, as
    `click(x=10, y=20)`, or a name, as `PRESS_BACK` and `TYPE [text]`, after "Action:" or not; or a bare point, or a box
    whose centre it is, which are clicked.

    Args:
        content: Any text.

    Returns:
        The action in the coordinates that the text uses; None if there is none, one is cut off, or several differ.
    """
    if len(content) > LONGEST or denies_a_place(content):
        return None
    rows = [row for found in find_values(content) for row in _rows(found.value)]
    if any(isinstance(row, Cut) or isinstance(row.get("action"), list) for row in rows):
        return None
    begun = _BEGUN.search(content)
    called = content[begun.end() :] if begun else content
    found = {action for row in rows if (action := _action(row)) is not None} or _calls(called) or _by_word(called)
    if found:
        return found.pop() if len(found) == 1 else None
    place = _bare_place(content)
    return None if place is None else Action("click", place)


def _rows(value: Any) -> list[dict[str, Any]]:
    """The objects of a list, which may be within another, as the braces of a `boxed` make it."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    return [row for row in (value if isinstance(value, list) else [value]) if isinstance(row, dict)]


def _action(row: Mapping[str, Any]) -> Action | None:
    inner: Mapping[str, Any] = next(
        (row[key] for key in (*_PARTS, *_KIND_KEYS) if isinstance(row.get(key), Mapping)), {}
    )
    names = [part[key] for part in (inner, row) for key in _KIND_KEYS if isinstance(part.get(key), str)]
    if not names:  # {"name": "click", "arguments": {…}}, and {"type": "click", …}
        named = [row.get("name")] * bool(inner) + [part.get("type") for part in (inner, row)]
        names = [name for name in named if isinstance(name, str) and kind_of(name) in _KNOWN]
    if names and len(called := _calls(names[0])) == 1:  # {"action": "click(10, 20)"}
        return called.pop()
    return _of_kind(kind_of(names[0]), {**row, **inner}) if names else None


def _calls(content: str) -> set[Action]:
    """The calls of a text, as `click(x=10, y=20)`."""
    found: set[Action] = set()
    place, call = 0, _FIRST_CALL.match(content) or _CALL.search(content)
    for _ in range(_MOST_CALLS):
        if call is None:
            break
        place = call.end()
        if (kind := kind_of(call[1])) in _KNOWN:
            values = next(find_values(content[call.end() :]), None)
            place += 0 if values is None else values.end
            found.add(_call(kind, content[call.end() : place], None if values is None else values.value))
        call = _CALL.search(content, place)
    return found


def _by_word(content: str) -> set[Action]:
    """The action that a text is by its name, with text, direction or place, as OS-Atlas (arXiv 2410.23218) has them.

    `PRESS_BACK`, `TYPE [text]`, `SCROLL [UP]`, `scroll up`, or `LONG_PRESS <point>[[10, 20]]</point>`.
    """
    match = _BY_WORD.fullmatch(content.strip("\n\t .`*"))
    kind, rest = (kind_of(match[1]), match[2] or "") if match else ("", "")
    if kind in PLACED:
        place = _bare_place(rest)
        return set() if place is None else {Action(kind, place)}
    text = rest if kind in _DIRECTED and rest.lower() in _DIRECTIONS else ""
    if in_brackets := _TEXT_IN_BRACKETS.fullmatch(rest):
        text = in_brackets[1]
    return {_of_kind(kind, {"text": text})} if kind in _KNOWN and (text or not rest) else set()


def _call(kind: str, written: str, value: Any) -> Action:
    if isinstance(value, dict):
        action = _of_kind(kind, value)
        if action.place or action.text or action.kind != kind:
            return action
        value = next((one.value for one in find_values(_BY_NAME.sub("", written))), [])  # click(10, 20, clicks=1)
        value = [] if isinstance(value, dict) else value
    parts = value or []
    if kind in _DIRECTED and (numbers := _numbers(parts)):
        return _of_kind(
            kind, {"point": numbers[:2], "to": numbers[2:]} if len(numbers) == 4 else {"pixels": numbers[0]}
        )
    parts = parts[0] if kind == "press_key" and parts and isinstance(parts[0], list) else parts
    texts = [part for part in parts if isinstance(part, str)]
    return _of_kind(kind, {"point": parts, "text": texts if kind == "press_key" else "".join(texts[:1])})


def _of_kind(kind: str, row: Mapping[str, Any]) -> Action:
    place = next((row[key] for key in _PLACE_KEYS if row.get(key) is not None), [row.get("x"), row.get("y")])
    kind, text = _meant(kind, row)
    return Action(kind, _point(place) if kind in PLACED else None, text or _direction(kind, place, row))


def _numbers(parts: list[Any]) -> list[float]:
    """The numbers of a call, of two places or of one number alone; empty for all else."""
    flat = [one for part in parts for one in (part if isinstance(part, list) else [part])]
    return flat if len(flat) in (1, 4) and all(type(one) is float for one in flat) else []


def _direction(kind: str, start: Any, row: Mapping[str, Any]) -> str:
    """Where a swipe goes that is told by two places, or a scroll by Qwen's pixels, up if positive; else empty."""
    pixels = row.get("pixels")
    if kind == "scroll" and type(pixels) in (int, float) and pixels:
        return "up" if pixels > 0 else "down"
    end = next((row[key] for key in _END_KEYS if row.get(key) is not None), None)
    begun, ended = (_point(start), _point(end)) if kind == "swipe" else (None, None)
    if begun is None or ended is None or begun == ended:
        return ""
    x, y = ended[0] - begun[0], ended[1] - begun[1]
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _meant(kind: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """The type and the text of an action, of which a system's button and the end of a task have their type there."""
    text = _plain_text(next((row[key] for key in _TEXT_KEYS if row.get(key) is not None), ""))
    if kind in _KNOWN and kind.startswith(_DIRECTED):  # scroll_down
        kind, _, direction = kind.partition("_")
        text = text or direction
    if kind == "system_button" and (button := kind_of(text)) in OTHERS:
        return button, ""
    if kind == "press_key" and (button := "enter" if _keys(text) == {"enter"} else kind_of(text)) in _BUTTONS:
        return button, ""
    failed = kind == "complete" and str(row.get("status", row.get("goal_status", ""))).lower() in _FAILED
    return ("impossible" if failed else kind), text


def _point(value: Any) -> Point | None:
    """A point, or the centre of a box."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = [value.get("x"), value.get("y")]
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = ", ".join(value)
    if isinstance(value, str):
        value = [float(one) for one in _NUMBER.findall(value[:200])]
    try:
        numbers = [float(one) for one in value if type(one) in (int, float)] if isinstance(value, list) else []
    except OverflowError:
        return None
    if len(numbers) == 4:
        numbers = [(numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2]
    point = tuple(numbers)
    return (point[0], point[1]) if is_point(point) else None


def _bare_place(content: str) -> Point | None:
    points = parse_points(content)
    if points is not None:
        return points[0] if len(points) == 1 else None
    box = parse_box(content)
    return None if box is None or isinstance(box, str) else _point(list(box))


def _plain_text(text: Any) -> str:
    if isinstance(text, list):
        text = " ".join(map(str, text[:20]))
    plain = " ".join(str(text)[:_LONGEST_TEXT].split())
    return "" if plain.lower() in _NO_TEXT else plain


def read_action(answer: str) -> tuple[str, Any, str]:
    """The type, the place as JSON holds it, and the text of the action in the answer of a data set's row.

    Raises:
        ValueError: It has none, or a click without a place.
    """
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        raise ValueError(f"the answer {answer[:80]!r} is not JSON") from None
    row = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) else value
    if not isinstance(row, dict) or not any(isinstance(row.get(key), str) for key in _KIND_KEYS):
        return "click", row, ""
    kind = kind_of(next(row[key] for key in _KIND_KEYS if isinstance(row.get(key), str)))
    place = next((row[key] for key in _PLACE_KEYS if row.get(key) is not None), None)
    if place is None and row.get("x") is not None and row.get("y") is not None:  # as AndroidControl writes them
        place = [row["x"], row["y"]]
    kind, text = _meant(kind, row)
    if kind not in (*PLACED, *OTHERS):
        raise ValueError(f"the action {kind!r} is not known; known are {', '.join((*PLACED, *OTHERS))}")
    if any(row.get(key) is not None for key in _END_KEYS) and not (text or _direction(kind, place, row)):
        raise ValueError(f"the second place of the action {kind} is not read: {answer[:80]}")
    return kind, place if kind in PLACED else None, text or _direction(kind, place, row)


def _keys(text: str) -> set[str]:
    """The keys of `ctrl c`, `Ctrl+C` or the like."""
    parts = re.sub(r"(?<=\w) ?\+ ?(?=\w)", " ", text.lower()).split()
    keys = [key or "+" for part in parts for key in part.split("+")]
    return {_SAME_KEYS.get(key, key) for key in keys}


def word_f1(answered: str, true: str) -> float:
    """F1 of the different words of two texts, in [0, 1], in small letters."""
    given, wanted = ({*text.lower().split()} for text in (answered, true))
    return 2 * len(given & wanted) / (len(given) + len(wanted)) if given and wanted else float(given == wanted)


def action_reward(text: str, target: Action, prediction: Action | None) -> float:
    """1 for the true type of action, else 0."""
    return float(prediction is not None and prediction.kind == target.kind)


def hit_reward(text: str, target: Action, prediction: Action | None) -> float:
    """1 for an action of the true type within its element, or one that goes to no place; else 0."""
    if prediction is None or prediction.kind != target.kind:
        return 0.0
    if target.place is None:
        return 1.0
    if prediction.place is None:
        return 0.0
    reach = target.reach or (0.0, 0.0)
    return float(holds(target.place, np.array([prediction.place]), (reach[0], reach[1]))[0])


def text_reward(text: str, target: Action, prediction: Action | None) -> float:
    """F1 of the words of an action of the true type, or 1 where the truth has no text; else 0.

    A true direction of scrolling must be the only direction that is named, and is 1. So are true keys, if they are all
    the same.
    """
    if prediction is None or prediction.kind != target.kind:
        return 0.0
    if target.kind in _DIRECTED and target.text.lower() in _DIRECTIONS:
        named = _DIRECTIONS & {*re.findall("[a-z]+", prediction.text.lower())}
        return float(named == {target.text.lower()})
    if target.kind == "press_key" and target.text:
        return float(_keys(prediction.text) == _keys(target.text))
    return word_f1(prediction.text, target.text) if target.text else 1.0


def step_reward(text: str, target: Action, prediction: Action | None) -> float:
    """1 for an action of the true type, at the true place, and with a text of F1 0.5 or more; else 0.

    The accuracy of GUI-R1 (arXiv 2504.10458) and of EasyR1's GUI rewards, but that a single word must be the same word.
    """
    hit = hit_reward(text, target, prediction) == 1
    return float(hit and text_reward(text, target, prediction) >= LEAST_F1)


def action_format_reward(text: str, target: Any, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for a text in the answer format and nothing else, whose answer is exactly one action as JSON; else 0."""
    return float(answer_format.is_followed(text) and is_exact_action(answer_format.extract(text) or ""))


def is_exact_action(content: str) -> bool:
    """Whether the content of an answer is a JSON object with an `action`, with a place where it needs one."""
    if len(content) > LONGEST:
        return False
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return False
    row = value[0] if isinstance(value, list) and len(value) == 1 else value
    named = row.get("arguments") if isinstance(row, dict) and isinstance(row.get("arguments"), Mapping) else row
    exact = isinstance(named, dict) and any(isinstance(named.get(key), str) for key in _KIND_KEYS)
    action = _action(row) if exact else None
    return action is not None and (action.place is not None) is (action.kind in PLACED)

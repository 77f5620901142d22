"""Graphical user interfaces: the next action on a screen, such as a click on an element."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from vlmenv.envs.base import OF_WORDS, VisualTaskEnv
from vlmenv.envs.data.layouts import RowLayout, written_out
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.screens import Screens
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.geometry import Geometry
from vlmenv.envs.regions import as_object, read_regions, write_inner_point
from vlmenv.envs.rewards import actions as rewards
from vlmenv.envs.rewards.actions import OTHERS, PLACED, Action
from vlmenv.envs.rewards.terms import RewardTerm


def _is_in_fractions(box: Any) -> bool:
    numbers = written_out(box)
    return bool(min(numbers) >= 0 and max(numbers) <= 1)


def _form_of_box(box: Any, *others: Any) -> str:
    return "fractions" if _is_in_fractions(box) else "xyxy"


def _form_of_screenspot(box: Any, source: Any) -> str:
    return "fractions" if _is_in_fractions(box) else "xywh"


def _ask_gui_r1(instruction: str, history: Any) -> str:
    return instruction if history in (None, "", "None") else f"{instruction}\nActions so far: {history}"


def _act_gui_r1(action: str, box: Any, text: Any) -> dict[str, Any]:
    return {"action": action, "bbox": list(written_out(box)), "text": text}


LAYOUTS = (
    RowLayout(
        ("instruction", "history"),
        ("gt_action", "gt_bbox", "gt_input_text"),
        _ask_gui_r1,
        _act_gui_r1,
        lambda action, box, text: _form_of_box(box),
    ),
    RowLayout(("instruction",), ("bbox", "data_source"), form=_form_of_screenspot),
    RowLayout(("instruction",), ("bbox",), form=_form_of_box),
)
"""The rows of GUI-R1, of ScreenSpot with its second version, and of ScreenSpot-Pro.

A box of which no number is above 1 or below 0 is in fractions. Other boxes of ScreenSpot are left, top, width and
height.
"""


def write_action(action: Action) -> str:
    """An action as JSON, with a point in its element."""
    place = {} if action.place is None else {"point": json.loads(write_inner_point(action.place))}
    text = {"text": action.text} if action.text else {}
    return json.dumps({"action": action.kind, **place, **text}, ensure_ascii=False)


ACTION = Geometry('{"action": "click", "point": [x, y]}', "one action as JSON", rewards.parse_action, write_action)
"""One action. The truth of a click is the region of its element."""


class GUIEnv(VisualTaskEnv):
    """`VLM-GUI-v0`: the answer is one action with its type, and its place or text where it has one."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "accuracy": rewards.step_reward,
        "action": rewards.action_reward,
        "hit": rewards.hit_reward,
        "text": rewards.text_reward,
        "format": rewards.action_format_reward,
    }
    default_rewards: ClassVar[Mapping[str, float]] = {"accuracy": 1.0, "format": 0.1}
    row_terms: ClassVar[Mapping[str, str]] = {name: name for name in ("accuracy", "action", "hit", "text")}
    ratios: ClassVar[Mapping[str, tuple[str, str]]] = {
        "grounding": ("places/hit", "places/true"),
        "text_accuracy": ("texts/right", "texts/true"),
    }
    prompt_template: ClassVar[str] = (
        "Answer with the next action as {answer} in {coordinates}. Other actions have no point, but a text where they "
        f'need one, as {{"action": "type", "text": "hello"}}. Actions: {", ".join((*PLACED, *OTHERS))}.\n{{question}}'
    )
    geometry: ClassVar[Geometry | None] = ACTION
    layouts: ClassVar[tuple[RowLayout, ...]] = LAYOUTS
    unread: ClassVar[Collection[str]] = OF_WORDS
    reach: ClassVar[float] = 0.14
    """Distance within which a true point is hit, as a part of width and height (AndroidControl, arXiv 2406.03679)."""

    def builtin_source(self, split: Split) -> Source:
        return Screens(split)

    def read_target(self, row: Row) -> Action:
        kind, place, text = rewards.read_action(row.answer)
        if kind not in PLACED:
            return Action(kind, None, text)
        regions = read_regions(json.dumps(place)) if place is not None else ()
        if len(regions) != 1:
            raise ValueError(f"the action {kind} of the answer {row.answer[:80]!r} has no place")
        return Action(kind, regions[0], text)

    def target(self, sample: Sample) -> Action:
        width, height = sample.asked_sizes[0]
        reach = (self.reach * width, self.reach * height)
        target: Action = super().target(sample)
        return target._replace(reach=self.coordinates.from_pixels(reach, width, height))

    def stored_answer(self, sample: Sample) -> str:
        action: Action = sample.target
        place = {} if action.place is None else {"bbox": as_object(action.place)}
        return json.dumps({"action": action.kind, **place, "text": action.text})

    def measure(self, text: str, target: Action, terms: Mapping[str, float]) -> dict[str, float]:
        answered = self.parse(text)
        has_place, has_text = target.place is not None, bool(target.text)
        right_text = rewards.text_reward(text, target, answered) >= rewards.LEAST_F1
        return {
            "accuracy": rewards.step_reward(text, target, answered),
            "action_accuracy": rewards.action_reward(text, target, answered),
            "places/hit": rewards.hit_reward(text, target, answered) * has_place,
            "places/true": float(has_place),
            "texts/right": float(right_text and has_text),
            "texts/true": float(has_text),
            "unparsable": float(answered is None),
            "format": rewards.action_format_reward(text, target, self.answer_format),
        }

"""Answers of the kinds that users report, each judged by hand before it was tried.

`kinds_of_answers.jsonl` has a truth with right and wrong answers on each line, or a whole completion with its score.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from PIL import Image

LINES = (Path(__file__).parent / "kinds_of_answers.jsonl").read_text(encoding="utf-8").splitlines()
CASES = [json.loads(line) for line in LINES]
TRUTHS = [case for case in CASES if "right" in case]
COMPLETIONS = [case for case in CASES if "completion" in case]


def scores(case: dict[str, Any], texts: list[str]) -> list[float]:
    """The case's reward term for each completion."""
    images = [] if case["env"] in ("VLM-Math-v0", "VLM-VQA-v0") else [Image.new("RGB", (640, 480))]
    row = {"question": "Which?", "images": images} | case["row"]
    options = {"rewards": {case["term"]: 1.0}} | case.get("options", {})
    env = gymnasium.make(case["env"], dataset=[row], disable_env_checker=True, **options)
    found = []
    for text in texts:
        env.reset(seed=0)
        found.append(env.step(text)[4]["rewards"][case["term"]])
    return found


@pytest.mark.parametrize("case", TRUTHS, ids=lambda case: f"{case['env'][4:8]} {case['row']['answer']}"[:60])
def test_right_answers_score_and_wrong_ones_do_not(case: dict[str, Any]) -> None:
    answers = [*case["right"], *case["wrong"]]
    found = dict(
        zip(answers, scores(case, [f"<think>t</think><answer>{one}</answer>" for one in answers]), strict=True)
    )
    assert {answer: found[answer] for answer in case["right"] if found[answer] != pytest.approx(1)} == {}
    assert {answer: found[answer] for answer in case["wrong"] if found[answer] != 0} == {}


@pytest.mark.parametrize("case", COMPLETIONS, ids=lambda case: f"{case['env'][4:8]} {case['completion']!r}"[:60])
def test_whole_completions(case: dict[str, Any]) -> None:
    assert scores(case, [case["completion"]]) == [pytest.approx(case["want"], abs=1e-5)]

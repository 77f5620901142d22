"""The papers' rewards and ours on the same answers; run as a script, this writes docs/rewards_of_the_papers.md."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vlmenv.core.answers import Answer, Caption, Detection, parse_detections
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.spaces import Image
from vlmenv.envs.captioning import CaptionEnv, described_keywords_reward, described_length_reward
from vlmenv.envs.data.rows import Row
from vlmenv.envs.math_reasoning import MathEnv
from vlmenv.envs.metrics.detection import coco_statistics
from vlmenv.envs.rewards import detection
from vlmenv.envs.rewards.answers import accuracy_reward
from vlmenv.envs.rewards.boxes import box_format_reward, iou_reward
from vlmenv.envs.rewards.clip import ClipScore
from vlmenv.envs.rewards.text import format_reward

PAGE = Path(__file__).parents[2] / "docs" / "rewards_of_the_papers.md"
FAILS = "fails"
REASONS = {
    "1": "an unreadable answer scores 0, also if nothing is to be found",
    "2": "boxes with labels that the prompt does not name are false positives",
    "3": "boxes without a fence, in floats or texts, with a trailing comma or as a single object are read. A list with "
    "a box without a label scores 0",
    "4": "a list scores 0 if one of its boxes is not four finite numbers in order",
    "5": "the length reward depends on whether the answer is right, and is constant beyond its greatest length",
    "6": "short answers are read for their meaning, not by letters within words or by similarity",
    "7": "white space around an answer costs nothing. A second answer, an answer within the thinking, or a heading "
    "given twice wins nothing",
    "8": "a box one pixel wide overlaps itself",
    "absent": "if no object fits, only an answer that says so scores",
    "box": "an answer is a box, and need not be JSON",
    "asked": "the similarity of words (`edit`) is a reward only if a row asks for it",
    "headings": "only the four requested sections count, each once and in order, the last with an answer",
    "words": "key words are whole words",
    "negative": "a negative cosine earns 0",
    "labels": "every term compares labels without case",
}
"""Why values differ; numbers are those of the faults in the project's list of facts about both papers."""
OWN = ("words", "negative", "labels", "headings", "box")
"""Reasons that are choices of this package."""


class Case(NamedTuple):
    reward: str
    what: str
    answer: str
    """the whole completion, or what stands where the format has its answer"""
    truth: Any
    theirs: float | str
    ours: float
    why: str = ""


def boxes(*rows: tuple[str, Sequence[Any]], fence: bool = True) -> str:
    content = json.dumps([{"bbox_2d": list(box), "label": label} for label, box in rows])
    return f"```json\n{content}\n```" if fence else content


def thought(content: str) -> str:
    return AnswerFormat.TAGS.write(content, "hm")


BOX = (10.0, 10.0, 50.0, 50.0)
JSON_BOX = '{"bbox_2d": [10, 10, 50, 50]}'
REC = [
    Case("iou", "the true box", thought("[10,10,50,50]"), BOX, 1, 1),
    Case("iou", "the same in JSON", thought(JSON_BOX), BOX, 1, 1),
    Case("iou", "its left half", thought("[10,10,30,50]"), BOX, 0.5, 0.5),
    Case("iou", "moved by half on both axes", thought("[30,30,70,70]"), BOX, 1 / 7, 1 / 7),
    Case("iou", "elsewhere", thought("[60,60,70,70]"), BOX, 0, 0),
    Case("iou", "corners the wrong way round", thought("[50,50,10,10]"), BOX, 0, 0),
    Case("iou", "five numbers", thought("[1,10,10,50,50]"), BOX, 0, 0),
    Case("iou", "in words", thought("at the top left"), BOX, 0, 0),
    Case("iou", "floats", thought("[10.5,10,50,50]"), BOX, 0, 39.5 / 40, "3"),
    Case("iou", "a true box one pixel wide", thought("[10,10,11,50]"), (10.0, 10.0, 11.0, 50.0), 0, 1, "8"),
    Case("iou", "within the thinking", "<think><answer>[10,10,50,50]</answer></think>", BOX, 1, 0, "7"),
    Case("iou", "two answers", thought("[10,10,50,50]") + "<answer>[0,0,9,9]</answer>", BOX, 1, 0, "7"),
    Case("iou", "“None” where no object fits", thought("None"), "None", FAILS, 1, "absent"),
    Case("format of a box", "as asked for, in JSON", thought(JSON_BOX), BOX, 1, 1),
    Case("format of a box", "white space around it", f" \n{thought(JSON_BOX)}\n", BOX, 1, 1),
    Case("format of a box", "without thinking", f"<answer>{JSON_BOX}</answer>", BOX, 0, 0),
    Case("format of a box", "no box", thought("at the top left"), BOX, 0, 0),
    Case("format of a box", "no JSON", thought("[10,10,50,50]"), BOX, 0, 1, "box"),
    Case("format of a box", "two answers", thought(JSON_BOX) + "<answer>{}</answer>", BOX, 1, 0, "7"),
    Case("format", "think and answer", thought("yes"), None, 1, 1),
    Case("format", "the answer alone", "<answer>yes</answer>", None, 0, 0),
    Case("format", "a space before and a line's end after", f" {thought('yes')}\n", None, 0, 1, "7"),
    Case("format", "two answers", thought("yes") + "<answer>no</answer>", None, 1, 0, "7"),
]
A, B = ("cat", (0, 0, 10, 10)), ("cat", (20, 20, 40, 45))
B72, DOG = ("cat", (20, 20, 40, 38)), ("dog", (0, 0, 10, 10))
TWO = (Detection("cat", (0.0, 0.0, 10.0, 10.0)), Detection("cat", (20.0, 20.0, 40.0, 45.0)))
CAT_DOG = (TWO[0], Detection("dog", TWO[1].box))
HALF = 51 / 101  # one of two found: precision 1 up to recall .5, that is at 51 of COCO's 101 recalls
COMMA = boxes(A, B).replace("}]", "},]")
UNLABELLED = '```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}, {"bbox_2d": [20, 20, 40, 45]}]\n```'
SINGLE = '```json\n{"bbox_2d": [0, 0, 10, 10], "label": "cat"}\n```'
TEXT_BOX = boxes(A, ("cat", ("20", "20", "40", "45")))
OVD = [
    *(
        Case(reward, "both boxes", thought(boxes(A, B)), TWO, 1, 1)
        for reward in ("map", "map50", "od_length", "weighted_sum")
    ),
    *(Case(reward, "one of two", thought(boxes(A)), TWO, HALF, HALF) for reward in ("map", "map50", "od_length")),
    Case("weighted_sum", "one of two", thought(boxes(A)), TWO, 0.35 + 0.225, 0.35 + 0.225),
    Case("map", "one with overlap .72", thought(boxes(A, B72)), TWO, (1 + HALF) / 2, (1 + HALF) / 2),
    Case("map50", "one with overlap .72", thought(boxes(A, B72)), TWO, 1, 1),
    Case("weighted_sum", "one with overlap .72", thought(boxes(A, B72)), TWO, 0.602 + 0.3, 0.602 + 0.3),
    Case("map", "20 more copies of the last", thought(boxes(A, *[B] * 21)), TWO, 1, 1),
    Case("od_length", "20 more copies of the last", thought(boxes(A, *[B] * 21)), TWO, 2 / 22, 2 / 22),
    Case("map", "a dog, whom nobody asked for", thought(boxes(A, B, DOG)), TWO, 1, 0.5, "2"),
    Case("map50", "a dog, whom nobody asked for", thought(boxes(A, B, DOG)), TWO, 1, 0.5, "2"),
    Case("od_length", "a dog, whom nobody asked for", thought(boxes(A, B, DOG)), TWO, 2 / 3, 1 / 3, "2"),
    Case("weighted_sum", "a dog where a cat is", thought(boxes(DOG)), TWO[:1], 0.3, 0, "2"),
    Case("weighted_sum", "labels exchanged", thought(boxes(DOG, B)), CAT_DOG, 0.3, 0.3),
    Case("weighted_sum", "“Cat” for “cat”", thought(boxes(("Cat", A[1]))), TWO[:1], 1, 1),
    Case("map", "“Cat” for “cat”", thought(boxes(("Cat", A[1]))), TWO[:1], 0, 1, "labels"),
    *(
        Case(reward, "“None” where there is none", thought("None"), (), 1, 1)
        for reward in ("map", "od_length", "weighted_sum")
    ),
    *(
        Case(reward, "a box where there is none", thought(boxes(A)), (), 0, 0)
        for reward in ("map", "od_length", "weighted_sum")
    ),
    *(Case(reward, "“None” where there are two", thought("None"), TWO, 0, 0) for reward in ("map", "od_length")),
    *(
        Case(reward, "no list where there is none to be found", thought("no idea"), (), 1, 0, "1")
        for reward in ("map", "od_length")
    ),
    *(
        Case(reward, "no fence", thought(boxes(A, B, fence=False)), TWO, 0, 1, "3")
        for reward in ("map", "od_length", "weighted_sum")
    ),
    Case("map", "a trailing comma", thought(COMMA), TWO, 0, 1, "3"),
    Case("map", "a single object", thought(SINGLE), TWO[:1], 0, 1, "3"),
    Case("map", "a box without a label", thought(UNLABELLED), TWO, HALF, 0, "3"),
    Case("map", "a box of texts", thought(TEXT_BOX), TWO, HALF, 1, "3"),
    Case(
        "map", "a box with corners the wrong way round", thought(boxes(A, ("cat", (40, 45, 20, 20)))), TWO, HALF, 0, "4"
    ),
    Case("repetition", "no box twice", thought(boxes(A, B)), TWO, 0, 0),
    Case("repetition", "one of three boxes twice", thought(boxes(A, A, B)), TWO, -1 / 3, -1 / 3),
    Case("repetition", "22 boxes, two of them distinct", thought(boxes(A, *[B] * 21)), TWO, -20 / 22, -20 / 22),
    Case("repetition", "six words, said twice", "a b c d e f A B C D E F", TWO, -1 / 7, -1 / 7),
    Case("repetition", "five words", "a b c d e", TWO, 0, 0),
    Case("repetition", "nothing", "", TWO, 0, 0),
]
RIGHT, WRONG = thought(boxes(A, B)), thought(boxes(("cat", (60, 60, 90, 90))))
LENGTH = [
    Case("length 0", "right", RIGHT, TWO, 1, 1),
    Case("length 512", "right", RIGHT, TWO, 0.75, 0.75),
    Case("length 1024", "right", RIGHT, TWO, 0.5, 0.5),
    Case("length 2048", "right", RIGHT, TWO, 1, 0.5, "5"),
    Case("length 0", "wrong", WRONG, TWO, 1, 0, "5"),
    Case("length 512", "wrong", WRONG, TWO, 0.75, -0.25, "5"),
    Case("length 1024", "wrong", WRONG, TWO, 0.5, -0.5, "5"),
]
B_IS_RIGHT, YES, NO, LONG = (
    Answer(*pair) for pair in (("B", "choice"), ("yes", "yes_no"), ("no", "yes_no"), ("13 cm", "numeric"))
)  # type: ignore[arg-type]
WORD = Answer("cat", "exact")
SHORT = [
    Case("accuracy: choice", "B", thought("B"), B_IS_RIGHT, 1, 1),
    Case("accuracy: choice", "The answer is B.", thought("The answer is B."), B_IS_RIGHT, 1, 1),
    Case("accuracy: choice", "C", thought("C"), B_IS_RIGHT, 0, 0),
    Case("accuracy: choice", "B) cat", thought("B) cat"), B_IS_RIGHT, 0, 1, "6"),
    Case("accuracy: choice", "(B)", thought("(B)"), B_IS_RIGHT, 0, 1, "6"),
    Case("accuracy: yes or no", "yes", thought("yes"), YES, 1, 1),
    Case("accuracy: yes or no", "No.", thought("No."), YES, 0, 0),
    Case("accuracy: yes or no", "I know: yes", thought("I know: yes"), YES, 0, 1, "6"),
    Case("accuracy: yes or no", "not sure", thought("not sure"), NO, 1, 0, "6"),
    Case("accuracy: number", "13 cm", thought("13 cm"), LONG, 1, 1),
    Case("accuracy: number", "13.0", thought("13.0"), Answer("13", "numeric"), 1, 1),
    Case("accuracy: number", "12 cm for 13 cm", thought("12 cm"), LONG, 0.8, 0, "6"),
    Case("accuracy: words", "cat", thought("cat"), WORD, 1, 1),
    Case("accuracy: words", "bat for cat", thought("bat"), WORD, 2 / 3, 0, "asked"),
    Case(
        "accuracy: words",
        "bat for cat, where likeness is asked for",
        thought("bat"),
        Answer("cat", "edit"),
        2 / 3,
        2 / 3,
    ),
]


def sections(answer: str) -> str:
    return AnswerFormat.SECTIONS.write(answer, "a red cat")


WORDS = Caption(("cat", "red"))
FULL = sections("42")
NO_STEP = FULL.replace("### Step 1:\n", "")
PEBR = [
    *(
        Case("clip", f"cosine {cosine}", str(cosine), None, value, value)
        for cosine, value in ((0.1, 0.25), (0.4, 1), (0.5, 1))
    ),
    Case("clip", "cosine -0.1", "-0.1", None, -0.25, 0, "negative"),
    Case("keywords", "both", FULL, WORDS, 1, 1),
    Case("keywords", "in capitals", FULL.replace("cat", "CAT"), WORDS, 1, 1),
    Case("keywords", "one of two", FULL.replace("cat", "dog"), WORDS, 0.5, 0.5),
    Case("keywords", "neither", FULL.replace("a red cat", "a blue dog"), WORDS, 0, 0),
    Case("keywords", "“cat” in “concatenate”", FULL.replace("cat", "concatenated line"), WORDS, 1, 0.5, "words"),
    Case("sections", "all, in order", FULL, None, 1, 1),
    Case("sections", "no rationales", FULL.replace("### Rationales:", ""), None, 0, 0),
    Case("sections", "one heading twice", FULL.replace("### Step 1:", "### Rationales:\n### Step 1:"), None, 1, 0, "7"),
    Case("sections", "no step 1", NO_STEP, None, 0, 1, "headings"),
    Case("sections", "no answer after the last heading", sections(""), None, 1, 0, "headings"),
    *(
        Case(f"length {tokens}", "a description", FULL, WORDS, value, value)
        for tokens, value in ((100, 1), (512, 1), (1024, 0.5))
    ),
]
EQUAL = [
    ("42", "42"),
    ("42.", "42"),
    ("12 cm", "12"),
    ("1/2", "0.5"),
    ("\\frac{1}{2}", "0.5"),
    ("x=3", "3"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("50%", "50"),
    ("1,000", "1000"),
    ("\\boxed{42}", "42"),
    ("yes", "Yes"),
    ("b", "B"),
    ("(B)", "B"),
    ("$B$", "B"),
]
UNEQUAL = [("3", "4"), ("12 cm", "13 cm"), ("A square", "circle")]
ONLY_OURS = [("B) cat", "B"), ("The answer is B", "B"), ("B.", "B"), ("A circle", "circle")]
MATH = [
    *(Case("accuracy: mathematics", f"{answer} for {truth}", sections(answer), truth, 1, 1) for answer, truth in EQUAL),
    *(
        Case("accuracy: mathematics", f"{answer} for {truth}", sections(answer), truth, 0, 0)
        for answer, truth in UNEQUAL
    ),
    *(
        Case("accuracy: mathematics", f"{answer} for {truth}", sections(answer), truth, 0, 1, "6")
        for answer, truth in ONLY_OURS
    ),
    Case("accuracy: mathematics", "42 for 42, without headings", "42", "42", 1, 0, "1"),
]
PAPERS = {
    "VLM-R1 (arXiv 2504.07615): referring expressions": REC,
    "VLM-R1: detection": OVD,
    "VLM-R1: detection, the length reward at a number of tokens": LENGTH,
    "VLM-R1: short answers": SHORT,
    "PeBR-R1 (arXiv 2509.13031): perception, stage 1": PEBR,
    "PeBR-R1: reasoning, stage 2": MATH,
}
"""Their values: of mathematics from mathruler 0.1.0, by which their code compares; of AP from pycocotools, which the
test runs; all others by hand from the formulas."""


class FixedCosine(ClipScore):
    """The reward of a cosine that is given as the description."""

    def cosines(self, descriptions: Sequence[str], images: Sequence[tuple[Image, ...]]) -> list[float]:
        return [float(description) for description in descriptions]


def ours(case: Case) -> float:
    name, _, tokens = case.reward.partition(" ")
    if name == "clip":
        return FixedCosine().batch([thought("").replace("hm", case.answer)], [None], [()], AnswerFormat.TAGS)[0]
    if name == "length" and isinstance(case.truth, Caption):
        return described_length_reward(case.answer, case.truth, lambda text: int(tokens), AnswerFormat.SECTIONS)
    if name == "length":
        return detection.detection_length_reward(case.answer, case.truth, lambda text: int(tokens))
    if case.reward == "accuracy: mathematics":
        target = MathEnv.read_target(MathEnv(), Row("1", (), "?", case.truth))
        return accuracy_reward(case.answer, target, AnswerFormat.SECTIONS)
    if name == "accuracy:":
        return accuracy_reward(case.answer, case.truth)
    if case.reward in detection.TERMS and case.truth is not None:
        return detection.TERMS[case.reward](case.answer, case.truth)  # type: ignore[operator]
    terms: dict[str, Any] = {"iou": iou_reward, "format of a box": box_format_reward, "format": format_reward}
    if case.reward in terms:
        return float(terms[case.reward](case.answer, case.truth))
    if case.reward == "keywords":
        return described_keywords_reward(case.answer, case.truth, AnswerFormat.SECTIONS)
    assert case.reward == "sections"
    return format_reward(case.answer, None, AnswerFormat.SECTIONS)


CASES = [case for cases in PAPERS.values() for case in cases]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.reward}: {case.what}")
def test_ours_are_as_the_table_says(case: Case) -> None:
    assert ours(case) == pytest.approx(case.ours, abs=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.reward}: {case.what}")
def test_a_difference_has_a_reason(case: Case) -> None:
    equal = case.theirs != FAILS and math.isclose(float(case.theirs), case.ours, abs_tol=1e-9)
    assert equal == (case.why == "")
    assert case.why in ("", *REASONS)


def test_every_reason_and_every_reward_has_a_case() -> None:
    assert {case.why for case in CASES} == {"", *REASONS}
    terms = {case.reward.partition(" ")[0].rstrip(":") for case in CASES}
    others = {"giou", "dynamic_iou"}  # of other papers
    assert terms == {"iou", "format", *detection.TERMS, "accuracy", "clip", "keywords", "sections"} - others


AP_CASES = [case for case in OVD if case.reward in ("map", "map50", "od_length") and case.truth]


@pytest.mark.parametrize("case", AP_CASES, ids=lambda case: f"{case.reward}: {case.what}")
def test_their_ap_is_that_of_pycocotools(case: Case) -> None:
    """Theirs reads the last fenced list, drops what has no known label or no numbers, and gives no list 0."""
    found = re.findall("```json(.*?)```", case.answer, re.DOTALL)
    listed = json.loads(found[-1]) if found and ",]" not in found[-1] else []
    listed = listed if isinstance(listed, list) else []
    labels = sorted({one.label for one in case.truth})
    kept = [one for one in listed if one.get("label") in labels and not isinstance(one["bbox_2d"][0], str)]
    truth = [row(one.label, one.box, labels) | {"id": i, "iscrowd": 0} for i, one in enumerate(case.truth, 1)]
    results = [row(one["label"], one["bbox_2d"], labels) | {"score": 1.0} for one in kept]
    categories = [{"id": i, "name": label} for i, label in enumerate(labels)]
    stored = {"images": [{"id": 0}], "annotations": truth, "categories": categories}
    value = coco_statistics(stored, results)["AP50" if case.reward == "map50" else "AP"] if results else 0.0
    share = min(1, len(case.truth) / max(1, len(listed))) if case.reward == "od_length" else 1
    assert value * share == pytest.approx(case.theirs)


def row(label: str, box: Sequence[float], labels: Sequence[str]) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    bbox, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
    return {"image_id": 0, "category_id": labels.index(label), "bbox": bbox, "area": area}


def test_the_weights_are_the_papers() -> None:
    assert CaptionEnv.default_rewards == {"clip": 0.4, "keywords": 0.4, "format": 0.1, "length": 0.1}
    assert MathEnv.default_rewards == {"accuracy": 0.9, "format": 0.1}
    assert parse_detections("None") == ()


def page() -> str:
    intro = (
        "# The papers' rewards\n\n"
        "The values that the public code of VLM-R1 and PeBR-R1 gives for an answer, and the values of the terms here. "
        "If they\ndiffer, the last column says why.\n"
        "[tests/envs/test_rewards_of_the_papers.py](../tests/envs/test_rewards_of_the_papers.py) has the answers in "
        "full. It\nwrites and checks this page.\n"
    )
    parts = [intro]
    for title, cases in PAPERS.items():
        lines = ["| reward | answer | theirs | here | why |", "|---|---|---|---|---|"]
        for case in cases:
            what = case.what.replace("|", "\\|")
            theirs = case.theirs if isinstance(case.theirs, str) else number(case.theirs)
            lines.append(f"| {case.reward} | {what} | {theirs} | {number(case.ours)} | {case.why} |")
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    faults = "\n".join(f"- **{name}**: {text}." for name, text in REASONS.items())
    parts.append(
        f"## Why\n\nNumbers are faults of their code that are repaired here; "
        f"{', '.join(OWN[:-1])} and {OWN[-1]} are choices.\n\n{faults}\n"
    )
    return "\n".join(parts)


def number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), f"run python {Path(__file__).name} to write it anew"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

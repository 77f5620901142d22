"""Tables by TEDS: worked by hand, against a tree edit distance by its definition, and hostile answers."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.ocr import OCREnv
from vlmenv.envs.rewards.answers import edit_distance
from vlmenv.envs.rewards.tables import MOST_NODES, read_table

pytest.importorskip("table_recognition_metric", reason='needs the extra "tables"')
PICTURE = Image.new("RGB", (40, 30))
TRUE = "<table><tr><td>name</td><td>abcd</td></tr><tr><td>sum</td><td>12</td></tr></table>"  # 7 nodes
Cells = list[list[str]]


def environment(true: str, **options: Any) -> OCREnv:
    rows = [{"image": PICTURE, "question": "?", "answer": true}]
    return OCREnv(dataset=rows, **{"rewards": {"teds": 1.0}} | options)


def teds(answer: str, true: str = TRUE) -> float:
    env = environment(true)
    return env.score(AnswerFormat.TAGS.write(answer), env.source.get(0)).terms["teds"]


def table(cells: Cells) -> str:
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<table>{rows}</table>"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (TRUE, 1),
        (f"Here it is: <html><body>\n{TRUE}</body></html> and so on", 1),
        (TRUE.replace("<table>", "<table border=1>\n ").replace("</td>", " "), 1),  # HTML needs no closing tags
        ("<TABLE><thead><tr><th>name<th><b>abcd</b></thead><tbody><tr><td>sum<td>12</tbody></TABLE>", 1),
        (TRUE.replace("abcd", "abcx"), 1 - 0.25 / 7),
        (TRUE.replace("<td>12", "<td>"), 1 - 1 / 7),
        (TRUE.replace("<td>12", "<td colspan=2>12"), 1 - 1 / 7),
        (TRUE.replace("<td>12", "<td colspan=x rowspan=-1>12"), 1),
        (TRUE.replace("<tr><td>sum</td><td>12</td></tr>", ""), 1 - 3 / 7),
        (TRUE.replace("</table>", "<tr><td>a</td></tr></table>"), 1 - 2 / 9),
        (TRUE.replace("</table>", "<tr><td>a</td><td>b</td><td>c</td></tr></table>"), 0),  # 11 nodes
        ("name abcd sum 12", 0),
        ("<table></table>", 0),
        ("<table><tr></tr></table>", 0),
        ("<td>name</td>", 0),
        ("", 0),
    ],
)
def test_by_hand(answer: str, score: float) -> None:
    assert teds(answer) == pytest.approx(score)


Node = tuple[str | None, tuple["Node", ...]]
"""A cell's text, or None of a row or table; and children."""


def tree(cells: Cells) -> Node:
    return None, tuple((None, tuple((cell, ()) for cell in row)) for row in cells)


def size(forest: tuple[Node, ...]) -> int:
    return sum(1 + size(children) for _, children in forest)


@functools.cache
def distance(a: tuple[Node, ...], b: tuple[Node, ...]) -> float:
    """The least cost of deletions, insertions and changes between forests, by the recursion over their last trees."""
    if not a or not b:
        return float(size(a) + size(b))
    (label, below), (other, others) = a[-1], b[-1]
    if (label is None) != (other is None):
        change = 1.0
    else:
        change = (
            0.0 if label == other else edit_distance(label or "", other or "") / max(len(label or ""), len(other or ""))
        )
    return min(
        distance(a[:-1] + below, b) + 1,
        distance(a, b[:-1] + others) + 1,
        distance(a[:-1], b[:-1]) + distance(below, others) + change,
    )


tables = st.lists(st.lists(st.sampled_from(["a", "ab", "12", "13"]), min_size=1, max_size=3), min_size=1, max_size=3)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(tables, tables)
def test_it_is_the_edit_distance_of_trees(answered: Cells, true: Cells) -> None:
    a, b = (tree(answered),), (tree(true),)
    wanted = 1 - distance(a, b) / max(size(a), size(b)) if size(a) <= 1.5 * size(b) else 0.0
    assert teds(table(answered), table(true)) == pytest.approx(wanted)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([*"<table>", "<table>", "<tr>", "<td>", "</td>", "<td colspan='9'>", "\0", "&#0;", "é"]))
)
def test_any_answer_has_a_score(parts: list[str]) -> None:
    assert 0 <= teds("".join(parts)) <= 1


def test_deep_nesting_has_a_score() -> None:
    assert teds("<table><tr><td>" * 1200) == 0


def test_a_truth_must_be_a_table() -> None:
    with pytest.raises(DataError, match="no <table> with cells"):
        environment("no table").reset()
    with pytest.raises(DataError, match=rf"has 1201 rows and cells; the reward 'teds' takes {MOST_NODES}"):
        environment(table([["1"] * 2] * 400)).reset()
    environment("no table", rewards={"similarity": 1.0}).reset()


def test_a_row_may_choose_it() -> None:
    rows = [{"image": PICTURE, "question": "?", "answer": TRUE, "accu_reward_method": "teds"}]
    env = OCREnv(dataset=rows)
    score = env.score(AnswerFormat.TAGS.write(TRUE.replace("abcd", "abcx")), env.source.get(0))
    assert score.reward == pytest.approx(1 - 0.25 / 7 + 0.1)


def test_its_mean_is_measured() -> None:
    env = environment(TRUE)
    target = env.target(env.source.get(0))
    text = AnswerFormat.TAGS.write(TRUE.replace("abcd", "abcx"))
    assert env.measure(text, target, {"teds": 0.5})["teds/mean"] == 0.5


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "table_recognition_metric", None)
    with pytest.raises(ConfigError, match=r"needs the extra tables: pip install 'vlmenv\[tables\]'"):
        environment(TRUE).reset()


def test_what_is_compared() -> None:
    text, nodes = read_table(
        "x <table><thead><tr><th>a <i>b</i></th></tr></thead><tr><td rowspan=2>1</td></tr></table>"
    )
    assert text == '<html><body><table><tr><td>a b</td></tr><tr><td rowspan="2">1</td></tr></table></body></html>'
    assert nodes == 5

"""Hostile answers: some blocks of each task, and the rule that tells the right content."""

from __future__ import annotations

import importlib
import random
from fractions import Fraction
from types import ModuleType

import pytest
from conftest import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("hostile_answers")


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [
        *("math", "choices", "captions", "boxes", "counts", "points"),
        *("screens", "texts", "segments", "charts", "spans", "searches"),
    ],
)
def test_hostile_answers_do_no_harm(task: str, script: ModuleType) -> None:
    block = script.run_block(task, 10_000, 200)
    assert block.examples == []
    assert (block.raised, block.slow, block.scored, block.answers) == (0, 0, 0, 200)
    assert block.checked > 10
    assert block.hacks > 10


def test_a_block_is_fixed_by_its_number(script: ModuleType) -> None:
    def answers(number: int) -> list[str]:
        rng = random.Random(f"boxes {number}")
        task = script.TASKS["boxes"](rng)
        return [task.answer(rng).text for _ in range(50)]

    assert answers(3) == answers(3)
    assert answers(3) != answers(4)


def test_a_reward_that_takes_anything_is_found(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def always_right(rng: random.Random) -> object:
        task = script.caption_task(rng)
        return script.Task(task.answer, lambda text: 1.0, task.lacks)

    def broken(rng: random.Random) -> object:
        task = script.caption_task(rng)
        return script.Task(task.answer, lambda text: 1 / 0, task.lacks)

    monkeypatch.setitem(script.TASKS, "captions", always_right)
    assert script.run_block("captions", 1, 60).scored > 20
    monkeypatch.setitem(script.TASKS, "captions", broken)
    assert script.run_block("captions", 1, 60).raised == 60


@pytest.mark.parametrize("text", ["12 13", "1, 3", "(7)(5)", "1 22", "twelve", "$120$", "1.2"])
def test_what_lacks_a_number(text: str, script: ModuleType) -> None:
    assert script.lacks_number(Fraction(123 if "3" not in text else 999))(text)


@pytest.mark.parametrize(
    "text", ["123", "1 2 3", "1,23", "１２３", "100+23", "12.3e1", "\\frac{246}{2}", "246÷2", "12³"]
)
def test_what_may_hold_a_number(text: str, script: ModuleType) -> None:
    assert not script.lacks_number(Fraction(123))(text)


def test_blocks_that_are_done_are_not_run_again(script: ModuleType, tmp_path: object) -> None:
    args = script.Args(answers={"captions": 600}, log=tmp_path / "log.jsonl", output=tmp_path / "page.md")  # type: ignore[operator]
    script.main(args)
    log = args.log.read_text()
    assert [line.split('"number": ')[1][0] for line in log.splitlines()] == ["0", "1"]
    script.main(args)
    assert args.log.read_text() == log
    assert "| captions | 1,000 | 0 | 0 |" in args.output.read_text()

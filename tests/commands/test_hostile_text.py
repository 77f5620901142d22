"""Names and data that would change a terminal, through each command that prints them."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmenv.cli import main
from vlmenv.core.text import visible

HOSTILE = (
    "[/b]",
    "[red]x[/blue]",
    "[link=http://a.invalid]y[/link]",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "one\rtwo",
    "one\ntwo\tthree",
    ":smile:",
    "right \u202eto left",
    "\\[/",
    "\u2028line",
    "\x00null\x7f",
    "$\\frac{1$ $x^{$",
    "漢字 \U0001f600",
    "[x1, y1, x2, y2]",
)
NAME = "a [b]\x1b[31m\r\n :smile: \u202e[link=x]"
TINY = ["--device", "cpu", "--max-new-tokens", "4"]
ANYTHING = st.text(st.characters(exclude_categories=()), min_size=1, max_size=30)


def row(i: int, text: str, subject: str | None = None) -> dict[str, Any]:
    told = {"id": f"{i}{text}", "image": "a.png", "problem": f"Which{text}?", "answer": f"red{text}"}
    return told | {"subject": text if subject is None else subject, "completion": f"<answer>{text}</answer>"}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 48)).save(folder / "a.png")
    file = folder / "rows [red]\x1b[1m.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / NAME


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    texts = [*HOSTILE, *("".join(random.Random(i).sample("".join(HOSTILE), 12)) for i in range(5))]
    return write(place, [row(i, text) for i, text in enumerate(texts)])


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")


def printed(capsys: pytest.CaptureFixture[str], *args: object, status: int = 0) -> str:
    """What a command prints: nothing that a terminal obeys."""
    capsys.readouterr()
    try:
        main([str(one) for one in args])
        ended: int | str | None = 0
    except SystemExit as end:
        ended = end.code
    out, err = capsys.readouterr()
    assert (ended or 0) == status, err[-2000:]
    assert harmful(out + err) == []
    return out + err


def harmful(text: str) -> list[str]:
    return sorted({one for one in text if one != "\n" and visible(one) != one})


@pytest.fixture(scope="module")
def run(data: Path, place: Path) -> Path:
    folder = place / "run [bold]"
    options = ["--steps", "1", "--prompts-per-step", "1", "--group-size", "2", "--output", str(folder)]
    main(["train", "--env", "VLM-VQA-v0", "--dataset", str(data), *options, *TINY])
    return folder


@pytest.mark.slow
def test_training_and_what_follows_it(data: Path, run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--env", "VLM-VQA-v0", "--dataset", data, *TINY]
    shown = visible(place)
    small = ["--prompts-per-step", "1", "--group-size", "2"]
    told = printed(capsys, "train", *options, *small, "--steps", "1", "--output", place / "other")
    assert all(f"accuracy/{visible(text)}" in told for text in ("[/b]", "\x1b[31mred\x1b[0m", ":smile:"))
    assert f"model, metrics and pictures are in {shown}/other" in told
    assert "going on" in printed(capsys, "train", "--resume", run, "--steps", "2")
    assert f"writes to {shown}" in printed(capsys, "train", *options, *small, "--dry-run", "--output", place / "third")
    told = printed(capsys, "eval", *options, "--model", run, "--output", place / "measured")
    assert f"the model is {shown}/run [bold]/checkpoints/step-" in told
    assert "accuracy/[x1, y1, x2, y2]" in told
    printed(capsys, "sample", *options, "--output", place / "sampled", "--n", "2")
    told = printed(capsys, "export", run, place / "exported")
    assert f"{shown}/exported holds {shown}/run [bold]" in told
    card = (place / "exported" / "README.md").read_text()
    assert harmful(card) == []


@pytest.mark.slow
def test_the_doctor(data: Path, run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, "doctor", "--env", "VLM-VQA-v0", "--dataset", data, "--model", run, *TINY, status=1)
    assert f"{visible(place)}/run [bold]/checkpoints" in told


@pytest.mark.slow
def test_data(data: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vqa = ["--env", "VLM-VQA-v0"]
    assert "rows [red]\\x1b[1m.jsonl for VLM-VQA-v0" in printed(capsys, "data", "check", data, *vqa)
    for index, text in enumerate(HOSTILE):
        told = printed(capsys, "data", "show", data, *vqa, "--index", index, "--output", place / "shown.png")
        assert f"id: {index}{visible(text)}\n" in told
    told = printed(capsys, "score", data, "--dataset", data, *vqa, "--output", place / "scores.jsonl")
    assert visible(place) in told
    images = [f"{text}.png" for text in (*HOSTILE, "\ud800")]
    broken = write(place / "broken", [{"image": image, "problem": "?", "answer": "a"} for image in images])
    told = printed(capsys, "data", "check", broken, *vqa, "--decode", status=1)
    assert "[x1, y1, x2, y2].png" in told


@settings(max_examples=15, deadline=None)
@given(text=ANYTHING)
@pytest.mark.slow
def test_any_text_in_data(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A property, by commands that load no model."""
    file = write(tmp_path_factory.mktemp("any"), [row(0, text), row(1, text) | {"image": f"{text}.png"}])
    scored = ["score", str(file), "--dataset", str(file), "--env", "VLM-VQA-v0"]
    for command in (["data", "check", str(file), "--env", "VLM-VQA-v0"], scored):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
            main(command)
        assert harmful(out.getvalue()) == []
        assert "Traceback" not in out.getvalue()


@pytest.mark.parametrize("command", ["train", "eval", "data check", "data show", "score", "sample", "doctor", "export"])
def test_an_option_or_a_name_that_is_wrong(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What the reader typed is told again in the error."""
    for options in (["--seed", NAME], [f"--{NAME}"], [NAME]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([*command.split(), *options])
        assert caught.value.code
        out, err = capsys.readouterr()
        assert harmful(out + err) == []
        assert "Traceback" not in err

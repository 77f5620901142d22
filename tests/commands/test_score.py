from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from vlmenv.cli import main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three boxes to find."""
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    rows = [{"id": f"r{i}", "image": "a.png", "problem": "it", "solution": [10, 10, 50, 50]} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def answers(data: Path, *lines: object) -> str:
    file = data.with_name("answers.jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def scored(data: Path, file: str, *options: str) -> list[dict]:
    output = data.with_name("scored.jsonl")
    main(["score", file, "--dataset", str(data), "--output", str(output), *options])
    return [json.loads(line) for line in output.read_text().splitlines()]


RIGHT, HALF = "<answer>[10, 10, 50, 50]</answer>", "<answer>[10, 10, 50, 30]</answer>"


def test_answers_are_scored_by_every_term_and_held_against_a_verdict(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": "r2", "response": RIGHT, "mine": 1}, {"id": "r0", "response": HALF, "mine": False}]
    found = scored(data, answers(data, *lines), "--verdict", "mine", "--rewards", "iou", "1", "format", "0.5")
    assert [(one["id"], one["rewards"]["iou"], one["mine"]) for one in found] == [("r2", 1.0, 1), ("r0", 0.5, False)]
    out = " ".join(capsys.readouterr().out.split())
    assert "'mine' agrees with iou on 50.0% of 2 answers" in out
    assert "r0: iou 0.5, mine False" in out
    assert "reward" in out


def test_answers_to_episodes_of_several_turns_are_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_text(json.dumps({"image": "a.png", "problem": "Which colour?", "answer": "black"}))
    file = answers(data, "<answer>black</answer>")
    with pytest.raises(SystemExit):
        scored(data, file, "--env", "VLM-Zoom-v0")
    assert "a line is one answer: give --max-turns 1" in " ".join(capsys.readouterr().err.split())
    assert len(scored(data, file, "--env", "VLM-Zoom-v0", "--max-turns", "1")) == 1


@pytest.mark.parametrize(
    "lines",
    [
        [RIGHT, HALF, RIGHT],
        [{"completion": RIGHT}, {"completion": HALF}, {"completion": RIGHT}],
        [{"index": 0, "answer": RIGHT}, {"index": 1, "answer": HALF}, {"index": 2, "answer": RIGHT}],
    ],
)
def test_lines_answer_in_order_or_by_index(data: Path, lines: list[object]) -> None:
    assert [one["rewards"]["iou"] for one in scored(data, answers(data, *lines))] == [1.0, 0.5, 1.0]


def test_bare_answers_are_put_into_the_tasks_format(data: Path) -> None:
    bare = ["[10, 10, 50, 50]"] * 3
    assert all(one["rewards"] == {"iou": 1.0, "format": 1.0} for one in scored(data, answers(data, *bare), "--bare"))


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["a"], [], "1 answers, but 3 samples: give the 'id' or 'index'"),
        ([{"id": "other", "answer": "a"}], [], "answers.jsonl:1: no sample has the id 'other'"),
        ([{"index": 3, "answer": "a"}], [], "answers.jsonl:1: there is no sample 3"),
        ([{"id": "r0", "said": "a"}], [], "no answer under completion, .* it has id, said: name one by --column"),
        ([{"id": "r0", "answer": "a"}], ["--verdict", "mine"], "no verdict under 'mine'"),
        ([3], [], "a line is an object with an answer, or a text"),
    ],
)
def test_lines_that_cannot_be_scored_are_named(
    data: Path, lines: list[object], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["score", answers(data, *lines), "--dataset", str(data), *options])

    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_one_sample_is_shown_to_the_last_token(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = data.with_name("picture.png")
    main(["data", "show", str(data), "--index", "1", "--output", str(picture)])
    out = capsys.readouterr().out
    assert "id: r1" in out
    assert "image_pad" in out
    assert "[10,10,50,50]" in out.replace(" ", "")
    with Image.open(picture) as drawn:
        assert min(drawn.size) >= 100


def test_other_layouts_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    box = "<bndbox><xmin>10</xmin><ymin>10</ymin><xmax>50</xmax><ymax>50</ymax></bndbox>"
    size = "<size><width>100</width><height>100</height><depth>3</depth></size>"
    xml = f"<annotation><filename>a.png</filename>{size}<object><name>cat</name>{box}</object></annotation>"
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "a.xml").write_text(xml)
    main(["data", "convert", str(tmp_path / "voc"), str(tmp_path / "rows.jsonl"), "--images", str(tmp_path)])
    assert "voc: 1 rows with 1 boxes" in capsys.readouterr().out
    main(["data", "check", str(tmp_path / "rows.jsonl"), "--env", "VLM-OVD-v0", "--decode"])

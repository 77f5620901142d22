"""Files of data that are not as they should be: what is told, by file and line, and what is read all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmenv.core.errors import DataError
from vlmenv.envs.making import make_envs


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image": "a.png", "problem": f"Where {number}?", "answer": "[1, 2, 30, 40]"} | changes


GOOD = "".join(json.dumps(row(i)) + "\n" for i in range(3))
DEEP = json.dumps(row(3))[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
TWICE = json.dumps(row(3))[:-1] + ', "answer": "[5, 6, 7, 8]"}\n'
LONG = json.dumps(row(3))[:-1] + ', "x": ' + "9" * 5000 + "}\n"
BROKEN = {
    "nested too deeply": (GOOD + DEEP, ":4: the line is not JSON: it is nested too deeply"),
    "a key twice": (GOOD + TWICE, ":4: the line is not JSON: the key 'answer' stands twice"),
    "a number of 5000 digits": (GOOD + LONG, ":4: the line is not JSON: Exceeds the limit"),
    "Latin-1": (
        (GOOD + json.dumps(row(3), ensure_ascii=False).replace("W", "Ü")).encode("latin-1"),
        ":4: the line is not",
    ),
    "UTF-16": (GOOD.encode("utf-16"), ":1: the line is not text in UTF-8"),
    "NaN in a box": (GOOD + json.dumps(row(3, answer=[1, 2, float("nan"), 4])), ":4"),
    "infinity in a box": (GOOD + json.dumps(row(3, answer=[1, 2, float("inf"), 4])), ":4"),
    "beyond floats": (GOOD + json.dumps(row(3, answer=[1, 2, 10**400, 4])), ":4"),
    "no rows": ("", "the data set has no rows"),
    "blank lines": ("\n \n\n", "the data set has no rows"),
    "an image that is a folder": (GOOD + json.dumps(row(3, image=".")), ":4"),
    "an image that is a device": (GOOD + json.dumps(row(3, image="/dev/zero")), ":4"),
    "an image of a long name": (GOOD + json.dumps(row(3, image="x" * 5000)), ":4"),
    "a NUL in an image's name": (GOOD + json.dumps(row(3, image="a\0.png")), ":4"),
    "an image that is a number": (GOOD + json.dumps(row(3, image=7)), ":4"),
}


def write(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def questions(file: Path, **options: Any) -> list[str]:
    envs = make_envs("VLM-REC-v0", 1, dataset=[str(file)], **options)
    try:
        source = envs.task.source
        return [source.get(index).question for index in range(source.size or 0)]
    finally:
        envs.close()


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_is_told_with_its_line_and_left_out_if_asked(fault: str, tmp_path: Path) -> None:
    content, told = BROKEN[fault]
    file = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        questions(file)
    assert told in str(caught.value)
    assert str(file) in str(caught.value)
    if "no rows" not in told and fault != "UTF-16":
        assert questions(file, skip_broken=True) == [f"Where {i}?" for i in range(3)]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.strip().encode(),
        GOOD.encode() + b"\n\n",
    ],
    ids=["a byte order mark", "CRLF", "no end of line at the end", "blank lines at the end"],
)
def test_what_is_only_written_otherwise_is_read(content: bytes, tmp_path: Path) -> None:
    assert questions(write(tmp_path, content)) == [f"Where {i}?" for i in range(3)]


@pytest.mark.parametrize("name", ["with space", "Grüße 漢字", "two\nlines", "-x", "a'b\"c", "[b] *?"])
def test_a_path_may_have_any_characters(name: str, tmp_path: Path) -> None:
    assert len(questions(write(tmp_path / name, GOOD, f"{name}.jsonl"))) == 3


@pytest.mark.parametrize("content", ["[1, 2", '{"a": ', "3", '[{"a": 1, "a": 2}]', "[" * 100_000, "", b"\xff\xfe["])
def test_a_document_that_is_no_list_of_rows_is_told(content: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.json"):
        questions(write(tmp_path, content, "rows.json"))


def test_a_link_to_itself_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        questions(tmp_path / "rows.jsonl")

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlmenv.core.errors import DataError
from vlmenv.core.files import atomic_folder, jsonable, read_object, read_objects, readable_objects, write_atomic


def test_a_file_is_complete_or_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "new \ud800")
    assert not list(tmp_path.iterdir())
    write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "new \ud800")
    assert file.read_text() == "old"
    write_atomic(file, "größer")
    assert file.read_bytes() == "größer".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_is_complete_or_stays_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    with atomic_folder(folder) as partial:
        (partial / "old").write_text("old")
        assert not folder.exists()
    with pytest.raises(FileNotFoundError), atomic_folder(folder) as partial:
        (partial / "absent" / "new").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["old"]
    with atomic_folder(folder) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("content", [b"\0\0\0", b'{"a"', b"[]", b"3", b"", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_object_is_named_by_file_and_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file} is damaged"):
        read_object(file)
    file.write_bytes(b'{"a": 1}\n' + content + b'\n{"a": 2}\n')
    with pytest.raises(DataError, match=f"{file}:2 is damaged"):
        read_objects(file)
    file.write_bytes(b'{"a": "\xe2\x80\xa8"}\n{"a": 2}\n')
    assert read_objects(file) == [{"a": "\u2028"}, {"a": 2}]


def test_any_value_becomes_json() -> None:
    value = {"a": (1, 2.5, True, None, "x"), 3: [np.float32(0.5), np.int64(7)], "odd": float("inf"), "set": {1}}
    found = jsonable(value)
    assert found == {"a": [1, 2.5, True, None, "x"], "3": [0.5, 7], "odd": "inf", "set": "{1}"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"a": 1}\n[2]\n\xff\n' + b"[" * 100_000 + b'\n{"b": 2}\n{"a": 3}')
    assert list(readable_objects(file)) == [{"a": 1}, {"b": 2}]
    assert list(readable_objects(file, b'"b"')) == [{"b": 2}]
    assert list(readable_objects(tmp_path)) == list(readable_objects(tmp_path / "none")) == []

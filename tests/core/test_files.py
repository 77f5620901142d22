from __future__ import annotations

from pathlib import Path

import pytest

from vlmenv.core.files import write_whole


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "new \ud800")
    assert not file.exists()
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "new \ud800")
    assert file.read_text() == "old"
    write_whole(file, "größer")
    assert file.read_bytes() == "größer".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]

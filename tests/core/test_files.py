from __future__ import annotations

from pathlib import Path

import pytest

from vlmenv.core.files import atomic_folder, write_atomic


def test_a_file_is_complete_or_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "new \ud800")
    assert not file.exists()
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

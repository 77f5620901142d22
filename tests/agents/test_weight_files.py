"""Files of weights for servers: which ones a server reads, and what becomes of those of a trainer that was killed."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmenv.agents.engines import files
from vlmenv.agents.engines.files import NAME, private_folder, remove_stale, roomy, weights_digest
from vlmenv.agents.engines.worker import WeightReceiver


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with private_folder(tmp_path) as made:
        (made / NAME).write_bytes(b"weights")
        yield made


def test_the_folder_is_private_and_goes(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        with private_folder(tmp_path) as one, private_folder(tmp_path) as other:
            assert stat.S_IMODE(one.stat().st_mode) == 0o700
            assert one.name != other.name
    finally:
        os.umask(former)
    assert not list(tmp_path.iterdir())


def test_a_trainers_file_is_read(folder: Path) -> None:
    assert weights_digest(folder / NAME) == hashlib.sha256(b"weights").hexdigest()


def opened_to_others(folder: Path) -> Path:
    folder.chmod(0o750)
    return folder / NAME


def linked(folder: Path) -> Path:
    (folder / "other").write_bytes(b"weights")
    (folder / NAME).unlink()
    (folder / NAME).symlink_to(folder / "other")
    return folder / NAME


def in_a_linked_folder(folder: Path) -> Path:
    link = folder.parent / "vlmenv-weights-link"
    link.symlink_to(folder)
    return link / NAME


def a_pipe(folder: Path) -> Path:
    (folder / NAME).unlink()
    os.mkfifo(folder / NAME)
    return folder / NAME


def of_another_name(folder: Path) -> Path:
    (folder / NAME).rename(folder / "id_rsa")
    return folder / "id_rsa"


def in_another_folder(folder: Path) -> Path:
    other = folder.parent / ".ssh"
    other.mkdir(mode=0o700)
    (folder / NAME).rename(other / NAME)
    return other / NAME


def to_zeros(folder: Path) -> Path:
    (folder / NAME).unlink()
    (folder / NAME).symlink_to("/dev/zero")
    return folder / NAME


REFUSED: list[Any] = [
    opened_to_others, linked, in_a_linked_folder, a_pipe, of_another_name, in_another_folder, to_zeros,
    lambda folder: Path("/dev/zero"), lambda folder: folder, lambda folder: folder / ".." / folder.name / ".." / NAME,
]  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_other_files_are_not_read(change: Any, folder: Path) -> None:
    with pytest.raises(PermissionError):
        weights_digest(change(folder))
    assert WeightReceiver().vlmenv_overwrite(str(change(folder) if change is REFUSED[-1] else folder), "")["fault"]


def test_a_checksum_is_not_told(folder: Path) -> None:
    fault = WeightReceiver().vlmenv_overwrite(str(folder / NAME), "0" * 64)["fault"]
    assert fault == f"{folder / NAME} is not the file that the trainer wrote: its SHA-256 differs"


def test_what_killed_trainers_have_left_goes_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_IN_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    places = [tmp_path / "shm", tmp_path / "tmp", tmp_path / "given"]
    for place in places:
        place.mkdir()
        for name in ("vlmenv-weights-old", "vlmenv-weights-open", "vlmenv-weights-new", "other"):
            (place / name).mkdir(mode=0o700)
            (place / name / NAME).write_bytes(b"weights")
            if not name.endswith("new"):
                os.utime(place / name, (1.0, 1.0))
        (place / "vlmenv-weights-open").chmod(0o755)
        (place / "vlmenv-weights-link").symlink_to(place / "other")
    kept = {"vlmenv-weights-open", "vlmenv-weights-new", "vlmenv-weights-link", "other"}
    with private_folder(places[0]) as living:
        os.utime(living, (1.0, 1.0))
        remove_stale(places[2])
        assert {one.name for one in places[0].iterdir()} == kept | {living.name}
        assert [{one.name for one in place.iterdir()} for place in places[1:]] == [kept] * 2
        assert all((place / name / NAME).exists() for place in places for name in kept)


def test_that_of_a_killed_process_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vlmenv.agents.engines.files import private_folder\n"
        "with private_folder(Path(sys.argv[1])) as folder: print(folder, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        monkeypatch.setattr(files, "_YOUNG", -1.0)
        remove_stale(tmp_path)
        assert folder.is_dir()
        process.send_signal(signal.SIGKILL)
    remove_stale(tmp_path)
    assert not folder.exists()


def test_it_is_in_memory_if_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_IN_MEMORY", tmp_path)
    assert roomy(1) == tmp_path
    assert roomy(1 << 60) == Path(files.tempfile.gettempdir())

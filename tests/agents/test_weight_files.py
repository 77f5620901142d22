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
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stand_in_server import Worker

from vlmenv.agents.engines import files
from vlmenv.agents.engines.files import NAME, private_folder, remove_stale, roomy, weights_digest, write_file
from vlmenv.agents.lazy_weights import LazyWeights


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
    with pytest.raises(PermissionError):
        Worker(0).read(str(change(folder) if change is REFUSED[-1] else folder), "")


def test_a_checksum_is_not_told(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"differs$") as told:
        Worker(0).read(str(folder / NAME), "0" * 64)
    assert str(told.value) == f"{folder / NAME} is not the file that the trainer wrote: its SHA-256 differs"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_file_is_what_safetensors_reads_and_made_of_one_weight_at_a_time(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {
        "b.turned": torch.randn(5, 3).T,
        "a": torch.randn(7),
        "scalar": torch.randn(()),
        "none": torch.empty(0, 4),
        "half": torch.randn(3).bfloat16(),
        "trained": torch.nn.Parameter(torch.randn(2, 2)),
    }
    asked: list[str] = []

    def make(name: str) -> torch.Tensor:
        asked.append(name)
        return given[name]

    shown = {name: torch.empty_like(tensor, device="meta") for name, tensor in given.items()}
    weights = LazyWeights(shown, {name: lambda name=name: make(name) for name in given})
    told = write_file(tmp_path / NAME, weights, dtype)
    assert asked == list(given)
    assert told == hashlib.sha256((tmp_path / NAME).read_bytes()).hexdigest()
    found = load_file(tmp_path / NAME)
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.detach().to(dtype)), name
    with safe_open(tmp_path / NAME, "pt") as stream:
        assert stream.get_slice("b.turned").get_shape() == [3, 5]


def test_a_written_weight_may_be_freed(tmp_path: Path) -> None:
    """As FSDP2 does with gathered weights: it shrinks their storage."""
    weight = torch.ones(3)
    write_file(tmp_path / NAME, {"weight": weight}, torch.float32)
    weight.untyped_storage().resize_(0)

"""Checksums of checkpoints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from vlmenv.runs.manifest import MANIFEST, damage, read_manifest, write_manifest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "adapter" / "weights").write_bytes(b"abc")
    (tmp_path / "trainer.pt").write_bytes(b"state")
    write_manifest(tmp_path, {"run": "a1", "logs": {"metrics.jsonl": 12}})
    return tmp_path


def manifest(folder: Path) -> dict:
    content = read_manifest(folder)
    assert content is not None
    return content


def test_a_whole_checkpoint_has_its_facts_and_no_damage(checkpoint: Path) -> None:
    content = manifest(checkpoint)
    assert content["run"] == "a1"
    assert content["files"]["adapter/weights"] == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert damage(checkpoint, content) is None


@pytest.mark.parametrize("name", ["model.safetensors", "adapter/weights", "trainer.pt"])
@pytest.mark.parametrize("place", [0, -1])
def test_every_flipped_bit_cut_and_removal_is_found(checkpoint: Path, name: str, place: int) -> None:
    file, content = checkpoint / name, manifest(checkpoint)
    whole = bytearray(file.read_bytes())
    flipped = bytearray(whole)
    flipped[place] ^= 1
    file.write_bytes(flipped)
    assert damage(checkpoint, content) == f"{name} has other bytes than were written"
    assert (damage(checkpoint, content, model=True) is None) == name.endswith(".pt")
    file.write_bytes(whole[:-1])
    assert damage(checkpoint, content) == f"{name} has {len(whole) - 1} bytes, and had {len(whole)}"
    file.unlink()
    assert damage(checkpoint, content) == f"{name} is missing"


def test_every_change_of_the_manifest_is_found(checkpoint: Path) -> None:
    file = checkpoint / MANIFEST
    text = file.read_text()
    for changed in (text[:-20], text.replace("a1", "a2"), "", "[]", "null", json.dumps({"sha256": "", "content": {}})):
        file.write_text(changed)
        with pytest.raises(ValueError, match=MANIFEST):
            read_manifest(checkpoint)
    file.unlink()
    assert read_manifest(checkpoint) is None

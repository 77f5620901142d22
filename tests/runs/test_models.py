"""A run's folder as a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmenv.core.errors import ModelError
from vlmenv.runs.manifest import write_manifest
from vlmenv.runs.models import checkpoint_of


def test_a_damaged_model_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ModelError, match="no checkpoint yet"):
        checkpoint_of(str(tmp_path))
    folders = [tmp_path / "checkpoints" / f"step-{step}" for step in (1, 9, 10)]
    for folder in folders:
        folder.mkdir(parents=True)
        for name in ("trainer.pt", "model.safetensors"):
            (folder / name).write_text(name)
        if folder.name != "step-1":  # which an earlier version wrote
            write_manifest(folder, {})
    (folders[2] / "trainer.pt").write_text("something else")  # which is no part of the model
    assert checkpoint_of(str(tmp_path)) == (folders[2], "newest checkpoint (step 10)")
    (folders[2] / "model.safetensors").write_text("something else")
    assert checkpoint_of(str(tmp_path)) == (folders[1], "newest whole checkpoint (step 9)")
    (folders[1] / "model.safetensors").unlink()
    assert checkpoint_of(str(tmp_path)) == (folders[0], "newest whole checkpoint (step 1)")
    (folders[0] / "trainer.pt").unlink()
    with pytest.raises(ModelError, match=r"no whole checkpoint.*step-10: model\.safetensors has"):
        checkpoint_of(str(tmp_path))

"""A run's folder as a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmenv.algos import OPDConfig
from vlmenv.cli import main
from vlmenv.core.console import open_console
from vlmenv.core.errors import ModelError
from vlmenv.options.train import TrainConfig, default_config
from vlmenv.runs.manifest import write_manifest
from vlmenv.runs.models import checkpoint_of, with_teacher


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


def test_a_teacher_is_its_checkpoint_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/T/checkpoints/step-2")
    folder.mkdir(parents=True)
    for name in ("../../config.yaml", "trainer.pt", "model.safetensors"):
        (folder / name).touch()
    console = open_console(quiet=True)

    def found(teacher: str | None) -> str | None:
        given: TrainConfig[Any] = replace(default_config("opd"), algorithm=OPDConfig(teacher=teacher))
        return with_teacher(given, console).algorithm.teacher  # type: ignore[no-any-return]

    assert found("runs/T") == str(tmp_path / folder)
    assert [found(name) for name in ("builtin", "http://host:1", None)] == ["builtin", "http://host:1", None]
    assert with_teacher(default_config("grpo"), console) == default_config("grpo")


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_a_resumed_run_keeps_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher's run has gone on since, and another file in its place is told of."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    tiny = ["--prompts-per-step", "1", "--group-size", "2", "--eval-limit", "0", "--device", "cpu", "--tracker", "none"]
    main(["train", *tiny, "--steps", "1", "--checkpoint-every", "1", "--output", str(teacher)])
    main(["train", *tiny, "--algo", "opd", "--teacher", str(teacher), "--steps", "1", "--output", str(student)])
    main(["train", "--resume", str(teacher), "--steps", "2"])
    first, second = (teacher / "checkpoints" / f"step-{step}" for step in (1, 2))
    assert second.is_dir()
    capsys.readouterr()
    main(["train", "--resume", str(student), "--steps", "2"])
    assert "teacher" not in capsys.readouterr().out.replace(str(teacher), "")
    assert yaml.safe_load((student / "resolved.yaml").read_text())["opd"]["teacher"] == str(first)
    (first / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    main(["train", "--resume", str(student), "--steps", "3"])
    assert f"the teacher {first} has other weights than then" in capsys.readouterr().out.replace("\n", "")

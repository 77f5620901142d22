"""Room on the disk, estimated before a run."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlmenv.cli import main
from vlmenv.options.train import LoggingOptions, MeasuringOptions, default_config
from vlmenv.runs.room import Need, Size
from vlmenv.runs.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_pictures")

Usage = namedtuple("Usage", "total used free")
TINY = ["--prompts-per-step", "2", "--group-size", "4", "--eval-limit", "4", "--device", "cpu", "--steps", "3"]
KINDS = {
    "all weights": [],
    "bf16": ["--save-dtype", "bf16"],
    "adapters": ["--lora-rank", "4"],
    "frozen": ["--freeze-vision"],
    "critic": ["--algo", "ppo"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_what_a_checkpoint_takes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = list[Size]()
    measure = Size.of
    monkeypatch.setattr(Size, "of", lambda *of: sizes.append(measure(*of)) or sizes[0])
    main(["train", "--output", str(tmp_path / "run"), *TINY, *KINDS[kind]])
    folder = tmp_path / "run" / "checkpoints" / "step-3"
    taken = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert abs(sizes[0].model + sizes[0].training - taken) < 0.05 * taken + 100_000  # names and shapes of small tensors
    assert "disk: a checkpoint takes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_dry_run_tells_the_same_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the model's weights, for each kind of training, and for adapters of an earlier run."""
    told = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))
    monkeypatch.setattr("vlmenv.commands.train.forecast_here", lambda *_: None)  # of memory: seconds for each
    made = str(tmp_path / "lora")
    short = [*TINY, "--steps", "1", "--eval-limit", "0"]
    main(["train", "--output", made, *short, *KINDS["adapters"]])
    for kind in [*KINDS.values(), ["--model", made]]:
        capsys.readouterr()
        for more in (["--dry-run"], []):
            main(["train", "--output", str(tmp_path / f"run-{len(told)}"), *short, *kind, *more])
            lines = " ".join(capsys.readouterr().out.split())
            told.append(lines[lines.index("disk: a checkpoint") : lines.index("are free")])
        assert told[-2] == told[-1]
        assert not (tmp_path / f"run-{len(told) - 2}").exists()
    assert len(set(told)) == 4  # adapters take the same in either way, and a value head next to nothing


def test_the_number_of_checkpoints_at_a_time(tmp_path: Path) -> None:
    size, run = Size(10, 20), RunFolder(tmp_path)

    def need(logging: LoggingOptions, **measuring: Any) -> Need:
        config = default_config()
        steps = replace(config.trainer, steps=100)
        return Need.of(
            size, replace(config, logging=logging, trainer=steps, measuring=MeasuringOptions(**measuring)), run
        )

    assert need(LoggingOptions()).bytes == 3 * 30  # two are kept, one is being written
    assert need(LoggingOptions(keep=5)).bytes == 6 * 30
    assert need(LoggingOptions(checkpoint_every=30)).bytes == 4 * 30  # after 30, 60, 90 and 100
    assert need(LoggingOptions(checkpoint_every=30, keep=1)).bytes == 2 * 30
    assert need(LoggingOptions(keep=1), eval_every=10).bytes == 2 * 30 + 2 * 10
    there = tmp_path / "checkpoints" / "step-5"
    there.mkdir(parents=True)
    (there / "trainer.pt").write_bytes(bytes(25))
    assert need(LoggingOptions()).bytes == 3 * 30 - 25


def test_a_run_that_does_not_fit_is_refused_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2e6, 1e6, 1e6))
    with pytest.raises(SystemExit):
        main(["train", "--output", str(tmp_path / "run"), *TINY])
    told = " ".join(capsys.readouterr().err.split())
    assert "the disk has too little room" in told
    assert "3 at a time, one being written take" in told
    assert "1 MB are free. Lower --keep" in told
    assert not (tmp_path / "run" / "before").exists()


def test_a_model_that_could_not_be_saved_is_refused_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlmenv.agents.saving.stored_weights", lambda folder: {})
    with pytest.raises(SystemExit):
        main(["train", "--output", str(tmp_path / "run"), *TINY])
    assert "could not be saved as they came" in capsys.readouterr().err
    assert not (tmp_path / "run" / "before").exists()

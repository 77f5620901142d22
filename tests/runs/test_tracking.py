from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

from vlmenv.cli import main
from vlmenv.runs.run_folder import RunFolder
from vlmenv.runs.tracking import Tracking, shown_samples

pytestmark = pytest.mark.usefixtures("without_pictures")

TINY = ["--prompts-per-step", "2", "--group-size", "4", "--eval-limit", "0", "--device", "cpu"]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


Shown = dict[str, list[tuple[int, Any]]]
"""Of each tag, steps and values."""


def events(run: Path) -> Shown:
    """What TensorBoard shows of a run."""
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    return {tag: [(e.step, make_ndarray(e.tensor_proto)) for e in read.Tensors(tag)] for tag in read.Tags()["tensors"]}


def first_answers(run: Path, step: int) -> list[dict[str, Any]]:
    """The first answer to each of a step's two samples."""
    return [row for row in rows(run / "rollouts.jsonl") if row["step"] == step][::4]


def rendered(answer: dict[str, Any]) -> NDArray[np.uint8]:
    env = gymnasium.make("VLM-REC-v0", render_mode="rgb_array")
    env.reset(options={"index": answer["index"]})
    env.step(answer["completion"])
    picture: Any = env.render()
    return np.asarray(picture)


def decoded(image: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(image)) as picture:
        return np.asarray(picture.convert("RGB"))


def check(shown: Shown, run: Path, samples_at: list[int]) -> None:
    """TensorBoard shows each step's metrics once, and pictures and texts of samples."""
    metrics = rows(run / "metrics.jsonl")
    for name in metrics[0].keys() - {"step"}:
        assert shown[name] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in metrics]
    for i in range(2):
        pictures, texts = shown[f"samples/{i + 1}"], shown[f"samples/{i + 1}/text_summary"]
        assert [step for step, _ in pictures] == [step for step, _ in texts] == samples_at
        for (step, picture), (_, text) in zip(pictures, texts, strict=True):
            answer = first_answers(run, step)[i]
            assert np.array_equal(decoded(picture[2]), rendered(answer))
            assert f"    {answer['completion']}" in text[0].decode()
            assert f"reward {answer['reward']:.3f}" in text[0].decode()


def test_tensorboard_shows_metrics_and_samples(tmp_path: Path) -> None:
    """Samples at the first step, every so many, and at the last."""
    run = tmp_path / "run"
    main(["train", "--steps", "5", "--log-samples", "3", "--output", str(run), *TINY])
    check(events(run), run, [1, 3, 5])


def test_records_of_other_ranks_are_shown_without_their_images() -> None:
    """Records are of all ranks, images of this one alone; what cannot be drawn from its sample is left out."""
    task: Any = gymnasium.make("VLM-REC-v0").unwrapped
    records = [{"index": i, "completion": "<answer>[1,2,3,4]</answer>"} for i in range(3)]
    result: Any = SimpleNamespace(rollouts=SimpleNamespace(records=records, images=[(np.zeros((8, 8, 3), np.uint8),)]))
    assert [record for record, _ in shown_samples(result, {"": task})] == records
    task.unrepeatable = "it does not repeat itself"
    assert [record for record, _ in shown_samples(result, {"": task})] == records[:1]


def test_tensorboard_compares_runs_by_their_options(tmp_path: Path) -> None:
    """Options, and the held-out metrics before and after training, are those of the table of hyperparameters."""
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    options = {"lr": 3e-4, "algo": "grpo", "beta": None}
    tracking = Tracking(accelerator, "tensorboard", RunFolder(tmp_path), options, step=0)
    tracking.compare({"iou/mean": 0.4}, {"iou/mean": 0.6}, 5)
    tracking.close()
    tracking.close()  # the second time nothing happens
    shown = events(tmp_path)
    assert shown["before/iou/mean"] == [(0, pytest.approx(0.4))]
    assert shown["after/iou/mean"] == [(5, pytest.approx(0.6))]
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    told = read.summary_metadata
    experiment = HParamsPluginData.FromString(told["_hparams_/experiment"].plugin_data.content).experiment
    assert {one.name.tag for one in experiment.metric_infos} == {"before/iou/mean", "after/iou/mean"}
    begun = HParamsPluginData.FromString(told["_hparams_/session_start_info"].plugin_data.content).session_start_info
    assert begun.hparams["lr"].number_value == 3e-4
    assert begun.hparams["algo"].string_value == "grpo"


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    """The run lost all after step 2, whose log ends in the middle of a record."""
    run = tmp_path / "run"
    options = ["--steps", "5", "--log-samples", "2", "--checkpoint-every", "2", "--output", str(run)]
    main(["train", *options, *TINY])
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    (log,) = (run / "tensorboard").glob("events*")
    log.write_bytes(log.read_bytes()[:-20])
    main(["train", "--resume", str(run)])
    assert len(list((run / "tensorboard").glob("events*"))) == 2
    check(events(run), run, [1, 2, 4, 5])


@pytest.mark.parametrize(("options", "shown"), [(["--tracker", "none"], False), (["--log-samples", "0"], True)])
def test_what_is_not_wanted_is_not_told(options: list[str], shown: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["train", "--steps", "1", "--output", str(run), *options, *TINY])
    assert (run / "tensorboard").exists() == shown
    assert not shown or not [tag for tag in events(run) if tag.startswith("samples")]


def test_a_tracker_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told before anything is loaded, such as a model that is not there either."""

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("vlmenv.runs.tracking.version", version)
    with pytest.raises(SystemExit):
        main(["train", "--tracker", "wandb", "--model", "./none", "--output", str(tmp_path / "run")])
    assert 'pip install "vlmenv[tracking]"' in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keeps wandb's own files out of the home folder, and its account out of the test."""
    wandb = pytest.importorskip("wandb", reason='needs the extra "tracking"')
    home = tmp_path / "wandb-home"
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield home
    wandb.teardown()  # which forgets its settings too


def test_wandb_shows_metrics_and_samples_and_goes_on(
    tmp_path: Path, wandb_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, for real: what is to be sent is in files, a folder for each start, under one id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    options = ["--steps", "3", "--log-samples", "2", "--checkpoint-every", "2", "--output", str(run)]
    main(["train", "--tracker", "wandb", *options, *TINY])
    shutil.rmtree(run / "checkpoints" / "step-3")
    main(["train", "--resume", str(run)])
    metrics = rows(run / "metrics.jsonl")
    first, second = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name
    for file, steps in ((first, [1, 2, 3]), (second, [3])):
        told, tables = sent(file)
        assert [step for step, values in told if "reward/mean" in values] == steps
        for step, values in told:
            same = [
                name for name in metrics[0] if not name.startswith(("step", "time/", "memory/", "tokens_per_second"))
            ]
            assert {name: values[name] for name in same} == {name: metrics[step - 1][name] for name in same}
        assert [table["data"][0][0] for table, _ in tables] == steps
        for table, pictures in tables:
            check_table(table, pictures, run)
    assert not (run / "tensorboard").exists()


def check_table(table: dict[str, Any], pictures: dict[str, bytes], run: Path) -> None:
    columns = ["step", "id", "picture", "prompt", "completion", "reward", "reward/iou", "reward/format"]
    assert table["columns"] == columns
    assert len(table["data"]) == 2
    for row, answer in zip(table["data"], first_answers(run, table["data"][0][0]), strict=True):
        known = {"step": answer["step"]} | {name: answer[name] for name in ("id", "prompt", "completion", "reward")}
        known |= {f"reward/{name}": value for name, value in answer["rewards"].items()}
        assert {name: row[columns.index(name)] for name in known} == pytest.approx(known, abs=1e-9)
        assert np.array_equal(decoded(pictures[row[2]["path"]]), rendered(answer))


def sent(file: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[dict[str, Any], dict[str, bytes]]]]:
    """What a file of wandb's holds: steps with what was logged in them, and tables with their pictures."""
    from wandb.proto.wandb_internal_pb2 import Record

    told, tables = [], []
    for data in chunks(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            names = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            told.append((record.history.step.num, names))
        elif record.WhichOneof("record_type") == "artifact":
            contents = {one.path: Path(one.local_path).read_bytes() for one in record.artifact.manifest.contents}
            tables.append((json.loads(contents["samples.table.json"]), contents))
    return told, tables


def chunks(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, of checksum, length, kind and content each."""
    position, whole = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its end
            yield whole
            whole = b""


def test_wandb_without_an_account(tmp_path: Path, wandb_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--tracker", "wandb", "--steps", "1", "--output", str(tmp_path / "run"), *TINY])
    message = " ".join(capsys.readouterr().err.split())
    assert "error: tracker wandb cannot start" in message
    assert "WANDB_MODE=offline" in message

"""Lengths of prompts are known before anything is generated, and rows that are too long are dealt with then."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from vlmenv.building import task_arguments
from vlmenv.cli import main
from vlmenv.core.pixels import PixelLimits
from vlmenv.envs.data.dataset import TableSource
from vlmenv.envs.making import make_envs
from vlmenv.options.task import TaskConfig
from vlmenv.runs import lengths as module
from vlmenv.runs.fitting import family_without_weights
from vlmenv.runs.lengths import Lengths, count_tokens

pytestmark = pytest.mark.usefixtures("without_pictures")

QUIET = Console(quiet=True)
TRAIN = ["--device", "cpu", "--max-new-tokens", "24", "--prompts-per-step", "2", "--group-size", "2"]
TRAIN += ["--tracker", "none", "--eval-limit", "0"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMENV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_rows(folder: Path, words: list[int], **more: Any) -> Path:
    """Rows whose questions have some numbers of words, with photos of two sizes in turn."""
    Image.new("RGB", (64, 48)).save(folder / "small.png")
    Image.new("RGB", (1600, 1200)).save(folder / "large.jpg")
    rows = [
        {"id": f"r{i}", "image": ("small.png", "large.jpg")[i % 2], "problem": "tree " * count, "answer": [1, 2, 3, 4]}
        for i, count in enumerate(words)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def counted(file: Path, **options: Any) -> tuple[Any, Any, Lengths]:
    """Task, family, and the lengths of the prompts."""
    config = TaskConfig(model="builtin", **options)
    task, family = make_envs(config.env, 1, dataset=file, **task_arguments(config)).task, family_without_weights(config)
    return task, family, count_tokens(task, family, QUIET)


@pytest.mark.parametrize("limits", [PixelLimits(), PixelLimits(max_pixels=10_000)])
def test_lengths_are_those_of_the_prompts_that_the_model_gets(tmp_path: Path, limits: PixelLimits) -> None:
    task, family, lengths = counted(write_rows(tmp_path, [1, 5, 40, 3]), pixels=limits)
    real = [len(family.encode(task.observe(task.source.get(i))).input_ids) for i in range(4)]
    assert lengths.tokens.tolist() == real
    assert lengths.figures() == {"prompts": 4, "median": sum(sorted(real)[1:3]) // 2, "longest": max(real)} | {
        name: int(np.percentile(real, share)) for name, share in (("p90", 90), ("p99", 99))
    }


def test_no_image_is_decoded(tmp_path: Path) -> None:
    file = write_rows(tmp_path, [1, 2])
    whole = (tmp_path / "large.jpg").read_bytes()
    (tmp_path / "large.jpg").write_bytes(whole[: len(whole) // 2])
    assert not counted(file)[2].faults


def test_counts_are_kept_until_something_that_decides_them_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT", 4)
    file, asked = write_rows(tmp_path, [1, 5, 40, 3]), []
    real = module._counted
    monkeypatch.setattr(module, "_counted", lambda *args: asked.append(args[2]) or real(*args))
    first = counted(file)[2]
    (kept,) = (cache / "lengths").iterdir()
    assert counted(file)[2].tokens.tolist() == first.tokens.tolist()
    assert asked[0] == range(4)
    assert asked[1] != range(4)  # some are tried
    asked.clear()
    assert counted(file, pixels=PixelLimits(max_pixels=10_000))[2].tokens[1] < first.tokens[1]
    Image.new("RGB", (48, 64)).save(tmp_path / "small.png")
    counted(file)
    counted(write_rows(tmp_path, [1, 5, 40, 4]))
    assert asked == [range(4)] * 3
    np.save(kept, first.tokens + 1)
    write_rows(tmp_path, [1, 5, 40, 3])
    assert counted(file)[2].tokens.tolist() == first.tokens.tolist()


def test_a_row_that_is_too_long_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path, [1, 3000, 2, 3, 4, 2500])
    length = int(counted(file)[2].tokens.max())
    for command in (
        ["train", *TRAIN],
        ["eval", "--device", "cpu", "--max-new-tokens", "24"],
        ["train", *TRAIN, "--dry-run"],
    ):
        with pytest.raises(SystemExit):
            main([*command, "--dataset", str(file), "--output", str(tmp_path / "run")])
        err = " ".join(capsys.readouterr().err.split())
        assert (
            f"rows.jsonl:2 (id r1): the prompt has {length} tokens, which leaves no room for max_new_tokens=24" in err
        )
        assert "1 more of 6 rows" in err
        for option in ("--max-pixels", "--max-prompt-tokens", "--skip-broken", "--max-new-tokens"):
            assert option in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_longer_rows_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run goes as if the longer rows had never been there, also when it is resumed."""
    words = [1, 3000, 2, 3, 200, 4]
    file, run, plain = write_rows(tmp_path, words), tmp_path / "run", tmp_path / "plain"
    most = str(counted(file)[2].tokens[5])
    options = [*TRAIN, "--checkpoint-every", "2", "--max-prompt-tokens", most, "--dataset", str(file)]
    main(["train", *options, "--steps", "2", "--output", str(run)])
    assert f"2 of 6 rows are left out: the prompt has over {int(most):,} tokens" in " ".join(
        capsys.readouterr().out.split()
    )
    record = yaml.safe_load((run / "resolved.yaml").read_text())["record"]
    assert record["left_out"] == {f"the prompt has over {int(most):,} tokens": 2}
    assert record["prompt_tokens"]["prompts"] == 4
    main(["train", "--resume", str(run), "--steps", "4"])
    shown = [one["id"] for one in lines(run / "rollouts.jsonl")]
    assert set(shown) == {"r0", "r2", "r3", "r5"}
    (tmp_path / "few").mkdir()
    short = write_rows(tmp_path / "few", words)
    short.write_text("".join(line + "\n" for i, line in enumerate(short.read_text().splitlines()) if i not in (1, 4)))
    main(["train", *TRAIN, "--steps", "4", "--dataset", str(short), "--output", str(plain)])
    assert [one["id"] for one in lines(plain / "rollouts.jsonl")] == shown
    with pytest.raises(SystemExit):
        main(["train", *options, "--max-prompt-tokens", "3", "--steps", "2", "--output", str(tmp_path / "none")])
    assert "no row is left: all 6 prompts have over 3 tokens" in " ".join(capsys.readouterr().err.split())


def test_there_must_be_rows_to_leave_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", *TRAIN, "--max-prompt-tokens", "100", "--steps", "1"])
    assert "max_prompt_tokens leaves out rows of a data set, and there is none" in capsys.readouterr().err


def test_limits_of_pixels_make_room_and_are_kept(tmp_path: Path) -> None:
    """A folder of photos that does not fit is trained on with fewer pixels, and the saved model sees as few."""
    file, run = write_rows(tmp_path, [2] * 6), tmp_path / "run"
    main(["train", *TRAIN, "--steps", "1", "--dataset", str(file), "--output", str(run), "--max-pixels", "9000"])
    assert yaml.safe_load((run / "resolved.yaml").read_text())["max_pixels"] == 9000
    saved = json.loads((run / "checkpoints" / "step-1" / "preprocessor_config.json").read_text())
    assert saved["size"]["longest_edge"] == 9000


def test_data_check_tells_lengths_with_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path, [1, 3000, 2, 3])

    def check(*options: str) -> str:
        with pytest.raises(SystemExit):
            main(["data", "check", str(file), "--model", "builtin", "--max-new-tokens", "24", *options])
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    told = check()
    assert "4 prompts of " in told
    assert "rows.jsonl:2 (id r1): the prompt has" in told
    assert "in the model's 2048" in told
    assert "in the engine's 60" in check("--engine-length", "60")


def test_samples_of_several_files_are_left_out_by_their_places(tmp_path: Path) -> None:
    first = write_rows(tmp_path, [1, 2, 3])
    (tmp_path / "b").mkdir()
    second = write_rows(tmp_path / "b", [4, 5])
    source = make_envs("VLM-REC-v0", 1, dataset=[first, second], image_root=[tmp_path, tmp_path / "b"]).task.source
    source.leave_out([1, 3], "too long")
    assert [source.get(i).question.count("tree") for i in range(source.size or 0)] == [1, 3, 5]
    assert source.unwanted == {"too long": 2}
    assert isinstance(source.sources[1], TableSource)  # type: ignore[attr-defined]
    assert source.place(2, "r1").endswith("b/rows.jsonl:2 (id r1)")


def write_answers(folder: Path, words: list[int]) -> Path:
    """Rows with reasoning of some numbers of words, which is imitated."""
    file = write_rows(folder, [1] * len(words))
    rows = lines(file)
    for row, count in zip(rows, words, strict=True):
        said = f"<think>{'tree ' * count}</think><answer>[1, 2, 3, 4]</answer>"
        row["messages"] = [{"role": "user", "content": row["problem"]}, {"role": "assistant", "content": said}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_true_answers_that_are_too_long_are_found_before_step_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longest is named, with the count; or they are left out, and the others are imitated."""
    file, run = write_answers(tmp_path, [1, 2, 90, 1, 300, 3]), tmp_path / "run"
    options = ["train", "--algo", "sft", "--device", "cpu", "--max-new-tokens", "64", "--prompts-per-step", "2"]
    options += ["--tracker", "none", "--eval-limit", "0", "--steps", "2", "--dataset", str(file), "--output", str(run)]
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit):
            main([*options, *more])
        err = " ".join(capsys.readouterr().err.split())
        found = re.search(r"rows.jsonl:5 \(id r4\): its true answer has (\d+) tokens; max_new_tokens is 64", err)
        assert found is not None, err
        assert int(found[1]) > 300
        assert "1 more of 6 rows cannot be imitated either" in err
        assert not (run / "metrics.jsonl").exists()
    main([*options, "--skip-broken"])
    assert "2 of 6 rows are left out: their true answers cannot be imitated" in " ".join(
        capsys.readouterr().out.split()
    )
    assert {row["id"] for row in lines(run / "rollouts.jsonl")} <= {"r0", "r1", "r3", "r5"}
    assert len(lines(run / "metrics.jsonl")) == 2

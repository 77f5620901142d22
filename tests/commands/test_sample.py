"""`vlmenv sample`: files by difficulty, the same however often it is cut off and by however many processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import launch, shared
from PIL import Image

from vlmenv.cli import main
from vlmenv.envs.captioning import CaptionEnv
from vlmenv.envs.export import export_sample
from vlmenv.runs.lock import locked

LEVELS = ("easy", "medium", "hard")
TINY = ["--device", "cpu", "--n", "2", "--max-new-tokens", "24", "--batch-size", "8"]


def sample(output: Path, *options: str) -> None:
    main(["sample", *TINY, "--output", str(output), *options])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_levels(levels: dict[str, list[dict[str, Any]]], rows: list[dict[str, Any]]) -> None:
    """The rows are all there, each once, in order, in the level of its pass rate, and with their own keys."""
    for level, found in levels.items():
        for row in found:
            rate = row["pass_rate"]
            assert level == ("easy" if rate == 1 else "hard" if rate == 0 else "medium")
        plain = [{key: value for key, value in row.items() if key != "pass_rate"} for row in found]
        assert plain == [row for row in rows if row in plain]
    assert sum(map(len, levels.values())) == len(rows)


def captions(folder: Path, count: int) -> list[dict[str, Any]]:
    env = CaptionEnv()
    return [export_sample(env, env.source.get(index), folder) | {"split": "x"} for index in range(count)]


def test_conversations_stay_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shared("data/rec/refcocos")
    file = str(source / "samples.jsonl")
    sample(tmp_path / "out", "--dataset", file, "--eval-limit", "8", "--threshold", "0.1")
    levels = {level: lines(tmp_path / "out" / f"{level}.jsonl") for level in LEVELS}
    check_levels(levels, lines(source / "samples.jsonl")[:8])
    assert "right from iou/mean 0.1 on" in " ".join(capsys.readouterr().out.split())
    level = max(levels, key=lambda one: len(levels[one]))
    again = str(tmp_path / "out" / f"{level}.jsonl")
    main(["eval", "--dataset", again, "--image-root", str(source), "--device", "cpu", "--max-new-tokens", "4"])


def test_lists_and_parquet_keep_their_form_and_their_columns(tmp_path: Path) -> None:
    """Rows of PeBR-R1's layout; in parquet the images are within the rows, one of them too small."""
    datasets = pytest.importorskip("datasets")
    rows = captions(tmp_path, 6)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--env", "VLM-Caption-v0", "--measure", "keyword_recall", "--threshold", "0.6"]
    sample(tmp_path / "json", "--dataset", str(tmp_path / "rows.json"), *options)
    found = {level: json.loads((tmp_path / "json" / f"{level}.json").read_text()) for level in LEVELS}
    check_levels(found, rows)

    Image.new("RGB", (20, 96)).save(tmp_path / "small.png")
    stored = [row | {"images": [str(tmp_path / name) for name in row["images"]], "pass_rate": 0.5} for row in rows]
    stored.insert(2, stored[0] | {"qid": "small", "images": [str(tmp_path / "small.png")]})
    table = datasets.Dataset.from_list(stored).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "rows.parquet")
    sample(tmp_path / "parquet", "--dataset", str(tmp_path / "rows.parquet"), *options, "--min-image-side", "28")
    assert sum(map(bool, found.values())) > 1
    for level in [level for level in LEVELS if found[level]]:
        again = datasets.Dataset.from_parquet(str(tmp_path / "parquet" / f"{level}.parquet"))
        kept = [{k: v for k, v in row.items() if k not in ("images", "tolerance")} for row in again]
        assert kept == [{k: v for k, v in row.items() if k not in ("images", "tolerance")} for row in found[level]]
        assert set(again.column_names) == set(stored[0])
        assert all(image.size == (96, 96) for row in again for image in row["images"])


def test_coco_stays_coco(tmp_path: Path) -> None:
    source = shared("data/ovd/tinycoco")
    where = ["--dataset", str(source / "instances.json"), "--image-root", str(source)]
    whole = json.loads((source / "instances.json").read_text())
    where[-1] = str(
        next(path for path in (source, source / "images") if (path / whole["images"][0]["file_name"]).exists())
    )
    sample(
        tmp_path / "out", "--env", "VLM-OVD-v0", *where, "--eval-limit", "5", "--measure", "format", "--threshold", "1"
    )
    levels = {level: json.loads((tmp_path / "out" / f"{level}.json").read_text()) for level in LEVELS}
    check_levels({level: found["images"] for level, found in levels.items()}, whole["images"][:5])
    for found in levels.values():
        assert found["categories"] == whole["categories"]
        ids = {image["id"] for image in found["images"]}
        assert found["annotations"] == [one for one in whole["annotations"] if one["image_id"] in ids]


def test_almost_greedy_answers_are_right_where_greedy_ones_are(tmp_path: Path) -> None:
    """All or none of them, as `vlmenv eval` finds; of built-in samples, which are written as files."""
    sample(tmp_path / "out", "--eval-limit", "12", "--temperature", "1e-6", "--split", "eval")
    main(
        ["eval", "--eval-limit", "12", "--max-new-tokens", "24", "--device", "cpu", "--output", str(tmp_path / "eval")]
    )
    right = [a["id"] for a in lines(tmp_path / "eval" / "answers.jsonl") if a["measures"]["iou/mean"] >= 0.5]
    assert 0 < len(right) < 12
    assert [row["qid"] for row in lines(tmp_path / "out" / "easy.jsonl")] == right
    assert not lines(tmp_path / "out" / "medium.jsonl")
    main(["data", "check", str(tmp_path / "out" / "easy.jsonl"), "--decode"])


def test_several_files_are_divided_each(tmp_path: Path) -> None:
    rows = captions(tmp_path, 5)
    (tmp_path / "a.json").write_text(json.dumps(rows[:2]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")]
    sample(tmp_path / "out", "--env", "VLM-Caption-v0", "--dataset", *files, "--eval-limit", "4")
    check_levels({level: json.loads((tmp_path / "out" / f"{level}-1.json").read_text()) for level in LEVELS}, rows[:2])
    check_levels({level: lines(tmp_path / "out" / f"{level}-2.jsonl") for level in LEVELS}, rows[2:4])


def test_a_killed_run_goes_on_and_processes_change_nothing(tmp_path: Path) -> None:
    """What was written before stays as it was, and the files are those of a run that nothing befell."""
    options = [
        "--eval-limit",
        "40",
        "--part-size",
        "2",
        "--seed",
        "3",
        "--n",
        "4",
    ]  # slow enough to be killed on the way
    sample(tmp_path / "whole", *options)
    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "vlmenv", "sample", *TINY, *options, "--output", str(cut)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(list(cut.glob("parts/[0-9]*.jsonl"))) < 3:  # and not one that is being written
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    written = {file: file.stat().st_mtime_ns for file in cut.glob("parts/[0-9]*.jsonl")}
    assert 3 <= len(written) < 20
    assert not (cut / "easy.jsonl").exists()
    shutil.copytree(cut, tmp_path / "two")
    sample(cut, *options)
    assert all(file.stat().st_mtime_ns == at for file, at in written.items())
    done = launch("ddp", "-m", "vlmenv", "sample", *TINY, *options, "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    for name in (*(f"{level}.jsonl" for level in LEVELS), *(f"parts/{i}-{i + 2}.jsonl" for i in range(0, 40, 2))):
        expected = (tmp_path / "whole" / name).read_text()
        assert (cut / name).read_text() == (tmp_path / "two" / name).read_text() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "0.5"], "out holds results with another temperature, see"),
        (["--n", "3"], "out holds results with another n, see"),
        (["--temperature", "0"], "temperature must be above 0"),
        (["--part-size", "0"], "part_size must be at least 1"),
        (["--measure", "iou/mean"], "measure goes with threshold"),
        (["--measure", "iuo", "--threshold", "1", "--output", "other"], "choose by --measure among iou/mean, accuracy"),
        (["--recipe", "vlm_r1_rec"], "unknown option 'eval_dataset'"),
    ],
)
def test_wrong_input_is_told(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sample(Path("out"), "--eval-limit", "1")
    with pytest.raises(SystemExit):
        sample(Path("out"), "--eval-limit", "1", *options)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_folder_without_results_takes_a_corrected_command(tmp_path: Path) -> None:
    """What was wrong with the first shows only with the first answers."""
    out = tmp_path / "out"
    wrong, right = (["--eval-limit", "1", "--measure", name, "--threshold", "0.5"] for name in ("iuo", "iou/mean"))
    with pytest.raises(SystemExit):
        sample(out, *wrong)
    assert (out / "config.yaml").is_file()
    sample(out, *right)
    assert "measure: iou/mean\n" in (out / "config.yaml").read_text()
    with pytest.raises(SystemExit):
        sample(out, *wrong)


def test_the_folder_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--device", "cpu"])
    assert "output is missing" in capsys.readouterr().err


def test_a_recipe_samples_published_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_data import lay_out

    monkeypatch.chdir(tmp_path)
    lay_out("pebr_r1_sampling", tmp_path)
    small = ["--model", "builtin", "--device", "cpu", "--max-new-tokens", "8", "--output", "sampled"]
    main(["sample", "--recipe", "pebr_r1_sampling", *small])
    config = Path("sampled/config.yaml").read_text()
    assert "temperature: 1.2\n" in config
    assert "top_p: 0.99\n" in config
    rows = json.loads(Path("pebr_grpo_dataset.json").read_text())
    check_levels({level: json.loads(Path(f"sampled/{level}.json").read_text()) for level in LEVELS}, rows)


def test_changed_rows_are_not_mixed_with_earlier_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused, or answered anew: what comes out is what the new rows alone would give."""
    file, out, fresh = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "fresh"
    options = ["--env", "VLM-Caption-v0", "--dataset", str(file), "--part-size", "2", "--threshold", "0.1"]
    rows = captions(tmp_path, 6)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample(out, *options)
    before = {part.name: part.read_bytes() for part in (out / "parts").glob("*.jsonl")}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], *rows[4:1:-1], rows[5]]))
    with pytest.raises(SystemExit):
        sample(out, *options)
    assert "the data set has changed" in " ".join(capsys.readouterr().err.split())
    sample(out, *options, "--data-changed")
    assert "the rows of 2-4 have changed: they are answered anew" in " ".join(capsys.readouterr().out.split())
    after = {part.name: part.read_bytes() for part in (out / "parts").glob("*.jsonl")}
    assert after["0-2.jsonl"] == before["0-2.jsonl"]
    sample(fresh, *options)
    assert after == {part.name: part.read_bytes() for part in (fresh / "parts").glob("*.jsonl")}
    sample(out, *options)  # the checksums are those of the new rows


def test_a_folder_that_is_being_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path, print):
        for command in (["sample", *TINY], ["eval", "--device", "cpu", "--eval-limit", "1"]):
            with pytest.raises(SystemExit):
                main([*command, "--output", str(tmp_path)])
            assert "is written by another run" in " ".join(capsys.readouterr().err.split())

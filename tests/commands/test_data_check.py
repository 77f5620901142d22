"""`vlmenv data check` finds what training would meet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_rows import BROKEN, write_rows
from conftest import shared
from PIL import Image

from vlmenv.cli import main
from vlmenv.core.errors import ConfigError
from vlmenv.envs.ovd import OVDEnv
from vlmenv.envs.rec import RECEnv

SIZE = (640, 480)


def check(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """The status with which a check ends, and what it prints, in one line."""
    status = 0
    try:
        main(["data", "check", *args])
    except SystemExit as ended:
        status = int(ended.code or 0)
    captured = capsys.readouterr()
    return status, " ".join((captured.out + captured.err).split())


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def write_boxes(folder: Path, form: str, count: int = 24, **changes: Any) -> Path:
    """Rows for REC with boxes anywhere in an image; with messages or columns, in turn."""
    Image.new("RGB", SIZE, "red").save(folder / "a.png")
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        (x1, x2), (y1, y2) = np.sort(rng.integers(0, [[600], [440]], (2, 2)), axis=1) + np.array([0, 40])
        edges = np.array([x1, y1, x2, y2], dtype=float)
        parts = edges / [*SIZE, *SIZE]
        forms = {"xyxy": edges, "xywh": edges - [0, 0, x1, y1], "fractions": parts, "norm1000": np.round(parts * 1000)}
        answer = json.dumps(forms[form].tolist())
        turns = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": answer}]
        rows.append(
            {"id": i, "image": "a.png"} | ({"messages": turns} if i % 2 else {"problem": "Where?", "answer": answer})
        )
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row | changes) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("form", ["xyxy", "xywh", "fractions", "norm1000"])
def test_the_form_of_boxes_is_found_and_read(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_boxes(tmp_path, form))
    status, out = check(capsys, file, "--decode")
    assert status == (form != "xyxy")
    assert (f"Read them by --boxes-in {form}" in out) == (form != "xyxy")
    status, out = check(capsys, file, "--decode", "--boxes-in", form)
    assert status == 0
    assert "good │ 24" in out


def test_odd_boxes_are_told_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_boxes(tmp_path, "xyxy")
    rows = lines(file)
    rows[4]["answer"] = "[10, 20, 900, 100]"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = tmp_path / "good.jsonl"
    status, out = check(capsys, str(file), "--decode", "--write", str(good))
    assert status == 1
    assert "rows.jsonl:5 (id 4): the box [10, 20, 900, 100] goes beyond the image of 640 x 480" in out
    assert "boxes beyond the image │ 1" in out
    assert "--boxes-in" not in out
    assert lines(good) == rows[:4] + rows[5:]
    assert check(capsys, str(good), "--decode")[0] == 0


def test_many_odd_boxes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_boxes(tmp_path, "xyxy", count=40)
    rows = [row | {"answer": "[9000, 0, 9100, 1]"} for row in lines(file)]
    for row in rows:
        row.pop("messages", None)
        row["problem"] = "Where?"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out = check(capsys, str(file), "--decode")
    assert out.count("goes beyond") == 20
    assert "… and 20 more rows: boxes beyond the image" in out


def test_photos_that_exif_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_boxes(tmp_path, "xyxy")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE, "red").save(tmp_path / "a.png", exif=exif)
    status, out = check(capsys, str(file), "--decode")
    assert status == 1
    assert "Read them by --box-orientation stored" in out
    assert check(capsys, str(file), "--decode", "--box-orientation", "stored")[0] == 0


def write_coco(folder: Path, bbox: list[float], **image: Any) -> Path:
    Image.new("RGB", SIZE, "red").save(folder / "a.png")
    images = [{"id": 7, "file_name": "a.png"} | image]
    annotations = [{"id": 1, "image_id": 7, "category_id": 1, "bbox": bbox}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dog [/b]"}]}
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    return file


def test_the_sizes_that_coco_tells_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_coco(tmp_path, [10, 20, 30, 40], width=640, height=480)
    status, out = check(capsys, str(whole), "--env", "VLM-OVD-v0", "--decode")
    assert status == 0
    assert "most frequent labels │ dog [/b] (1)" in out
    for width, height in ((320, 240), (480, 640)):
        file = write_coco(tmp_path, [10, 20, 30, 40], width=width, height=height)
        status, out = check(capsys, str(file), "--env", "VLM-OVD-v0", "--decode")
        assert status == 1
        assert f"image 7: the data set says that the image has {width} x {height} pixels, but it has 640" in out
    file = write_coco(tmp_path, [0.1, 0.2, 0.3, 0.4])
    status, out = check(capsys, str(file), "--env", "VLM-OVD-v0", "--decode")
    assert status == 1
    assert "COCO's boxes are x, y, width and height in pixels: rewrite them" in out
    assert "--boxes-in" not in out


PLACES = {
    "VLM-Point-v0": ([[900, 5]], [[600, 5]], "the point or corner [900, 5] goes beyond the image of 640 x 480"),
    "VLM-Seg-v0": ([[1, 1, 9, 1, 9, 500]], [[1, 1, 9, 1, 9, 480]], "[9, 500] goes beyond the image of 640 x 480"),
    "VLM-GUI-v0": ({"action": "click", "point": [-9, 5]}, [9, 5], "[-9, 5] goes beyond the image"),
    "VLM-Temporal-v0": ([2, 9], [1, 3.5], "the span from 2 to 9 seconds goes beyond the video of 3"),
}


@pytest.mark.parametrize("env", PLACES)
def test_places_beyond_images_and_videos_are_told(env: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, right, told = PLACES[env]
    first, *rest = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue", "lime")]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=1000)
    column = "video" if env == "VLM-Temporal-v0" else "image"
    rows = [{column: "a.gif", "question": "?", "answer": answer} for answer in (right, wrong)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out = check(capsys, str(tmp_path / "rows.jsonl"), "--env", env, "--decode")
    assert status == 1
    assert "rows.jsonl:2 (id 1): " in out
    assert told in out
    assert "rows.jsonl:1" not in out


def test_real_data_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for env, name in (("VLM-REC-v0", "rec/refcocos/samples.jsonl"), ("VLM-OVD-v0", "ovd/tinycoco/instances.json")):
        file = shared(f"data/{name}")
        root = file.parent / ("images" if env == "VLM-OVD-v0" else "")
        status, out = check(capsys, str(file), "--env", env, "--decode", "--image-root", str(root))
        assert status == 0, out


def test_duplicate_ids_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_boxes(tmp_path, "xyxy", count=3)
    assert "duplicate ids" not in check(capsys, str(file))[1]
    rows = lines(file)
    rows[2]["id"] = "[red]0"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[2], rows[2]]))
    status, out = check(capsys, str(file))
    assert status == 0
    assert "duplicate ids │ 1: [red]0 (3 rows)" in out
    for row in rows:
        del row["id"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "duplicate ids" not in check(capsys, str(file), str(file))[1]  # numbers are no ids of the rows' own


def test_a_models_processor_tries_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, good = write_rows(tmp_path), tmp_path / "good.jsonl"
    status, out = check(capsys, str(file), "--model", "builtin", "--decode", "--write", str(good))
    assert status == 1
    for index, reason in BROKEN.items():
        assert f"rows.jsonl:{index + 2} (id {index}): " in out
        assert reason in out
    assert "refused by the model │ 3" in out
    assert [row["id"] for row in lines(good)] == [i for i in range(12) if i not in BROKEN]
    assert check(capsys, str(good), "--model", "builtin")[0] == 0
    assert check(capsys, str(good), "--model", "builtin", "--max-new-tokens", "2040")[0] == 1
    assert "goes with model" in check(capsys, str(good), "--max-new-tokens", "2040")[1].replace("go with", "goes with")


def test_no_model_library_is_loaded_unless_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys; from vlmenv.commands.data import parse, run;"
        f"run(parse([{str(write_boxes(tmp_path, 'xyxy'))!r}, '--decode'], 'vlmenv data check'));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_good_rows_are_written_in_their_own_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": "a.png", "problem": "Where?", "answer": answer} for answer in ("[1, 2, 3, 4]", "there")]
    Image.new("RGB", SIZE, "red").save(tmp_path / "a.png")
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    for name in ("good.json", "good.jsonl", "else/good.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        status, out = check(capsys, str(file), "--write", str(tmp_path / name))
        assert status == 1
        assert f"1 good rows are in {tmp_path / name}" in out
        assert ("are read by --image-root" in out) == ("else" in name)
        assert RECEnv(dataset=tmp_path / name, image_root=tmp_path).source.size == 1
    status, out = check(capsys, str(file), str(file), "--write", str(tmp_path / "both.jsonl"))
    assert lines(tmp_path / "both.jsonl") == [rows[0]] * 2
    assert "in their own format" in check(capsys, str(file), "--write", str(tmp_path / "good.parquet"))[1]
    coco = write_coco(tmp_path, [10, 20, 30, 40])
    check(capsys, str(coco), "--env", "VLM-OVD-v0", "--write", str(tmp_path / "good_coco.json"))
    assert OVDEnv(dataset=tmp_path / "good_coco.json").source.size == 1
    file.write_text(json.dumps(rows[1:]))
    assert "no row is good" in check(capsys, str(file), "--write", str(tmp_path / "none.jsonl"))[1]
    assert not (tmp_path / "none.jsonl").exists()


def test_a_task_that_needs_its_data_is_made_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError("this task has no samples of its own")

    monkeypatch.setattr(RECEnv, "builtin_source", refuse)
    assert check(capsys, str(write_boxes(tmp_path, "xyxy")), "--decode")[0] == 0


def test_messages_hold_what_rows_say_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", SIZE, "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "problem": "Where?", "answer": answer} for answer in ("[/b]\x1b[31m", "[1, 2, 3, 4]")]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    assert "the answer '[/b]\\x1b[31m' is" in check(capsys, str(file))[1]
    main(["eval", "--dataset", str(file), "--skip-broken", "--device", "cpu", "--max-new-tokens", "4"])
    assert "the answer '[/b]\\x1b[31m' is" in " ".join(capsys.readouterr().out.split())

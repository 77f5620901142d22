"""What a report is made of, without a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from made_run import embedded, make_run
from PIL import Image
from test_cli import fails

from vlmenv.cli import main
from vlmenv.core.errors import ConfigError
from vlmenv.envs.rec import RECEnv
from vlmenv.runs.report import make_report, packed, thinned, write_report
from vlmenv.runs.report_answers import FIELDS, LONGEST, Answer, embed_pictures, evenly
from vlmenv.runs.report_server import ReportServer

HOSTILE = "</script><script>alert(1)</script><!--\u202e\x1b[31m\ud800" + "é" * 1_000_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run", on_the_way=3, hostile=HOSTILE)


@pytest.fixture(scope="module")
def told(run: Path) -> dict[str, Any]:
    return embedded(make_report([run]))


def completions(told: dict[str, Any], run: int = 0) -> list[dict[str, Any]]:
    return [dict(zip(FIELDS, one, strict=True)) for one in told["runs"][run]["completions"]]


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_runs_its_own_script_alone(run: Path) -> None:
    html = make_report([run])
    page = Elements()
    page.feed(html)
    scripts = [attributes for tag, attributes in page.found if tag == "script"]
    assert scripts == [{"type": "application/octet-stream", "id": "data"}, {"type": "module"}]
    assert not [one for _, one in page.found if one.get("src") or (one.get("href") or "#")[0] not in "#d"]
    assert not [name for _, one in page.found for name in one if name.startswith("on")]
    (policy,) = (one["content"] for tag, one in page.found if tag == "meta" and "http-equiv" in one)
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect-src" not in policy


def test_hostile_text_stays_text(run: Path, told: dict[str, Any]) -> None:
    html = make_report([run])
    assert html.lower().count("</script") == 2
    assert "<script>alert" not in html
    (text,) = (one["text"] for one in completions(told) if "alert" in str(one["text"]))
    head, left_out, tail = text
    assert head.startswith("</script><script>alert(1)</script><!--\\u202e\\x1b[31m\\ud800é")
    assert left_out == len(HOSTILE) - LONGEST
    assert set(tail) == {"é"}


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "&amp;", "\u2028", "\udcff", 'a"b\\'])
def test_any_text_survives_within_a_script_element(text: str) -> None:
    found = packed({"text": text})
    assert re.fullmatch("[A-Za-z0-9+/=]+", found)
    assert embedded(f'<script id="data">{found}</script>') == {"text": text}


def test_what_is_told_is_what_the_files_say(run: Path, told: dict[str, Any]) -> None:
    (one,) = told["runs"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert one["curves"]["step"] == [1, 2, 3, 4, 5, 6]
    assert one["curves"]["values"]["reward/mean"] == [pytest.approx(row["reward/mean"], rel=1e-4) for row in rows]
    before = json.loads((run / "before" / "metrics.json").read_text())["iou/mean"]
    name, first, last, change = one["headline"][0]
    assert (name, change) == ("iou/mean", None)
    assert first == [pytest.approx(before[part], rel=1e-4) for part in ("value", "low", "high")]
    assert [step for step, _ in one["held_out"]] == [0, 3, 6]
    assert last[0] == one["held_out"][-1][1]["iou/mean"][0]
    assert one["options"]["epsilon"] == "0.2"
    assert "record" not in one["options"]
    assert one["machine"]["seconds"] == {"rollout": 3.0, "update": 1.5}
    assert one["totals"] == {"measured": 16, "training": 48, "on_the_way": 8}


def test_completions_have_their_samples_places_and_verdicts(run: Path, told: dict[str, Any]) -> None:
    """In the convention of the environment, pixels of the stored image."""
    task, samples = RECEnv(split="eval"), told["runs"][0]["samples"]
    answers = [json.loads(line) for line in (run / "after" / "answers.jsonl").read_text().splitlines()]
    found = {samples[one["sample"]]["key"]: one for one in completions(told) if one["when"] == 2}
    for answer in answers:
        one, sample = found[f"eval/{answer['index']}"], samples[found[f"eval/{answer['index']}"]["sample"]]
        truth = task.source.get(answer["index"]).target
        assert sample["true"] == ([] if truth == "None" else [["", list(truth)]])
        is_box = isinstance(answer["prediction"], list)
        assert one["places"] == ([["", answer["prediction"]]] if is_box else [])
        assert one["right"] == (answer["measures"]["iou/mean"] >= 0.5)
        assert one["reward"] == pytest.approx(answer["rewards"]["iou"] + 0.1 * answer["rewards"]["format"], rel=1e-3)
        assert sample["images"][0]["src"].startswith("data:image/webp;base64,")
    training = [one for one in completions(told) if one["when"] == 3]
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert [one["advantage"] for one in training] == [pytest.approx(row["advantage"], rel=1e-4) for row in rows]
    assert {one["right"] for one in training} == {True, False}


def test_places_in_thousandths_are_drawn_in_pixels(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, measured=2)
    album = run / "samples" / "index.jsonl"
    lines = [json.loads(line) | {"scale": [0.096, 0.048]} for line in album.read_text().splitlines()]
    album.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row | {"prediction": [["cat", [100, 200, 500, 1000]]]}) + "\n" for row in rows)
    (run / "rollouts.jsonl").write_text(text)
    training = [one for one in completions(embedded(make_report([run]))) if one["when"] == 3]
    assert training[0]["places"] == [["cat", [9.6, 9.6, 48.0, 48.0]]]


def test_runs_that_differ_in_their_seed_are_one_curve(tmp_path: Path) -> None:
    options = {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"seed": 1, "lr": 0.1}}
    runs = [make_run(tmp_path / name, steps=2, measured=2, **one) for name, one in options.items()]  # type: ignore[arg-type]
    told = embedded(make_report(runs))
    assert [one["name"] for one in told["runs"]] == ["a", "b", "c"]
    assert told["groups"] == [{"name": "lr 0.0003 (2 seeds)", "runs": [0, 1]}, {"name": "c", "runs": [2]}]
    assert told["differences"] == [["seed", ["1", "2", "1"]], ["lr", ["0.0003", "0.0003", "0.1"]]]


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", steps=1, measured=1) for name in "ab"]
    assert [one["name"] for one in embedded(make_report(runs))["runs"]] == ["a/run", "b/run"]


def without_new_records(run: Path) -> None:
    """As earlier versions wrote it."""
    shutil.rmtree(run / "samples")
    new = ("prediction", "target", "advantage", "right")
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if name not in new} for row in rows]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def test_a_run_of_an_earlier_version_has_a_report_without_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, measured=2)
    without_new_records(run)
    told = embedded(make_report([run]))
    training = [one for one in completions(told) if one["when"] == 3]
    assert len(training) == 16
    assert {one["right"] for one in training} == {None}
    assert not any(sample["images"] for sample in told["runs"][0]["samples"])


@pytest.mark.parametrize(
    "name", ["rollouts.jsonl", "samples/index.jsonl", "after/answers.jsonl", "before/metrics.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b'{"step": 1, "ri', b"\xff\n[]\n{}\n", b'{"key": 1, "step": "x"}\n', b"[" * 9999]
)
def test_damaged_files_give_what_they_have(name: str, content: bytes, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, measured=2)
    (run / name).write_bytes(content)
    assert embedded(make_report([run]))["runs"][0]["curves"]["step"] == [1]


def repr_of(value: object) -> str:
    return repr(value)[:10]


def replaced_one_by_one(value: Any, by: Any) -> Iterator[Any]:
    """Copies of a JSON value in which one part, at any depth, is another value."""
    yield by
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for other in replaced_one_by_one(part, by):
            copy = value.copy()
            copy[key] = other
            yield copy


@pytest.mark.slow
@pytest.mark.parametrize("by", [None, {}, "text", -1.5, float("nan"), [["a", {}]], 10**400], ids=repr_of)
@pytest.mark.parametrize(
    "name",
    ["rollouts.jsonl", "samples/index.jsonl", "samples/task.json", "after/answers.jsonl", "evaluation.json"],
)
def test_values_of_any_kind_give_a_report(name: str, by: Any, run_of_one_step: Path) -> None:
    file = run_of_one_step / name
    content = file.read_text()
    lines = [json.loads(line) for line in content.splitlines()] if file.suffix == ".jsonl" else [json.loads(content)]
    try:
        for changed in replaced_one_by_one(lines[0], by):
            rows = [changed, *lines[1:]]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            assert embedded(make_report([run_of_one_step]))["runs"]
    finally:
        file.write_text(content)


@pytest.fixture(scope="module")
def run_of_one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_run(tmp_path_factory.mktemp("made") / "run", steps=1, prompts=1, group_size=2, measured=1)
    metrics = {name: json.loads((made / name / "metrics.json").read_text()) for name in ("before", "after")}
    (made / "evaluation.json").write_text(json.dumps(metrics | {"change": metrics["after"]}))
    return made


def test_what_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="holds no run to report"):
        make_report([tmp_path])
    assert "holds no run to report" in fails(capsys, "report", str(tmp_path))
    assert "name the folder of a run" in fails(capsys, "report")
    assert "an .html file" in fails(capsys, "report", str(tmp_path), "--output", "report.pdf")


def test_the_command_writes_where_it_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    main(["report", str(copy)])
    assert "vlmenv report" in (copy / "report.html").read_text()
    monkeypatch.chdir(tmp_path)
    main(["report", str(run), str(copy)])
    main(["report", str(copy), "--output", str(tmp_path / "other.html")])
    assert len(embedded((tmp_path / "report.html").read_text())["runs"]) == 2
    assert (tmp_path / "other.html").is_file()


def test_a_report_needs_no_torch(run: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; from vlmenv.cli import main; main(['report', {str(run)!r}, '--output', 'report.html']);"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_long_curves_are_thinned_to_means() -> None:
    rows = [{"step": step, "loss": float(step), "odd": 1.0} for step in range(1, 1801)]
    del rows[0]["odd"]
    rows[1]["loss"] = float("nan")
    found = thinned(rows)
    assert found["step"][:2] == [3, 6]
    assert len(found["step"]) == 600
    assert found["values"]["loss"][:2] == [2.0, 5.0]  # of 1 and 3; of 4, 5 and 6
    assert found["values"]["odd"][0] == 1.0


def steps_of(groups: Sequence[Sequence[Answer]]) -> list[int]:
    return [one.step for group in groups for one in group]


def test_groups_are_taken_at_even_distances() -> None:
    row = {"completion": "x" * 625, "prediction": "p" * 125, "prompt": "q" * 700, "target": "t" * 50}
    groups = [[Answer("train", "training", step, row)] * 2 for step in range(10)]  # 3000 bytes each
    assert steps_of(evenly(groups, 15_000, 100)) == [1, 1, 3, 3, 5, 5, 7, 7, 9, 9]
    assert steps_of(evenly(groups, 14_999, 100)) == [2, 2, 4, 4, 6, 6, 8, 8]
    assert steps_of(evenly(groups, 1e6, 10)) == [1, 1, 3, 3, 5, 5, 7, 7, 9, 9]
    assert len(steps_of(evenly(groups, 1e6, 100))) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "least", "most"), [(300, 9980, 10_000), (1000, 1000, 4000)], ids=["ten thousand", "that do not compress"]
)
def test_a_report_with_many_completions_stays_small(length: int, least: int, most: int, tmp_path: Path) -> None:
    """Of completions of random letters, as many as have room are shown, from all of the run."""
    run = make_run(tmp_path / "run", steps=2, measured=2)
    row = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])
    letters = np.random.default_rng(0).integers(33, 127, size=(20_000, length), dtype=np.uint8)
    lines = (
        json.dumps(row | {"step": 1 + i // 8, "index": i // 8, "completion": one.tobytes().decode()})
        for i, one in enumerate(letters)
    )
    (run / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    write_report([run], tmp_path / "report.html")
    assert 1e6 < (tmp_path / "report.html").stat().st_size < 5e6
    told = embedded((tmp_path / "report.html").read_text())
    training = [one["step"] for one in completions(told) if one["when"] == 3]
    assert least <= len(training) <= most
    assert min(training) < 50
    assert max(training) > 2400
    assert told["runs"][0]["totals"]["training"] == 20_000


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), [(0x4E00, 0x9FFF), (0x21, 0x7E)], ids=["three bytes", "one byte"])
def test_a_report_with_long_prompts_and_many_places_stays_small(first: int, last: int, tmp_path: Path) -> None:
    """Texts of samples and places take room too, and so do characters of several bytes, which do not compress."""
    run = make_run(tmp_path / "run", steps=1, measured=1)
    row = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])
    rng = np.random.default_rng(0)
    with (run / "rollouts.jsonl").open("w") as stream:
        for i in range(3000):
            text = "".join(map(chr, rng.integers(first, last, size=4000)))
            row |= {"prompt": text, "completion": text[:200], "prediction": rng.uniform(0, 99, (200, 4)).tolist()}
            stream.write(json.dumps(row | {"step": 1 + i, "index": i}) + "\n")
    write_report([run], tmp_path / "report.html")
    assert 1e6 < (tmp_path / "report.html").stat().st_size < 5e6


def test_notes_terms_and_metrics_without_end_are_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, measured=1)
    many = {f"name {i}": 1.0 for i in range(5000)}
    rows = [json.loads(line) | {"rewards": many} for line in (run / "rollouts.jsonl").read_text().splitlines()]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1} | many) + "\n")
    for name in ("warnings", "changes"):
        note = {"step": 1, "kind": "k" * 9999, "message": "m" * 9999}
        (run / f"{name}.jsonl").write_text(f"{json.dumps(note)}\n" * 1000)
    (one,) = embedded(html := make_report([run]))["runs"]
    assert len(html) < 2e6
    assert len(one["terms"]) < 100
    assert len(one["curves"]["values"]) < 500
    assert (one["warnings"][0][1], one["warnings"][0][2]) == ("k" * 100, "m" * 2000)


def picture(file: Path, side: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "WEBP", quality=90)


def test_pictures_are_made_smaller_to_fit(tmp_path: Path) -> None:
    for i in range(40):
        picture(tmp_path / f"{i}.webp", 256, i)
    whole = sum(file.stat().st_size for file in tmp_path.glob("*.webp"))

    def embed(room: int) -> tuple[int, list[Image.Image]]:
        samples = [{"images": [{"file": f"{i}.webp"}]} for i in range(40)]
        left = embed_pictures(samples, tmp_path, room)
        images = [image for sample in samples for image in sample["images"]]
        assert not any("file" in image for image in images)
        content = [base64.b64decode(image["src"].partition(",")[2]) for image in images if "src" in image]
        assert sum(map(len, content)) <= room
        return left, [Image.open(io.BytesIO(one)) for one in content]

    left, found = embed(whole)
    assert (left, {one.size for one in found}) == (0, {(256, 256)})
    left, found = embed(whole // 2)
    assert (left, len({one.size for one in found})) == (0, 1)
    assert max(found[0].size) < 256
    left, found = embed(whole // 100)
    assert left + len(found) == 40
    assert left > 20


def test_a_picture_of_another_data_set_is_not_shown(tmp_path: Path) -> None:
    """The data set was changed at resuming: indices mean other samples."""
    run = make_run(tmp_path / "run", steps=1, measured=2)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    rows[0]["id"] = "another"
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    told = embedded(make_report([run]))
    shown = {one["id"]: one for one in told["runs"][0]["samples"]}
    assert shown["another"]["images"] == shown["another"]["true"] == []
    assert all(one["images"] for name, one in shown.items() if name != "another")


@pytest.fixture
def server(run: Path) -> Any:
    with ReportServer([run]) as made:
        yield made


def test_the_server_answers_known_requests_alone(server: ReportServer) -> None:
    port, token = server.server_port, server.url.split("/")[-2]
    assert server.server_address[0] == "127.0.0.1"
    assert len(token) >= 32
    status, kind, body = server.content(f"/{token}/", f"127.0.0.1:{port}")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert embedded(body.decode())["live"]
    assert re.search("connect-src 'self'", body.decode())
    assert server.content(f"/{token}/", "evil.example")[0] == 403
    assert server.content(f"/{token}/", f"evil.example:{port}")[0] == 403
    assert server.content(f"/{token}/", "")[0] == 403
    for path in ("/", "/x/", f"/{token}", f"/{token}/../run", f"/{token}x/", "/%00/"):
        assert server.content(path, f"localhost:{port}")[0] in ((200,) if path == f"/{token}" else (404,))


def test_the_server_tells_of_new_results(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, measured=1)
    with ReportServer([run]) as server:
        first, page = server.version(), server.report()
        assert (server.version(), server.report()) == (first, page)
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 2, "loss": 0.5}\n')
        assert server.version() != first
        assert embedded(server.report().decode())["runs"][0]["curves"]["step"] == [1, 2]


def test_the_paired_change_is_told(run_of_one_step: Path) -> None:
    """Of evaluation.json, which alone has it."""
    wanted = json.loads((run_of_one_step / "evaluation.json").read_text())["change"]
    (one,) = embedded(make_report([run_of_one_step]))["runs"]
    for name, _, _, change in one["headline"]:
        assert change[0] == pytest.approx(wanted[name]["value"], rel=1e-4)


def test_samples_that_changed_most_come_first(told: dict[str, Any]) -> None:
    """So that they are in a report that has no room for all."""
    scores: dict[int, list[float]] = {}
    for one in completions(told):
        if one["when"] in (0, 2):
            scores.setdefault(one["sample"], []).append(one["score"])
    changes = [abs(after - before) for before, after in scores.values()]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > changes[-1]


def test_of_a_long_run_of_an_earlier_version_some_steps_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", steps=6, measured=1)  # 8 completions each
    without_new_records(run)
    monkeypatch.setattr("vlmenv.runs.report_answers.SHOWN", 16)
    training = [one["step"] for one in completions(embedded(make_report([run]))) if one["when"] == 3]
    assert training == [1] * 8 + [4] * 8

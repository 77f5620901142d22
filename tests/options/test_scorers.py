from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from judge_server import Server
from transformers import CLIPModel

from vlmenv.cli import main
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.captioning import CaptionEnv
from vlmenv.envs.rewards.clip import ClipScore

pytestmark = pytest.mark.usefixtures("without_pictures")

SMALL = [
    "--prompts-per-step",
    "2",
    "--group-size",
    "4",
    "--eval-limit",
    "2",
    "--device",
    "cpu",
    "--steps",
    "1",
    "--max-new-tokens",
    "24",
]


def test_another_clip_scores_descriptions(tmp_path: Path) -> None:
    """The built-in one with its image tower turned round, so that all cosines are."""
    other = tmp_path / "clip"
    shipped = ROOT / "envs" / "rewards" / "builtin_clip"
    other.mkdir()
    for file in shipped.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    model = CLIPModel.from_pretrained(shipped)
    model.visual_projection.weight.data *= -1
    model.save_pretrained(other)
    shown, found = {}, {}
    for name in ("builtin", str(other)):
        out = tmp_path / name.rpartition("/")[2]
        small = ["--eval-limit", "2", "--max-new-tokens", "60", "--device", "cpu", "--output", str(out / "eval")]
        main(["eval", "--env", "VLM-Caption-v0", "--clip-model", name, *small])
        lines = [json.loads(line) for line in (out / "eval" / "answers.jsonl").read_text().splitlines()]
        texts = [line["completion"] for line in lines]
        source = CaptionEnv(split="eval").source
        images = [source.get(line["index"]).images for line in lines]
        found[name] = [line["rewards"]["clip"] for line in lines]
        shown[name] = ClipScore(name).batch(texts, [None] * 2, images, AnswerFormat.SECTIONS)
    assert found == {name: pytest.approx(values, abs=1e-5) for name, values in shown.items()}
    assert max(found["builtin"]) > 0 == max(found[str(other)])


def test_a_run_with_a_judge_is_repeated_by_its_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which have no credentials: those are in no file of the run, and come from the environment again."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.reply = lambda turn, request: "0.25"
        url = server.url.replace("//", "//tester:sesame@") + "?key=sesame"
        judge = ["--judge-url", url, "--judge-model", "tester", "--judge-prompt", "{truth}\n{answer}: right?"]
        rewards = ["--rewards", "judge", "1", "format", "0.5"]
        main(["train", "--env", "VLM-VQA-v0", *judge, *rewards, *SMALL, "--output", str(tmp_path / "a")])
        prompts = server.prompts()
        again = ["train", "--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path / "b")]
        monkeypatch.setattr("vlmenv.core.urls._whole", {})  # as in another process
        with pytest.raises(SystemExit):
            main(again)
        monkeypatch.setenv("VLMENV_JUDGE_URL", url)
        main(again)
        assert sorted(server.prompts()) == sorted(prompts * 2)
        server.shutdown()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any("tfevents" in file.name for file in files)
    assert not [file for file in files if b"sesame" in file.read_bytes()]
    options = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert (options["judge_model"], options["judge_prompt"]) == ("tester", "{truth}\n{answer}: right?")
    for run in ("a", "b"):
        row = json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0])
        lines = [json.loads(line) for line in (tmp_path / run / "rollouts.jsonl").read_text().splitlines()]
        answered = [AnswerFormat.TAGS.extract(line["completion"]) for line in lines]
        assert [line["rewards"]["judge"] for line in lines] == [0.25 * bool(answer) for answer in answered]
        assert row["reward/judge"] == pytest.approx(sum(line["rewards"]["judge"] for line in lines) / 8)

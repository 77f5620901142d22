"""Parts of one's own, by name, from a folder outside the repository."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from vlmenv.cli import main

pytestmark = pytest.mark.usefixtures("without_pictures")

SMALL = ["--steps", "1", "--prompts-per-step", "2", "--group-size", "2", "--eval-limit", "0", "--device", "cpu"]

PARTS = '''
import json
from pathlib import Path

import vlmenv
from vlmenv.algos import RLOO
from vlmenv.runs.tracking import Tracker


class Lines(Tracker):
    """Writes metrics into a file of the run's folder."""

    def __init__(self, accelerator):
        self.path = None

    def start(self, run, options, step):
        self.path = Path(run.path) / "lines.jsonl"
        self.path.write_text(json.dumps(options) + "\\n")

    def log(self, metrics, step):
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, "reward": metrics["reward/mean"]}) + "\\n")

    def show(self, samples, step):
        pass

    def close(self, failed):
        pass


def brevity(text, target):
    """1 for a short completion."""
    return float(len(text) < 100)


vlmenv.register_algorithm("my_rloo", RLOO)
'''


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    from vlmenv.algos import ALGORITHMS

    monkeypatch.delitem(ALGORITHMS, "my_rloo", raising=False)
    return tmp_path


def test_a_tracker_a_reward_and_an_algorithm_by_name(parts: Path) -> None:
    rewards = ["--rewards", "iou", "1", "my_parts:brevity", "0.5"]
    options = ["--tracker", "my_parts:Lines", "--import", "my_parts", "--algo", "my_rloo", "--epsilon", "0.1"]
    main(["train", *options, *rewards, *SMALL, "--output", "run"])
    lines = [json.loads(line) for line in Path("run/lines.jsonl").read_text().splitlines()]
    assert lines[0]["algo"] == "my_rloo"
    assert lines[1]["step"] == 1
    assert json.loads(Path("run/metrics.jsonl").read_text())["reward/brevity"] == 1.0
    asked = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (asked["import"], asked["my_rloo"]) == (["my_parts"], {"epsilon": 0.1})
    assert asked["rewards"] == {"iou": 1.0, "my_parts:brevity": 0.5}


def test_a_resumed_run_finds_what_it_imported(parts: Path) -> None:
    main(["train", "--import", "my_parts", "--algo", "my_rloo", *SMALL, "--tracker", "none", "--output", "run"])
    main(["train", "--resume", "run", "--steps", "2"])
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--import", "nowhere"], "there is no module 'nowhere'"),
        (["--algo", "my_parts:brevity"], "my_parts:brevity is no algorithm: derive the class from"),
        (["--algo", "my_parts:Nothing"], "Nothing"),
        (["--tracker", "my_parts:Nothing"], "Nothing"),
        (["--rewards", "my_parts:nothing", "1"], "nothing"),
        (["--engine", "my_parts:nothing"], "nothing"),
        (["--engine", "vlm"], "unknown engine 'vlm'. Did you mean 'vllm'?"),
    ],
)
def test_parts_that_are_not_there_are_named(
    parts: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", *options, *SMALL, "--output", "run"])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("run").exists()

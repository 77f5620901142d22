"""The real vLLM where two processes train."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import launch
from PIL import Image
from servers import Served, serve

from vlmenv.agents.engines.checksums import checksums
from vlmenv.agents.engines.remote import Server
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.cli import main
from vlmenv.core.errors import EngineError

pytestmark = pytest.mark.vllm
VLLM = ["--engine", "vllm", "--engine-length", "512"]
CHANGING = ["--steps", "3", "--lr", "3e-3", "--warmup-steps", "0"]
TINY = ["--prompts-per-step", "4", "--group-size", "4", "--device", "cpu", "--output", "run"]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve("builtin", "--engine-length", "512", "--tensor-parallel", "2") as served:
        yield served


@pytest.mark.parametrize(("kind", "engine"), [("ddp", "1"), ("fsdp2", "2"), ("fsdp2", "file"), ("ddp", "direct")])
def test_what_two_processes_sample_is_what_they_learn_and_save(
    kind: str, engine: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With an engine each, with one that they share, and with a server of two parts; evaluation leaves one idle."""
    how = [*VLLM, "--tensor-parallel", engine]
    if engine in ("file", "direct"):
        served = request.getfixturevalue("served")
        how = ["--engine", "vllm-server", "--server", served.url, "--weight-transfer", engine]
    done = launch(kind, "-m", "vlmenv", "train", *CHANGING, *TINY, "--eval-limit", "9", *how, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    lines = rows(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert max(line["policy/sampler_kl"] for line in lines) < 1e-9
    after = json.loads((run / "evaluation.json").read_text())["after"]
    options = ["--model", str(run / "checkpoints" / "step-3"), "--eval-limit", "9", "--device", "cpu"]
    main(["eval", *options, "--output", str(tmp_path / "eval")])
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == after


PATIENT = """
from vlmenv.envs import Reply, register_task
from vlmenv.envs.rec import RECEnv


class PatientEnv(RECEnv):
    max_turns = 3

    def respond(self, sample, texts):
        again = len(texts) < 3 and len(texts[-1]) % 3
        return Reply("Look again.", (sample.images[0][:32],)) if again else None


register_task("VLM-Patient-v0", "patient:PatientEnv")
"""


def test_two_processes_that_share_an_engine_play_episodes_of_unequal_length(tmp_path: Path) -> None:
    """One may need the engine for a turn that the other does not have."""
    (tmp_path / "patient.py").write_text(PATIENT)
    how = ["--env", "patient:VLM-Patient-v0", "--engine", "vllm", "--engine-length", "1024", "--tensor-parallel", "2"]
    done = launch("ddp", "-m", "vlmenv", "train", *CHANGING, *TINY, "--eval-limit", "5", *how, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = rows(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert max(line["policy/sampler_kl"] for line in lines) < 1e-9
    turns = {len(one.get("turns", ())) for one in rows(tmp_path / "run" / "rollouts.jsonl")}
    assert turns == {0, 2, 4}


def test_a_fault_of_a_worker_of_two_leaves_the_other_in_step(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM stops reading its workers' answers at the first fault: each further call would get another's answer."""
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(0.0, 8))
    agent.engine = VLLMServerEngine([served.url], agent.folder, agent.family, transfer="direct")
    agent.sync()
    held, update = checksums(agent.engine), Server.update

    async def misnaming(server: Server, order: dict[str, Any]) -> None:
        plan = [[("model.nobody.weight", shape) for _, shape in bucket] for bucket in order["plan"]]
        await update(server, order | {"plan": plan})

    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(Server, "update", misnaming)
            with pytest.raises(EngineError, match="it cannot take over weights: ValueError: There is no module"):
                agent.sync()
        with pytest.warns(RuntimeWarning, match="in use again"):
            agent.sync()
        assert checksums(agent.engine) == held
    agent.close()


def test_a_prompt_that_fails_in_one_process_ends_both(tmp_path: Path) -> None:
    """The other one is in the midst of sampling, for which it needs the first."""
    turns = [{"from": "human", "value": "<image>Where is it?"}, {"from": "gpt", "value": "[1, 2, 30, 40]"}]
    lines = [{"id": i, "image": "red.png", "conversations": turns} for i in range(16)]
    lines[11]["conversations"] = [{"from": "human", "value": "<image>" + "Where is it? " * 200}, turns[1]]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "rec.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = ["--dataset", "rec.jsonl", "--image-root", ".", "--steps", "8", "--eval-limit", "0"]
    done = launch("ddp", "-m", "vlmenv", "train", *data, *TINY, *VLLM, "--tensor-parallel", "2", cwd=tmp_path)
    assert done.returncode == 1
    messages = [line for line in done.stderr.splitlines() if line.startswith("error in process ")]
    assert sorted(line[17] for line in messages) == ["0", "1"]
    assert all("leaves no room" in line for line in messages)


def test_processes_that_share_an_engine_sample_as_one_does(tmp_path: Path) -> None:
    """The second has one part fewer to do than the first."""
    options = [
        "sample",
        "--n",
        "4",
        "--eval-limit",
        "12",
        "--part-size",
        "4",
        "--batch-size",
        "8",
        "--device",
        "cpu",
        *VLLM,
    ]
    main([*options, "--output", str(tmp_path / "one")])
    shared = [*options, "--output", "two", "--tensor-parallel", "2"]
    done = launch("ddp", "-m", "vlmenv", *shared, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one" / "parts").glob("*.jsonl"))
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "two" / file).read_text() == (tmp_path / "one" / file).read_text()

"""A teacher on a server: with a stand-in, and with the real vLLM."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from batches import logprobs_of, ragged
from servers import serve
from stand_in_server import Answering, good, model, opened  # noqa: F401 (fixtures)

from vlmenv.agents.engines.remote import RetryPolicy
from vlmenv.agents.engines.teacher import ServerTeacher
from vlmenv.agents.sampling import Sampling
from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos.opd import OPD, OPDConfig
from vlmenv.algos.trainer import Trainer, TrainerConfig
from vlmenv.building import meet_teacher
from vlmenv.cli import main
from vlmenv.core.errors import ConfigError, EngineError
from vlmenv.core.rollout import Observation, Rollout
from vlmenv.options.train import default_config

TEXT: list[Observation] = [{"images": (), "prompt": f"How many is {i} and 3?"} for i in (1, 2) for _ in range(2)]
HASTY = RetryPolicy(answer=10, greeting=10, attempts=1, pause=0.05)


def teacher_at(url: str, agent: VLMAgent, stack: ExitStack) -> ServerTeacher:
    teacher = ServerTeacher(url, agent.family, agent.encode, retry_policy=HASTY)
    stack.callback(teacher.close)
    return teacher


def test_each_token_has_its_own_score(builtin: VLMAgent, good: Answering, opened: ExitStack) -> None:  # noqa: F811
    """Those of the prompt are left out, and so is what follows an answer's end."""
    rollout = builtin.imitate(TEXT, ["4", "the number is 4", "5", "none"])
    found = teacher_at(good.url, builtin, opened).logprobs(rollout, TEXT)
    tokens = [one.token_ids for one in rollout.completions]
    assert found.shape == (4, max(map(len, tokens)))
    for row, ids in zip(found, tokens, strict=True):
        torch.testing.assert_close(row[: len(ids)], torch.from_numpy(-ids / 1000).float())
        assert not row[len(ids) :].any()
    bodies = [body for path, body in good.asked if path.endswith("generate")]
    assert len(bodies) == 4
    prompts, index = builtin.encode(TEXT)
    wanted = [[*prompts[i].input_ids.tolist(), *ids.tolist()] for i, ids in zip(index, tokens, strict=True)]
    assert sorted(body["token_ids"] for body in bodies) == sorted(wanted)


def test_another_tokenizer_is_refused(builtin: VLMAgent, good: Answering, opened: ExitStack) -> None:  # noqa: F811
    good.model["vocabulary"] = "another"
    with pytest.raises(ConfigError, match=f"the teacher {good.url} has another tokenizer"):
        teacher_at(good.url, builtin, opened)


def test_another_temperature_is_refused(builtin: VLMAgent, good: Answering) -> None:  # noqa: F811
    """An agent that is given to `vlmenv.train` samples in its own way, whatever the options say."""
    builtin.sampling = Sampling(temperature=0.7)
    with pytest.raises(ConfigError, match=r"temperature is 0\.7"):
        meet_teacher(good.url, default_config("opd"), builtin)


@pytest.mark.parametrize(
    "fault",
    [
        {"prompt_logprobs": None},
        {"prompt_logprobs": []},
        {"prompt_logprobs": [{"1": {"logprob": -1.0}}] * 99},
        {"prompt_logprobs": [{str(i): {"logprob": -9999.0} for i in range(2000)}] * 99},
        {"prompt_logprobs": [{str(i): {"logprob": 0.5} for i in range(2000)}] * 99},
        {"prompt_token_ids": [1, 2, 3, 4, 5]},
    ],
    ids=["none", "empty", "other tokens", "not finite", "above 0", "another prompt"],
)
def test_invalid_answers_are_refused(
    fault: dict[str, Any],
    builtin: VLMAgent,
    good: Answering,  # noqa: F811
    opened: ExitStack,  # noqa: F811
) -> None:
    good.fault = lambda server, path, usual: (200, json.dumps(usual | fault).encode())
    rollout = builtin.imitate(TEXT, ["4", "the number is 4", "5", "none"])
    with pytest.raises(EngineError):
        teacher_at(good.url, builtin, opened).logprobs(rollout, TEXT)


def test_a_prompt_that_the_server_encodes_otherwise_is_refused(
    builtin: VLMAgent,
    good: Answering,  # noqa: F811
    opened: ExitStack,  # noqa: F811
) -> None:
    """Though its answer ends in the right tokens."""

    def other_start(server: Answering, path: str, usual: Any) -> tuple[int, bytes]:
        return 200, json.dumps(usual | {"prompt_token_ids": [5, *usual["prompt_token_ids"][1:]]}).encode()

    good.fault = other_start
    with pytest.raises(EngineError, match="encodes a prompt differently"):
        teacher_at(good.url, builtin, opened).logprobs(builtin.imitate(TEXT, ["4"] * 4), TEXT)


def test_a_trainer_learns_from_it(builtin: VLMAgent, good: Answering, opened: ExitStack) -> None:  # noqa: F811
    """The stand-in's log-probability of a token is its id in thousandths below 0."""
    rows = [{"question": f"How many is {i} and 3?", "answer": str(i + 3)} for i in range(4)]
    envs = gymnasium.make_vec("VLM-VQA-v0", num_envs=4, group_size=2, dataset=rows)
    builtin.sampling = Sampling(max_new_tokens=8)
    seen: list[Rollout] = []
    teacher = teacher_at(good.url, builtin, opened)
    logprobs = teacher.logprobs
    teacher.logprobs = lambda rollout, given: (seen.append(rollout), logprobs(rollout, given))[1]  # type: ignore
    trainer = Trainer(
        builtin, envs, OPD(OPDConfig(group_size=2)), TrainerConfig(steps=1), Accelerator(cpu=True), teacher
    )
    (step,) = trainer.train(seed=0)
    gaps = [one.logprobs + one.token_ids / 1000 for one in seen[0].completions]
    assert step.metrics["policy/teacher_kl"] == pytest.approx(float(np.concatenate(gaps).mean()), abs=1e-4)


@pytest.mark.parametrize("url", ["http://host:8000", "https://host:8000", "unix:/run/teacher"])
def test_an_address_stays_as_it_is(url: str) -> None:
    """It is not taken for a folder."""
    config = default_config("opd")
    taught = type(config)(algo="opd", algorithm=OPDConfig(teacher=url))
    assert taught.located().algorithm.teacher == url


@pytest.mark.vllm
def test_it_scores_as_the_model_does_and_teaches(
    builtin: VLMAgent,
    opened: ExitStack,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The real vLLM, with and without images: the model's log-probabilities without bans, and a run of two steps."""
    observations = ragged()
    builtin.sampling = Sampling(max_new_tokens=8)
    rollout = builtin.rollout(observations)
    with serve("builtin", "--engine-length", "512") as served:
        found = teacher_at(served.url, builtin, opened).logprobs(rollout, observations)
        builtin.family_policy.banned = torch.tensor([], dtype=torch.int64)
        expected = logprobs_of(builtin, rollout)
        for row, completion in enumerate(rollout.completions):
            length = len(completion.token_ids)
            torch.testing.assert_close(found[row, :length], expected[row, :length], atol=1e-4, rtol=0)
        options = ["--steps", "2", "--prompts-per-step", "1", "--group-size", "2", "--eval-limit", "0"]
        main(["train", "--algo", "opd", "--teacher", served.url, *options, "--output", str(tmp_path / "run")])
        steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert np.allclose(steps[0]["policy/teacher_kl"], 0, atol=1e-3)  # the student is its teacher
        served.end(signal.SIGINT)

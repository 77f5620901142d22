"""Training and evaluation from Python."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
import transformers
from accelerate import PartialState
from broken_rows import write_rows
from PIL import Image

import vlmenv
from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import GRPO, PAPO, RLOO, SFT, Algorithm, GRPOConfig, PAPOConfig, RLOOConfig, SFTConfig
from vlmenv.core.console import open_console
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.options.evaluate import EvalConfig
from vlmenv.options.fields import replaced
from vlmenv.options.files import read_options
from vlmenv.options.train import default_config

pytestmark = pytest.mark.usefixtures("without_pictures")

SMALL: dict[str, Any] = {"steps": 1, "prompts_per_step": 2, "device": "cpu", "tracker": "none"}


def state() -> tuple[Any, ...]:
    """What a process shares: environment, search path, signals, hooks, random state, progress bars, accelerate."""
    signals = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    bars, shared = transformers.utils.logging.is_progress_bar_enabled(), dict(PartialState._shared_state)
    random = torch.get_rng_state().tolist()
    return dict(os.environ), list(sys.path), signals, threading.excepthook, random, bars, shared


@pytest.mark.slow
def test_a_run_is_given_back_with_its_metrics_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = state()
    run = vlmenv.train(output=tmp_path / "run", group_size=2, learning_rate=1e-4, eval_limit=2, **SMALL)
    assert state() == before
    assert [set(step) >= {"reward/mean", "reward/iou"} for step in run.history] == [True]
    assert run.before is not None
    assert run.after is not None
    assert run.before.keys() == run.after.keys() >= {"iou/mean"}
    assert run.model == tmp_path / "run" / "checkpoints" / "step-1"
    asked = read_options(tmp_path / "run" / "config.yaml")
    assert (asked["lr"], asked["group_size"], asked["steps"]) == (1e-4, 2, 1)
    measured = vlmenv.evaluate(model=run.path, eval_limit=2, device="cpu", split="eval")
    assert measured.metrics["iou/mean"].value == pytest.approx(run.after["iou/mean"].value)
    assert state() == before


@pytest.mark.slow
def test_the_end_of_a_run_ends_the_threads_that_load_its_samples(tmp_path: Path) -> None:
    """Also that by an error, which keeps the environments in its traceback."""

    def living() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("vlmenv-images")}

    before = living()
    rows = write_rows(tmp_path)
    rows.write_text("\n".join(rows.read_text().split("\n")[1:6:2]))  # whole, whole and half an image
    with pytest.raises(DataError, match=r"half\.jpg cannot be read") as told:
        vlmenv.train(output=tmp_path / "run", dataset=[str(rows)], group_size=2, eval_limit=0, **SMALL | {"steps": 2})
    for thread in living() - before:
        thread.join(30)
        assert not thread.is_alive()
    del told


@pytest.mark.slow
def test_environments_an_agent_and_an_algorithm_of_ones_own(tmp_path: Path) -> None:
    """The agent is trained in place, and the record tells of what was given."""
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=4, group_size=2, rewards={"iou": 1.0})
    agent = VLMAgent.from_pretrained("builtin", device="cpu")
    weights = [weight.clone() for weight in agent.parameters()]
    algorithm = RLOO(RLOOConfig(group_size=2, epsilon=0.3))
    run = vlmenv.train(envs, agent, algorithm, output=tmp_path / "run", lr=1e-2, warmup_steps=0, **SMALL)
    assert any(not torch.equal(*pair) for pair in zip(weights, agent.parameters(), strict=True))
    assert agent.act([{"images": (), "prompt": "hello"}])  # it has not been closed
    resolved = read_options(run.path / "resolved.yaml")
    assert (resolved["algo"], resolved["rloo"]["epsilon"], resolved["rewards"]) == ("rloo", 0.3, {"iou": 1.0})
    assert run.before is None
    with pytest.raises(ConfigError, match="show each sample 2 times, but group_size is 8: make them"):
        vlmenv.train(envs, agent, output=tmp_path / "other", **SMALL)


@pytest.mark.parametrize("options", [{"algo": "papo_g"}, {"algo": "vppo"}, {"visual_dependence_every": 1}])
def test_masks_are_refused_where_no_sample_has_an_image(tmp_path: Path, options: dict[str, Any]) -> None:
    Image.new("RGB", (28, 28), "red").save(tmp_path / "red.png")
    rows: list[dict[str, str]] = [{"question": f"{i} and {i}?", "answer": str(2 * i)} for i in range(3)]
    texts, mixed = tmp_path / "texts.jsonl", tmp_path / "mixed.jsonl"
    texts.write_text("\n".join(map(json.dumps, rows)))
    mixed.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"image": "red.png"}])))
    tiny: dict[str, Any] = {"eval_limit": 0, "dry_run": True, "group_size": 2} | SMALL | options
    what = options.get("algo", "visual_dependence_every")
    with pytest.raises(DataError, match=f"none of the samples has an image: {what} has nothing to mask"):
        vlmenv.train("VLM-VQA-v0", dataset=[str(texts)], output=tmp_path / "run", **tiny)
    vlmenv.train("VLM-VQA-v0", dataset=[str(mixed)], image_root=[str(tmp_path)], output=tmp_path / "run", **tiny)


def test_a_distribution_without_its_tail_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny: dict[str, Any] = {"eval_limit": 0, "dry_run": True, "group_size": 2, "output": tmp_path / "run"} | SMALL
    for options, told in (({"top_p": 0.9}, 1), ({"top_k": 5}, 1), ({}, 0), ({"algo": "sft", "top_p": 0.9}, 0)):
        vlmenv.train(**tiny | ({"group_size": 1} if "algo" in options else {}) | options)
        assert capsys.readouterr().out.count("the gradient is a biased estimate") == told
    vlmenv.train(**tiny, algo="opd", teacher="builtin", top_p=0.9)
    assert "and so is the divergence from the teacher" in capsys.readouterr().out


class Watching(GRPO):
    """Learns with masked images, as PAPO does."""

    learns_masked = True


@pytest.mark.parametrize("algorithm", [PAPO(PAPOConfig(group_size=2)), Watching(GRPOConfig(group_size=2))])
def test_options_are_checked_by_the_algorithm_that_is_given(tmp_path: Path, algorithm: Algorithm) -> None:
    tiny: dict[str, Any] = {"eval_limit": 0, "dry_run": True, "output": tmp_path / "run"} | SMALL
    vlmenv.train("VLM-VQA-v0", algo=algorithm, mask_share=0.4, **tiny)
    with pytest.raises(ConfigError, match="group_size is 8, and the algorithm that is given has 2"):
        vlmenv.train("VLM-VQA-v0", algo=algorithm, group_size=8, **tiny)
    with pytest.raises(ConfigError, match="mask_share goes with"):
        vlmenv.train("VLM-VQA-v0", algo=GRPO(GRPOConfig(group_size=2)), mask_share=0.4, **tiny)
    with pytest.raises(ConfigError, match="sft learns from true answers: leave out correction"):
        vlmenv.train("VLM-VQA-v0", algo=SFT(SFTConfig()), correction="sequence", **tiny)


@pytest.mark.slow
def test_a_config_object_or_a_file_takes_keyword_arguments_on_top(tmp_path: Path) -> None:
    config = replaced(default_config("dapo"), {"group_size": 2, "eval_limit": 0, **SMALL})
    run = vlmenv.train(config=config, output=tmp_path / "object", seed=3)
    (tmp_path / "c.yaml").write_text("algo: dapo\ngroup_size: 2\neval_limit: 0\nsteps: 5\n")
    same = vlmenv.train(config=tmp_path / "c.yaml", output=tmp_path / "file", seed=3, **SMALL)
    assert [one["reward/mean"] for one in run.history] == [one["reward/mean"] for one in same.history]
    assert read_options(run.path / "config.yaml")["seed"] == 3
    config = replaced(EvalConfig(), {"eval_limit": 1, "device": "cpu"})
    assert len(vlmenv.evaluate(config=config).answers) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepz": 1}, "unknown option 'stepz'. Did you mean 'steps'?"),
        ({"steps": "many"}, "steps must be a whole number, not 'many'"),
        ({"algo": "ppo", "scale": "none"}, "ppo has no option 'scale'"),
        ({"recipe": "x"}, "unknown recipe 'x'"),
        ({"env": "VLM-X-v0"}, "unknown environment 'VLM-X-v0'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        vlmenv.train(output=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"env": gymnasium.make("VLM-Math-v0")}, "env is an id, or environments .* not a OrderEnforcing"),
        ({"env": gymnasium.Env}, "env is .* not the class Env"),
        ({"env": gymnasium.make_vec("VLM-Math-v0", 2, "sync")}, "env is .* not a SyncVectorEnv"),
        ({"eval_env": "VLM-Math-v0"}, "eval_env is .* not a str"),
        ({"model": torch.nn.Linear(1, 1)}, "model is a name, a folder or a VLMAgent, not a Linear"),
        ({"algo": RLOO}, "algo is a name or an Algorithm object, not the class RLOO"),
    ],
)
def test_an_argument_of_another_kind_is_not_left_unused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        vlmenv.train(output=tmp_path / "run", dry_run=True, **given)


def test_evaluate_takes_names() -> None:
    with pytest.raises(ConfigError, match=r"model is a name or a folder, .* not a Linear"):
        vlmenv.evaluate(model=torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="env is the id of a registered environment, not a OrderEnforcing"):
        vlmenv.evaluate(gymnasium.make("VLM-Math-v0"))  # type: ignore[arg-type]


def test_a_suite_is_no_matter_of_evaluate() -> None:
    with pytest.raises(ConfigError, match="vlmenv eval --suite"):
        vlmenv.evaluate(suite="vlm_r1")


def test_the_package_says_what_it_offers() -> None:
    assert set(dir(vlmenv)) == set(vlmenv.__all__)
    assert all(callable(getattr(vlmenv, name)) for name in vlmenv.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vlmenv.nothing  # noqa: B018


@pytest.mark.slow
def test_a_notebook_without_widgets_gets_plain_lines(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """A shell of Jupyter's name is how rich knows a notebook, whose output stream says that it is a terminal."""
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-color")  # an ipykernel's
    vlmenv.train(output=tmp_path / "run", group_size=2, eval_limit=0, **SMALL)
    told = capsys.readouterr().out
    assert not open_console(quiet=True).is_terminal
    assert "\x1b" not in told
    lines = told.splitlines()
    assert sum("install ipywidgets" in line for line in lines) == 1
    assert any(line.startswith("step    1/1  reward") for line in lines)
    assert not [warning for warning in recwarn if "ipywidgets" in str(warning.message)]

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmenv.core.errors import ConfigError
from vlmenv.options.evaluate import SampleConfig
from vlmenv.options.fields import flatten, replaced
from vlmenv.options.train import TrainConfig, default_config
from vlmenv.runs.claim import claim


def test_located_options_hold_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are no paths stay: those on the hub, and the shipped models, whatever else is called so."""
    for name in ("model", "clip", "builtin", "a.jsonl"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"dataset": ("a.jsonl", "some/rows"), "eval_dataset": ("builtin",)}
    options |= {"image_root": (Path("model"), Path("clip")), "model": "model", "clip_model": "clip"}
    written = flatten(replaced(TrainConfig(), options).located())
    monkeypatch.chdir("/")
    assert written["dataset"] == [str(tmp_path / "a.jsonl"), "some/rows"]
    assert written["eval_dataset"] == [str(tmp_path / "builtin")]
    assert written["image_root"] == [str(tmp_path / name) for name in ("model", "clip")]
    assert (written["model"], written["clip_model"]) == (str(tmp_path / "model"), str(tmp_path / "clip"))
    monkeypatch.chdir(tmp_path)
    shipped = replaced(TrainConfig(), {"clip_model": "builtin"}).located()
    assert (shipped.model, shipped.scorers.clip_model) == ("builtin", "builtin")
    assert TrainConfig(model="org/model").located() == TrainConfig(model="org/model")


SERVERS: dict[str, Any] = {"engine": "vllm-server", "server": ("http://a:1",)}


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "vllm", "engine_length": 512, "engine_memory": 0.5, "tensor_parallel": 2},
        SERVERS,
        SERVERS | {"server": ("http://a:2",), "server_timeout": 3.0, "weights_folder": Path("b")},
        SERVERS | {"weight_transfer": "direct"},
        {"device": "cpu", "batch_size": 2, "output": Path("c")},
    ],
)
def test_a_claimed_folder_allows_another_engine(options: dict[str, Any], tmp_path: Path) -> None:
    same, other = (replaced(SampleConfig(), options | more) for more in ({}, {"n": 3, "seed": 1}))
    claim(tmp_path / "out", SampleConfig(), begun=False)
    claim(tmp_path / "out", same, begun=True)
    with pytest.raises(ConfigError, match=r"out holds results with another seed, n, see .*config\.yaml"):
        claim(tmp_path / "out", other, begun=True)
    claim(tmp_path / "out", other, begun=False)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["n"] == 3


def test_a_claimed_folder_knows_the_former_names_of_options(tmp_path: Path) -> None:
    former = flatten(SampleConfig()) | {"limit": None, "precision": "fp32"}
    del former["eval_limit"], former["weights"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(former))
    claim(tmp_path, SampleConfig(), begun=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine_memory": 0.5}, "engine_memory go with engine vllm"),
        ({"engine": "vllm", "server": ("http://a:1",)}, "server go with engine vllm-server"),
        ({"engine": "vllm-server"}, "needs servers"),
        ({"engine": "vllm", "engine_length": 100}, "room for prompts"),
        ({"seed": 2**64}, "seed must be from 0"),
        ({"seed": -1}, "seed must be from 0"),
        ({"lora_alpha": 4}, "go with lora_rank"),
        ({"lora_rank": 4, "freeze_vision": True}, "all but the adapters is frozen"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"eval_every": 2, "eval_limit": 0}, "eval_every needs samples"),
        ({"split": "train"}, "split, eval_dataset and eval_split go with dataset"),
        ({"max_staleness": 1, "engine": "vllm"}, "engine vllm-server"),
        ({"correction": "none"}, "correction goes with an engine"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replaced(TrainConfig(), options)


@pytest.mark.parametrize("algo", ["gdpo", "opd"])
def test_samples_of_equal_rewards_are_not_passed_over_where_they_teach(algo: str) -> None:
    with pytest.raises(ConfigError, match=f"{algo} learns from those too: leave it out"):
        replaced(default_config(algo), {"revisit": 0.2})
    assert replaced(default_config("opd"), {"revisit": 0.2, "reward_weight": 1.0}).batches.revisit == 0.2

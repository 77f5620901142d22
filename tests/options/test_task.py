from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmenv.building import claim
from vlmenv.commands.sample import SampleConfig
from vlmenv.commands.train import TrainConfig
from vlmenv.core.errors import ConfigError
from vlmenv.options.files import to_yaml
from vlmenv.options.scorers import ScorerConfig


def test_located_options_hold_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are no paths stay: those on the hub, and the shipped models, whatever else is called so."""
    for name in ("model", "clip", "builtin", "a.jsonl"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"dataset": ("a.jsonl", "some/rows"), "eval_dataset": ("builtin",)}
    options["image_root"] = (Path("model"), Path("clip"))
    config = TrainConfig(model="model", scorers=ScorerConfig(clip_model="clip"), **options)
    written = yaml.safe_load(to_yaml(config.located()))
    monkeypatch.chdir("/")
    assert written["dataset"] == [str(tmp_path / "a.jsonl"), "some/rows"]
    assert written["eval_dataset"] == [str(tmp_path / "builtin")]
    assert written["image_root"] == [str(tmp_path / name) for name in ("model", "clip")]
    assert (written["model"], written["clip_model"]) == (str(tmp_path / "model"), str(tmp_path / "clip"))
    monkeypatch.chdir(tmp_path)
    shipped = TrainConfig(scorers=ScorerConfig(clip_model="builtin")).located()
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
    claim(tmp_path / "out", SampleConfig(), begun=False)
    claim(tmp_path / "out", SampleConfig(**options), begun=True)
    with pytest.raises(ConfigError, match=r"out holds results with another seed, n, see .*config\.yaml"):
        claim(tmp_path / "out", SampleConfig(n=3, seed=1, **options), begun=True)
    claim(tmp_path / "out", SampleConfig(n=3, seed=1, **options), begun=False)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["n"] == 3

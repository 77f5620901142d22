from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmenv.core.errors import ConfigError
from vlmenv.options.command_line import Asked, parse_with_files
from vlmenv.options.fields import flatten
from vlmenv.options.files import packaged_file
from vlmenv.options.train import default_config


def parsed(*args: str) -> Asked:
    return parse_with_files(args, default_config, "vlmenv train")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 5\nrewards: {iou: 1.0, format: 0.5}\ntop-p: 0.5\nepochs: 2\ngrpo: {epsilon: 0.1}\n")
    return file


def test_the_command_line_wins_over_a_file(file: Path) -> None:
    asked = parsed("--config", str(file), "--seed", "7", "--steps", "3")
    found = flatten(asked.config)
    assert [found[name] for name in ("seed", "top_p", "epsilon", "steps", "epochs")] == [7, 0.5, 0.1, 3, None]
    assert found["rewards"] == {"iou": 1.0, "format": 0.5}
    assert set(asked.names) == {"config", "seed", "rewards", "top_p", "steps", "epsilon"}


def test_a_recipe_gives_way_to_a_file_and_that_to_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("beta: 0.5\nsteps: 9\nalgo: dapo\n")
    asked = parsed("--recipe", "vlm_r1_rec", f"--config={tmp_path / 'c.yaml'}", "--lr", "1")
    found = flatten(asked.config)
    assert (found["beta"], found["steps"], found["lr"], found["group_size"]) == (0.5, 9, 1.0, 8)
    assert (found["epochs"], found["algo"], found["epsilon_high"], found["aggregation"]) == (
        None,
        "dapo",
        0.28,
        "token",
    )
    recipe = packaged_file("recipe", "vlm_r1_rec")
    assert asked.notes == (
        f"{recipe}: options of grpo are not used, as dapo is asked for: epsilon, kl_estimator, aggregation",
    )


def test_an_option_of_several_values_may_be_given_several_times() -> None:
    args = ("--engine", "vllm-server", "--server=http://a:1", "--lr", "1", "--server", "http://b:1", "http://c:1")
    assert parsed(*args).config.generation.server == ("http://a:1", "http://b:1", "http://c:1")


def test_of_an_option_of_one_value_the_last_counts() -> None:
    assert parsed("--lr", "1", "--seed", "1", "--lr=2").config.trainer.lr == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=b", "--config", "a"], "--config was given 2 times: b, a"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--recipe", "vlm_r1"], "unknown recipe 'vlm_r1'"),
        (["--steps", "1", "--epochs", "2"], "steps and epochs were both given"),
        (["--env", "VLM-REC-v0", "--mix", "VLM-VQA-v0:2"], "env and mix were both given"),
        (["--algo", "rloo", "--kl-estimator", "k1"], "rloo has no option 'kl_estimator'"),
        (["--learn", "1"], "unknown option 'learn'"),
        (["--resume", "nowhere"], "nowhere is no folder of a run"),
        (["--resume", "run", "--lr", "1"], "resumed with its own options, not with lr. .* steps"),
    ],
)
def test_a_faulty_command_line_is_told(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*args)


@pytest.mark.parametrize("content", ["- 1", "a: ["])
def test_a_file_that_holds_no_options_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        parsed("--config", str(tmp_path / "c.yaml"))


def run_of(folder: Path, **files: dict[str, Any]) -> None:
    for name, options in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(options) if options else "")


def test_a_resumed_run_takes_what_it_used_then_what_was_edited_then_the_command_line(tmp_path: Path) -> None:
    run_of(tmp_path, resolved={"lr": 0.5, "seed": 3, "steps": 4, "record": {}}, config={"lr": 0.25})
    found = flatten(parsed("--resume", str(tmp_path), "--steps", "8").config)
    assert (found["lr"], found["seed"], found["steps"]) == (0.25, 3, 8)


def test_a_run_whose_options_are_gone_is_not_resumed_with_the_defaults(tmp_path: Path) -> None:
    run_of(tmp_path, config={})
    with pytest.raises(ConfigError, match="is empty: put the run's options back"):
        parsed("--resume", str(tmp_path))

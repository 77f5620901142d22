from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from vlmenv.core.errors import ConfigError
from vlmenv.options.files import flatten, gathered, option_value, packaged_file, to_yaml, with_config_file


@dataclass
class Inner:
    group_size: int = 8


@dataclass
class Outer:
    steps: int = 3
    output: Path | None = Path("here")
    inner: Inner = field(default_factory=Inner)


def test_nested_options_are_options_like_the_others() -> None:
    assert flatten(Outer()) == {"steps": 3, "output": str(Path.cwd() / "here"), "group_size": 8}
    assert yaml.safe_load(to_yaml(Outer(), without=["output"])) == {"steps": 3, "group_size": 8}


def test_the_files_options_come_before_the_command_lines(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 5\nrewards: {iou: 1.0, format: 0.5}\nother-name: null\n")
    known = ["steps", "rewards", "other_name"]
    args = with_config_file(["--config", str(file), "--steps", "7"], known)
    before = ["--steps=5", "--rewards", "iou", "1.0", "format", "0.5", "--other-name=None"]
    assert args == [*before, "--config", str(file), "--steps", "7"]
    assert with_config_file(["--steps", "7"], known) == ["--steps", "7"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz: 5", "unknown option 'stepz'. Did you mean 'steps'?"),
        ("- 1", "'name: value' lines"),
        ("a: [", "not YAML"),
        ("resume: a-run", "'resume' has no place in a file of options: give it on the command line"),
        ("config: b.yaml", "'config' has no place in a file"),
        ("recipe: a", "'recipe' has no place in a file"),
    ],
)
def test_a_faulty_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        with_config_file([f"--config={file}"], ["steps", "config", "resume"], passed_over={"recipe"})
    assert message in str(caught.value)


def test_two_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="given 2 times: b, a"):
        with_config_file(["--config=b", "--config", "a"], ["steps"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        with_config_file(["--config", str(tmp_path / "none.yaml")], ["steps"])


@pytest.mark.parametrize(
    ("content", "given", "expected"),
    [
        ("epochs: 2", [], ["--epochs=2"]),
        ("epochs: 2", ["--steps", "3"], []),
        ("epochs: 2", ["--steps=3"], []),
        ("steps: 2", ["--epochs", "3"], []),
        ("steps: 2\nepochs: null", [], ["--steps=2", "--epochs=None"]),
        ("group-size: 2\nsteps: 2", ["--group-size", "3"], ["--group-size=2", "--steps=2"]),
    ],
)
def test_an_option_takes_the_place_of_its_rival(
    tmp_path: Path, content: str, given: list[str], expected: list[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    args = ["--config", str(file), *given]
    assert with_config_file(args, ["steps", "epochs", "group_size"], [("steps", "epochs")]) == [*expected, *args]


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ("", ["--steps", "1", "--epochs=2"], "^steps and epochs"),
        ("steps: 1\nepochs: 2", [], r"c\.yaml: steps and epochs"),
    ],
)
def test_rivals_are_not_given_together(tmp_path: Path, content: str, given: list[str], message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        with_config_file(["--config", str(file), *given], ["steps", "epochs"], [("steps", "epochs")])


def test_a_recipe_gives_way_to_a_file_and_that_to_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("beta: 0.5\nsteps: 9\nalgo: dapo\n")
    known = [*yaml.safe_load(packaged_file("recipe", "vlm_r1_rec").read_text()), "steps"]
    args = ["--recipe", "vlm_r1_rec", f"--config={file}", "--lr", "1"]
    found = with_config_file(args, known, [("steps", "epochs")])
    assert found[-len(args) :] == args
    assert {"--beta=0.5", "--steps=9", "--lr=1e-06", "--group-size=8"} <= set(found)
    assert not any(arg.startswith("--epochs") for arg in found)
    assert option_value(args, "algo") == "dapo"
    assert option_value(args[:2], "algo") == "grpo"
    assert option_value([*args, "--algo=ppo"], "algo") == "ppo"


def test_an_unknown_recipe_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'vlm_r1'. There are: pebr_r1_sampling, .*vlm_r1_rec_lora"):
        option_value(["--recipe", "vlm_r1"], "algo")


def test_an_option_may_be_given_several_times() -> None:
    """Its parser would take the last."""
    whole = ["--a", "1", "--server", "x", "y", "--b"]
    assert gathered(["--server=x", "--a", "1", "--server", "y", "--b"], "server") == ["--a", "1", "--b", *whole[2:5]]
    assert gathered(whole, "server") == ["--a", "1", "--b", "--server", "x", "y"]
    assert gathered(["--a", "1", "--server"], "server") == ["--a", "1", "--server"]
    assert gathered(["--servers", "1"], "server") == ["--servers", "1"]

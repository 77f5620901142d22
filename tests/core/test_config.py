from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from vlmenv.core.config import flatten, gathered, to_yaml, with_config_file
from vlmenv.core.errors import ConfigError


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
    ],
)
def test_a_faulty_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        with_config_file([f"--config={file}"], ["steps"])
    assert message in str(caught.value)


def test_two_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="given 2 times: b, a"):
        with_config_file(["--config=b", "--config", "a"], ["steps"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        with_config_file(["--config", str(tmp_path / "none.yaml")], ["steps"])


def test_an_option_may_be_given_several_times() -> None:
    """Its parser would take the last."""
    whole = ["--a", "1", "--server", "x", "y", "--b"]
    assert gathered(["--server=x", "--a", "1", "--server", "y", "--b"], "server") == ["--a", "1", "--b", *whole[2:5]]
    assert gathered(whole, "server") == ["--a", "1", "--b", "--server", "x", "y"]
    assert gathered(["--a", "1", "--server"], "server") == ["--a", "1", "--server"]
    assert gathered(["--servers", "1"], "server") == ["--servers", "1"]

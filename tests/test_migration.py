"""`docs/migration.md` names options that exist, here and in TRL, and aliases that mean what the page says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from conftest import ROOT

from vlmenv.algos import ALGORITHMS
from vlmenv.options.fields import flatten
from vlmenv.options.names import ALIASES
from vlmenv.options.train import default_config

PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
OPTIONS = {name for algo in ALGORITHMS for name in flatten(default_config(algo))}


def rows(trainer: str) -> list[tuple[list[str], list[str]]]:
    """The names of a trainer and the flags here, by row."""
    section = PAGE.partition(f"\n## {trainer}\n")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    flag = re.compile(r"--([a-z][a-z-]*)")
    return [
        (re.findall(r"`([A-Za-z_.0-9]+)`", left), flag.findall(right)) for left, right in cells if "launch" not in right
    ]


@pytest.mark.parametrize("trainer", ["TRL", "EasyR1", "ms-swift", "VLM-R1"])
def test_every_flag_is_an_option(trainer: str) -> None:
    found = rows(trainer)
    assert len(found) > 5
    assert {flag.replace("-", "_") for _, flags in found for flag in flags} <= OPTIONS


@pytest.mark.parametrize("trainer", ["TRL", "EasyR1", "ms-swift", "VLM-R1"])
def test_aliases_mean_what_the_page_says(trainer: str) -> None:
    for names, flags in rows(trainer):
        for name in names:
            if name not in OPTIONS and ALIASES.get(name) in OPTIONS and len(names) == len(flags):
                assert ALIASES[name].replace("_", "-") in flags, name


def test_trl_has_the_names() -> None:
    """Read from the source, as importing TRL takes seconds."""
    text = ""
    for package, files in (
        ("trl", ("grpo_config", "model_config", "base_config", "grpo_trainer")),
        ("transformers", ("training_args",)),
    ):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        folder = Path(spec.origin or "").parent / ("trainer" if package == "trl" else "")
        text += "".join((folder / f"{file}.py").read_text(encoding="utf-8") for file in files)
    values = {"dapo", "grpo", "dr_grpo", "cispo", "sequence", "group", "batch", "none", "colocate", "server"}
    for names, _ in rows("TRL"):
        for name in names:
            assert name in values or re.search(rf"^ +{name}: ", text, flags=re.MULTILINE), name

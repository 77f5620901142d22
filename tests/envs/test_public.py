"""One import line for a task of one's own, and nothing heavy until it is used."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT

import vlmenv.adapters
import vlmenv.agents
import vlmenv.algos
import vlmenv.envs


def test_every_public_name_is_there() -> None:
    names: list[str] = vlmenv.envs.__all__
    assert len(names) == len(set(names)) > 40
    for name in names:
        assert getattr(vlmenv.envs, name) is not None
    assert set(names) <= set(dir(vlmenv.envs))
    everything: dict[str, Any] = {}
    exec("from vlmenv.envs import *", everything)
    assert set(names) <= set(everything)


def test_other_names_are_not() -> None:
    for name in ("Nothing", "_hidden", "check_index"):
        with pytest.raises(AttributeError, match=f"'vlmenv.envs' has no attribute '{name}'"):
            getattr(vlmenv.envs, name)
    with pytest.raises(ImportError, match="Nothing"):
        exec("from vlmenv.envs import Nothing", {})


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import vlmenv", ("vlmenv.envs.base", "PIL", "torch", "transformers")),
        ("from vlmenv.envs import VisualTaskEnv, Sample, ClipScore, Judge", ("torch", "transformers", "accelerate")),
    ],
)
def test_importing_is_light(code: str, unwanted: tuple[str, ...]) -> None:
    asked = f"{code}\nimport sys\nprint([one for one in {unwanted!r} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "module", [vlmenv, vlmenv.adapters, vlmenv.envs, vlmenv.agents, vlmenv.algos], ids=lambda module: module.__name__
)
def test_the_page_lists_what_is_public(module: Any) -> None:
    """Each package has a section that names all of its public names in tables, and no others."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {re.escape(module.__name__)}\n(.*?)(?=^## )", page, flags=re.DOTALL | re.MULTILINE)
    cells = re.findall(r"^\| (`[^|]*`) \|", section, flags=re.MULTILINE)
    assert sorted(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == sorted(module.__all__)

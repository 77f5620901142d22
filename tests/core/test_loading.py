"""What a user names as module:name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vlmenv.core.errors import ConfigError
from vlmenv.core.loading import import_module, load_name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; modules imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine", "mine.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_name_in_the_working_directory_is_found(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "inner.py").write_text("brevity = 3\n")
    assert load_name("mine.inner:brevity", "reward") == 3
    assert import_module("mine.inner", "reward").brevity == 3


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (None, "mine:brevity", r"reward: there is no module 'mine', neither in .* nor among the installed packages"),
        ("", "mine.inner:brevity", r"there is no module 'mine.inner'|the module 'mine.inner' cannot be imported"),
        ("import nowhere_to_be_found", "mine:x", r"module 'mine' cannot be imported: No module named 'nowhere_to_be"),
        ("1 / 0", "mine:x", r"module 'mine' cannot be imported: ZeroDivisionError: division by zero"),
        ("brevity = _hidden = 3", "mine:brevty", r"unknown name in module mine 'brevty'. Did you mean 'brevity'\?"),
        ("", "mine:", r"'mine:' is not of the form module:name"),
        ("", ":x", r"':x' is not of the form module:name"),
    ],
)
def test_what_is_not_found_is_named(folder: Path, code: str | None, name: str, message: str) -> None:
    if code is not None:
        (folder / "mine.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        load_name(name, "reward")

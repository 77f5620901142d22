"""The messages that `docs/troubleshooting.md` explains are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `(.+?)` \| ", PAGE, flags=re.MULTILINE)


def texts(node: ast.AST) -> Iterator[str]:
    """The texts of a module; expressions within them are `…`."""
    for one in ast.walk(node):
        if isinstance(one, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in one.values)
        elif isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield one.value


@pytest.fixture(scope="module")
def code() -> list[str]:
    folders = ("agents", "algos", "envs", "vlmenv")
    files = {file.resolve() for folder in folders for file in (ROOT / folder).rglob("*.py")}
    return [text for file in files for text in texts(ast.parse(file.read_text(encoding="utf-8")))]


def test_every_message_is_one_of_the_code(code: list[str]) -> None:
    assert len(MESSAGES) > 50
    for message in MESSAGES:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(text) for text in code), message

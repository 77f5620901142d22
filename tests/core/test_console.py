from __future__ import annotations

import ast
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import vlmenv
from vlmenv.core.console import PlainConsole, PlainTable, say, styled, warn
from vlmenv.core.text import visible, visible_lines

ANYTHING = st.text(st.characters(exclude_categories=()), min_size=1, max_size=40)
PACKAGE = Path(vlmenv.__file__).parent
MADE_HERE = {"core/console.py": {"Table", "Text"}, "cli.py": {"print"}}
"""Files that may do so; those of `cli.py` are of fixed texts."""
FORBIDDEN = {"Console", "Table", "Text", "print", "pprint", "get_console", "from_markup"}


def printed(*things: object, console: type[Console] = PlainConsole) -> str:
    out = io.StringIO()
    made = console(file=out, width=1000)
    for one in things:
        made.print(one, soft_wrap=True)
    return out.getvalue()


@given(ANYTHING)
def test_a_console_prints_text_as_it_is(text: str) -> None:
    """Lines of spaces alone apart, which rich shortens."""
    told = [line.rstrip() for line in visible_lines(text).split("\n")]
    assert [line.rstrip() for line in printed(text)[:-1].split("\n")] == told


@given(ANYTHING)
@example("\u0300")
def test_a_table_shows_text_as_it_is_on_any_console(text: str) -> None:
    """A line without any width, as of a combining mark alone, is in no cell."""
    table = PlainTable(text, title=text, caption=text)
    table.add_row(text)
    for console in (Console, PlainConsole):
        lines = printed(table, console=console)
        for line in visible_lines(text).split("\n"):
            assert lines.count(line.strip()) >= (4 if cell_len(line) else 2)


@given(ANYTHING)
def test_lines_stay_one(text: str) -> None:
    out = io.StringIO()
    console = Console(file=out, width=20)
    say(text, console, "red")
    warn(text, console)
    assert out.getvalue() == f"{visible(text)}\nwarning: {visible(text)}\n"


def test_parts_have_styles() -> None:
    out = io.StringIO()
    PlainConsole(file=out, force_terminal=True, color_system="standard").print(styled(("[b]\x1b", "red"), " plain"))
    assert out.getvalue() == "\x1b[31m[b]\\x1b\x1b[0m plain\n"


def test_only_this_module_makes_consoles_tables_and_styled_text() -> None:
    found = {str(file.relative_to(PACKAGE)): set(_called(file)) for file in PACKAGE.rglob("*.py")}
    assert {name: calls - MADE_HERE.get(name, set()) for name, calls in found.items() if calls} == {
        name: set() for name, calls in found.items() if calls
    }
    assert found["core/console.py"]


def _called(file: Path) -> Iterator[str]:
    """Forbidden functions and classes that a file calls."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in FORBIDDEN and not (name == "print" and isinstance(node.func, ast.Attribute)):
                yield name


def test_what_is_printed_is_a_text_that_was_made_harmless() -> None:
    """`console.print` is given tables and styled texts: a plain string would have markup on a reader's own console."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "print":
                assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr), f"{file}:{node.lineno}"


@pytest.mark.parametrize("quiet", [True, False])
def test_a_quiet_console_prints_nothing(quiet: bool) -> None:
    out = io.StringIO()
    say("here", PlainConsole(file=out, quiet=quiet))
    assert out.getvalue() == ("" if quiet else "here\n")

"""A reward for answers that are a table in HTML: the similarity of trees, TEDS (PubTabNet, arXiv 1911.10683).

The tree edit distance is that of the library table-recognition-metric, in the extra "tables".
"""

from __future__ import annotations

import importlib
import re
from functools import lru_cache
from typing import Any, Final

from vlmenv.core.errors import ConfigError

MOST_NODES: Final = 200
"""Nodes of a true table: the table itself, its rows and cells. The time grows faster than with their square."""
_ROOM: Final = 1.5
"""Nodes of an answered table per node of the true one, beyond which it scores 0 without being compared."""
_SPANS: Final = ("colspan", "rowspan")


def require_tables() -> Any:
    """The library of TEDS.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("table_recognition_metric")
    except ImportError as error:
        raise ConfigError(
            f"the reward 'teds' needs the extra tables: pip install 'vlmenv[tables]' ({error})"
        ) from error


def check_table(text: str) -> None:
    """Raises ValueError unless a text is a table that can be a truth."""
    table, nodes = read_table(text)
    if table is None:
        raise ValueError("the answer has no <table> with cells, which the reward 'teds' compares")
    if nodes > MOST_NODES:
        raise ValueError(f"the table has {nodes} rows and cells; the reward 'teds' takes {MOST_NODES}")


def teds_reward(text: str, target: str, prediction: str | None) -> float:
    """1 - edit distance of the tables' trees / nodes of the larger one, in [0, 1].

    Rows and cells are nodes. Another cell costs 1 if its spans differ, else the normalised edit distance of its text.
    Heads and bodies are joined, and cells of heads are cells. A table with half as many nodes again as the true one
    scores 0.

    Args:
        text: A completion.
        target: The true table, in HTML.
        prediction: The answered text; None if unreadable, which scores 0.

    Raises:
        ConfigError: The extra "tables" is not installed.
    """
    compare = require_tables().TEDS()
    (true, most), (answered, nodes) = read_table(target), read_table(prediction or "")
    if true is None or answered is None or nodes > _ROOM * most:
        return 0.0
    return 1.0 if answered == true else max(0.0, float(compare(answered, true)))


@lru_cache(maxsize=256)
def read_table(text: str) -> tuple[str | None, int]:
    """The first table of a text as a page of plain rows and cells, and its number of nodes. None: there is no table."""
    begun = re.search(r"<table\b", text, re.IGNORECASE)
    if begun is None:
        return None, 0
    html, etree = (importlib.import_module(f"lxml.{name}") for name in ("html", "etree"))
    try:
        found = html.fragment_fromstring(text[begun.start() :], create_parent="body").find(".//table")
    except (etree.LxmlError, ValueError):  # ValueError: control characters
        return None, 0
    rows = [] if found is None else [list(row.iterchildren("td", "th")) for row in found.iter("tr")]
    if not any(rows):
        return None, 0
    table = etree.Element("table")
    for cells in rows:
        plain = etree.SubElement(table, "tr")
        for cell in cells:
            spans = {name: span for name in _SPANS if (span := _span(cell.get(name))) != "1"}
            etree.SubElement(plain, "td", spans).text = " ".join("".join(cell.itertext()).split())
    written = etree.tostring(table, encoding="unicode", method="html")
    return f"<html><body>{written}</body></html>", sum(1 for _ in table.iter())


def _span(value: str | None) -> str:
    """A cell's span, a whole number; 1 for anything else."""
    return value if value is not None and re.fullmatch(r"[1-9][0-9]{0,2}", value) else "1"

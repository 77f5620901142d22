"""Layouts of one task's public data sets, whose questions and answers stand in columns of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vlmenv.envs.data.media import is_filled, literal


def written_out(cell: Any) -> Any:
    """The list or mapping in a cell, which tables in CSV hold as text.

    Raises:
        TypeError: The text is neither.
    """
    found = literal(cell) if isinstance(cell, str) else cell
    if isinstance(found, (str, int, float)):
        raise TypeError(f"{cell!r:.80} is no list")
    return found


@dataclass(frozen=True)
class RowLayout:
    """A layout of rows that a task reads beside the common ones.

    Example:
        The rows of PixMo-Count, with a `label` and a `count`::

            RowLayout(("label",), ("count",), "How many {} are there?".format)

    Args:
        asked: Columns that the question is made of. The first must hold something; the others may be missing.
        true: Columns that the answer is made of. A row must have all of them.
        question: Makes the question of the contents of `asked`. A missing one is None.
        answer: Makes the answer of the contents of `true`. Default: the content of the first.
        form: Names the form of the boxes and points in the contents of `true`, as `--boxes-in` does. Default: pixels.
    """

    asked: tuple[str, ...]
    true: tuple[str, ...]
    question: Callable[..., str] = str
    answer: Callable[..., Any] = lambda content, *others: content
    form: Callable[..., str] = lambda *contents: "xyxy"

    def fits(self, raw: Mapping[str, Any], taken: Collection[str]) -> bool:
        """Whether a row has this layout.

        Args:
            raw: The row.
            taken: Columns that hold a question in a common layout.
        """
        return self._asks(raw, taken) and all(raw.get(column) is not None for column in self.true)

    def check_filled(self, raw: Mapping[str, Any], taken: Collection[str]) -> None:
        """Raises ValueError if a row has all columns of this layout, but nothing in one of the answer."""
        if self.asked[0] in taken or not self._asks(raw, taken) or not all(column in raw for column in self.true):
            return
        if (empty := next((column for column in self.true if raw[column] is None), None)) is not None:
            raise ValueError(f"the row has a question in '{self.asked[0]}', but its answer is empty: '{empty}' is null")

    def _asks(self, raw: Mapping[str, Any], taken: Collection[str]) -> bool:
        """Whether a row has its question here, and in no column of a common layout."""
        elsewhere = any(is_filled(raw.get(column)) for column in taken if column not in self.asked)
        return not elsewhere and is_filled(raw.get(self.asked[0]))

    def rewritten(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """A row of this layout with its question and its answer in `question` and `answer`, and the form of its boxes.

        Raises:
            ValueError: A column holds something else.
        """
        left = {column: cell for column, cell in raw.items() if column not in (*self.asked, *self.true)}
        true = [raw[column] for column in self.true]
        try:
            question, answer = self.question(*(raw.get(column) for column in self.asked)), self.answer(*true)
            return left | {"question": question, "answer": answer}, self.form(*true)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            named = ", ".join(f"'{column}'" for column in (*self.asked, *self.true))
            raise ValueError(f"the columns {named} do not hold what they should: {error}") from None

    @property
    def used(self) -> tuple[tuple[str, str], ...]:
        """The parts of a row, with the columns that they are made of."""
        return (*(("question", column) for column in self.asked), *(("answer", column) for column in self.true))

"""The choices of a row: a list, a mapping from letters, or either written as text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vlmenv.envs.data.media import literal

LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LABELLED = re.compile(r"[(\[]?([A-Za-z])[)\].:、：．）]\s*(.*\S)", re.DOTALL)
_LABELLED_LINES = re.compile(r"\s*\n\s*")


def read_choices(found: Any, name: str = "choices") -> tuple[str, ...]:
    """The meanings of the letters from A on.

    Args:
        found: A list of texts or numbers; a mapping from the letters A, B, C … to them; or `{"label": [...], "text":
            [...]}`. Any of these may be JSON or Python text. Lines "A. …", "B. …" are read too. Labels within the
            texts, as in "A. cat", are removed.
        name: The field, for messages.

    Returns:
        The choices; empty if there are none.

    Raises:
        ValueError: It has another form, or more than 26 choices; the message says what to do.
    """
    found = _parsed(found) if isinstance(found, str) else found
    if found is None or (isinstance(found, (str, Sequence, Mapping)) and not len(found)):
        return ()
    if isinstance(found, Mapping):
        found = _by_letter(found, name)
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ValueError(f"{name} is {_shown(found)}, which is neither a list nor a mapping: {_ADVICE}")
    if len(found) == 1 and isinstance(found[0], (list, tuple)):
        found = found[0]  # as in one row of MMMU-Pro
    texts = [_text(choice, name) for choice in found]
    if len(texts) > len(LETTERS):
        raise ValueError(f"{name} has {len(texts)} choices; there are letters for {len(LETTERS)}")
    return tuple(_unlabelled(texts))


_ADVICE: Final = (
    'give a list of texts, {"A": …, "B": …}, or either as JSON text; '
    "where it holds no choices, leave it out or rename it"
)


def _parsed(text: str) -> Any:
    """A text as JSON, as Python's literal, or as labelled lines; itself where it is none of these."""
    text = text.strip()
    if text[:1] in ("[", "{", "("):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            found = literal(text)
        if not isinstance(found, str):
            return found
    lines = _LABELLED_LINES.split(text)
    return lines if len(lines) > 1 and _labels(lines) == LETTERS[: len(lines)] else text


def _by_letter(found: Mapping[Any, Any], name: str) -> list[Any]:
    if {*found} == {"label", "text"} and isinstance(found["label"], Sequence) and isinstance(found["text"], Sequence):
        if len(found["label"]) != len(found["text"]):
            raise ValueError(f"{name} has {len(found['label'])} labels for {len(found['text'])} texts")
        found = dict(zip(found["label"], found["text"], strict=True))
    by_letter = {str(label).strip().upper(): choice for label, choice in found.items()}
    letters = [letter for letter in sorted(by_letter) if by_letter[letter] not in (None, "")]  # tables pad with these
    if "".join(letters) != LETTERS[: len(letters)] or len(by_letter) != len(found):
        raise ValueError(f"{name} has the keys {_shown([*found])}, which are not the letters from A on: {_ADVICE}")
    return [by_letter[letter] for letter in letters]


def _text(choice: Any, name: str) -> str:
    if isinstance(choice, bool) or not isinstance(choice, (str, int, float)):
        raise ValueError(f"{name} holds {_shown(choice)}, which is neither text nor number: {_ADVICE}")
    if not str(choice).strip():
        raise ValueError(f"{name} holds an empty choice: {_ADVICE}")
    return str(choice).strip()


def _unlabelled(texts: list[str]) -> list[str]:
    if len(texts) < 2 or _labels(texts) != LETTERS[: len(texts)]:
        return texts
    return [match[2] for text in texts if (match := _LABELLED.fullmatch(text))]


def _labels(texts: Sequence[str]) -> str:
    """The letters by which texts are labelled; "?" stands for one that is not."""
    matches = [_LABELLED.fullmatch(text) for text in texts]
    return "".join(match[1].upper() if match else "?" for match in matches)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"

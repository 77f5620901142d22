from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT
from sentences import long_sentences, sentences, words


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("One. Two two! Three?", ["One.", "Two two!", "Three?"]),
        ("One goes\non here. (Two is in brackets.) Three.", ["One goes on here.", "(Two is in brackets.)", "Three."]),
        ("See eq. 4, by A. Author et al. 2020. Next.", ["See eq. 4, by A. Author et al. 2020.", "Next."]),
        ("It is 0.5 by `a.b. C`. Then.", ["It is 0.5 by `a.b. C`.", "Then."]),
        ("First\n\nsecond.\n- item one\n- item two", ["First", "second.", "- item one", "- item two"]),
        ("It is the prompt's. vLLM is next.** It ends.", ["It is the prompt's.", "vLLM is next.**", "It ends."]),
        ("Sum.\n\nArgs:\n    a: The one.\n    b: The other.", ["Sum.", "Args:", "a: The one.", "b: The other."]),
        ("| a b | c d |\n|---|---|\n| e f | g h |", ["| a b", "c d |", "|---|---|", "| e f", "g h |"]),
        ("Before.\n```bash\nnot. This. One.\n```\nAfter.", ["Before.", "After."]),
    ],
)  # fmt: skip
def test_texts_are_split_into_sentences(text: str, split: list[str]) -> None:
    assert list(sentences(text)) == split


PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/**/*.md", ".github/**/*.md")


@pytest.mark.parametrize("pattern", PAGES)
def test_no_page_has_a_long_sentence(pattern: str) -> None:
    assert not [(page.name, *found) for page in ROOT.glob(pattern) for found in long_sentences(page)]


def test_words_are_counted() -> None:
    assert words("Runs `vlmenv train --steps 2` - twice, on 2 ranks.") == 6


def test_long_sentences_of_docstrings_are_found_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    docstring = f'"""Fine.\n\n    {"word " * 31}end.\n    """'
    file.write_text(f'"""Short."""\n\n\ndef f():\n    {docstring}\n    x = "{"a " * 40}"\n')
    assert [(line, count) for line, count, _ in long_sentences(file)] == [(7, 32)]
    assert not list(long_sentences(file, limit=32))

"""Lists long sentences of documentation and docstrings: `python tests/sentences.py [--limit 30] [PATH ...]`.

`tests/test_sentences.py` fails for pages; docstrings are listed only.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATHS = ("README.md", "CONTRIBUTING.md", "docs", "agents", "algos", "envs", "vlmenv", "examples", "benchmarks")
LIMIT = 30

_CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*#>|]|\d+\.)\s|\|)")
_ENTRY = re.compile(r"\n(?=\s*\*{0,2}\w+: )")
_END = re.compile(r"(?<=[.!?])[)\"'”*]*\s+(?=[A-Z0-9`\"'“(*\[]|(?:vLLM|vlmenv|nf4|int8)\b)")
_NO_END = re.compile(r"(?:\b(?i:e\.g|i\.e|cf|vs|eq|fig|etc|al|no)|\b[A-Z])\.$")


def sentences(text: str) -> Iterator[str]:
    """Splits Markdown or a docstring into sentences.

    Code blocks are left out. Table cells, list items, headings and the entries of `Args:` begin a sentence anew.
    """
    for block in _BLOCK.split(_CODE_BLOCK.sub("\n\n", text)):
        for entry in _ENTRY.split(block):
            for cell in entry.split(" | ") if entry.lstrip().startswith("|") else [entry]:
                yield from _split(" ".join(cell.split()))


def _split(text: str) -> Iterator[str]:
    start = 0
    masked = re.sub(r"`[^`]*`", lambda span: f"`{'x' * (len(span[0]) - 2)}`", text)  # no end lies within code
    for end in _END.finditer(masked):
        if _NO_END.search(text[start : end.start()]):
            continue
        yield text[start : end.end()].strip()
        start = end.end()
    if text[start:].strip():
        yield text[start:].strip()


def words(sentence: str) -> int:
    """The number of words; a code span counts as one."""
    return len([word for word in re.sub(r"`[^`]*`", "code", sentence).split() if re.search(r"\w", word)])


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """The line numbers and texts of a file: all of a Markdown file, the docstrings of a Python file."""
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        yield 1, content
        return
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def long_sentences(file: Path, limit: int = LIMIT) -> Iterator[tuple[int, int, str]]:
    """Line number, number of words and text of each sentence with more than `limit` words."""
    for line, text in texts(file):
        for sentence in sentences(text):
            if words(sentence) > limit:
                first = sentence.split()[0]
                yield line + text[: max(0, text.find(first))].count("\n"), words(sentence), sentence


def _files(paths: list[str]) -> Iterator[Path]:
    for path in paths:
        found = ROOT / path
        yield from (
            [found] if found.is_file() else sorted(one for one in found.rglob("*") if one.suffix in {".md", ".py"})
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", default=list(PATHS))
    parser.add_argument("--limit", type=int, default=LIMIT)
    options = parser.parse_args()
    seen, total = set[Path](), 0
    for file in _files(options.paths):
        if file.resolve() in seen or not file.is_file():
            continue
        seen.add(file.resolve())
        for line, count, sentence in long_sentences(file, options.limit):
            print(f"{file.relative_to(ROOT)}:{line}: {count} words: {sentence}")
            total += 1
    print(f"{total} sentences with more than {options.limit} words")


if __name__ == "__main__":
    main()

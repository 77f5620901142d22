r"""Scores hostile answers, per task: random, broken, huge and cunning ones.

None may raise, take a second of CPU, or score above 0 without the right content. An independent rule decides what the
right content is: the digits, letters, words or boxes of the truth, or an operation that might yield them. Format and
length are not scored here. Hacks list everything, or deny the truth; they hold it, and must not score as right.

Blocks of 500 answers are independent of each other, by their number. `--log` keeps those that are done, so that a run
can be continued, or divided by `--first`.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import random
import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vlmenv.core.answers import Answer, Caption, Detection
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.points import parse_points
from vlmenv.core.spaces import Image
from vlmenv.envs.captioning import answer_reward, described_keywords_reward
from vlmenv.envs.data.source import Sample
from vlmenv.envs.rewards.actions import Action, parse_action, step_reward
from vlmenv.envs.rewards.answers import accuracy_term, read_answer
from vlmenv.envs.rewards.boxes import iou_reward
from vlmenv.envs.rewards.counts import count_reward, parse_count
from vlmenv.envs.rewards.detection import TERMS
from vlmenv.envs.rewards.documents import relaxed_reward
from vlmenv.envs.rewards.math import math_equal
from vlmenv.envs.rewards.points import Pointing, point_f1_reward
from vlmenv.envs.rewards.segments import (
    Objects,
    Segment,
    boxes_points_reward,
    matched_iou_reward,
    parse_segments,
)
from vlmenv.envs.rewards.spans import TrueSpan, parse_span, span_iou50_reward
from vlmenv.envs.rewards.transcripts import cer_reward, exact_text_reward, read_transcript, wer_reward
from vlmenv.envs.search import SearchEnv

BLOCK = 500
ANSWERS = {
    "math": 100_000,
    "choices": 80_000,
    "captions": 40_000,
    "boxes": 80_000,
    "counts": 100_000,
    "points": 100_000,
    "screens": 100_000,
    "texts": 100_000,
    "segments": 100_000,
    "charts": 100_000,
    "spans": 100_000,
    "searches": 100_000,
}


@dataclass
class Args:
    """Score hostile answers."""

    answers: dict[str, int] = field(default_factory=lambda: dict(ANSWERS))
    """Number of answers by task: math, choices, captions, boxes, counts, points, screens, texts, segments, charts,
    spans, searches."""
    first: int = 0
    """Number of the first block of 500."""
    log: Path | None = None
    """File of the blocks that are done. Those in it are not scored again."""
    output: Path | None = None
    """Markdown file for the table."""


@dataclass
class Block:
    """What a block of answers did."""

    task: str
    number: int
    answers: int = 0
    checked: int = 0
    """answers without the right content, by the rule"""
    hacks: int = 0
    """answers that list everything or deny the truth"""
    raised: int = 0
    slow: int = 0
    scored: int = 0
    """answers that scored, and should not have"""
    seconds: float = 0.0
    slowest: float = 0.0
    """most CPU time of one answer, in seconds"""
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Hostile:
    """A hostile answer."""

    text: str
    is_hack: bool = False
    """whether it holds the truth, but must not count as right"""


@dataclass(frozen=True)
class Task:
    """A truth with its reward, and the rule for answers."""

    answer: Callable[[random.Random], Hostile]
    score: Callable[[str], float]
    lacks: Callable[[str], bool]
    """whether a text lacks the right content"""
    answer_format: AnswerFormat = AnswerFormat.TAGS


def main(args: Args) -> None:
    done = _done(args.log)
    for task, count in args.answers.items():
        for number in range(args.first, args.first + -(-count // BLOCK)):
            if (task, number) not in done:
                done[task, number] = block = run_block(task, number)
                _note(block, args.log)
    table = describe([block for block in done.values() if block.task in args.answers])
    print(table)
    if args.output is not None:
        args.output.write_text(table, encoding="utf-8")


def _done(log: Path | None) -> dict[tuple[str, int], Block]:
    lines = log.read_text(encoding="utf-8").splitlines() if log is not None and log.exists() else []
    blocks = [Block(**json.loads(line)) for line in lines]
    return {(block.task, block.number): block for block in blocks}


def _note(block: Block, log: Path | None) -> None:
    for example in block.examples:
        print(f"{block.task} {block.number}: {example}", flush=True)
    if log is not None:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(block)) + "\n")


def run_block(name: str, number: int, count: int = BLOCK) -> Block:
    """Scores a block of answers."""
    rng = random.Random(f"{name} {number}")
    block = Block(name, number)
    math_equal([("\\sqrt{2}", "x")])  # its processes are loaded beforehand, as training does
    children = children_cpu()
    for i in range(count):
        if i % 20 == 0:
            task = TASKS[name](rng)
        hostile = task.answer(rng)
        text = completion(hostile.text, task.answer_format, rng)
        before = (time.perf_counter(), time.process_time())
        score = _score(task, text, block)
        seconds, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
        if seconds > 0.2 or i % 20 == 0:  # what took less by the clock took less of the CPU
            children, earlier = children_cpu(), children
            cpu += children - earlier if seconds > 0.2 else 0
        block.answers += 1
        block.seconds += seconds
        block.slowest = max(block.slowest, cpu)
        if cpu > 1:
            block.slow += 1
            block.examples.append(f"{cpu:.1f} s of CPU: {text[:300]!r}")
        lacks = task.lacks(hostile.text)
        block.checked += lacks
        block.hacks += hostile.is_hack
        if score > (1 - 1e-9 if hostile.is_hack and not lacks else 0) and (lacks or hostile.is_hack):
            block.scored += 1
            block.examples.append(f"scores {score:.3g}: {text[:300]!r}")
    return block


def _score(task: Task, text: str, block: Block) -> float:
    try:
        return task.score(text)
    except Exception as error:  # any is a fault
        block.raised += 1
        block.examples.append(f"{type(error).__name__}: {error} for {text[:300]!r}")
        return 0.0


def children_cpu() -> float:
    """Seconds of CPU that the descendants of this process have taken."""
    total, parents = 0.0, {os.getpid()}
    ticks = os.sysconf("SC_CLK_TCK")
    rows = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            rows.append((int(entry.name), int(fields[1]), sum(map(int, fields[11:15])) / ticks))
    for process, parent, seconds in sorted(rows):
        if parent in parents:
            parents.add(process)
            total += seconds
    return total


def completion(answer: str, answer_format: AnswerFormat, rng: random.Random) -> str:
    """A completion with an answer; some are broken."""
    kind = rng.random()
    if kind < 0.85:
        return answer_format.write(answer, "I think.")
    if kind < 0.9:
        return answer
    if kind < 0.95:
        return (
            f"<think>in <answer>{answer}</answer></think>\n<answer>\n{answer}\n</answer>"
            + "</answer>" * rng.randint(0, 3)
        )
    return answer_format.write(answer) * rng.randint(2, 4)


# Texts

_JUNK = (
    *(" ", "\n", "\t", ",", ".", ";", ":", "!", "?", "'", '"', "`", "*", "_", "#", "|", "&", "~", "<", ">", "=", "$"),
    *("$$", "\\(", "\\)", "\\[", "\\]", "\\,", "\\quad", "\\\\", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "%", "°"),
    *("\\boxed{", "\\text{", "\\mathrm{", "\\left(", "\\right)", "\\begin{cases}", "\\end{cases}", "\\begin{matrix}"),
    *(
        "，",
        "。",
        "（",
        "）",
        "：",
        "、",
        "【",
        "】",
        "\u200b",
        "\u3000",
        "\ufeff",
        "\x00",
        "\ud800",
        "\u0301",
        "\ue000",
    ),
    *(
        "the answer is",
        "Answer:",
        "答案是",
        "or",
        "and",
        "not",
        "is",
        "so",
        "but",
        "wrong",
        "或",
        "不",
        "cm",
        "kg",
        "厘米",
    ),
    *("```json", "```", "</think>", "<think>", "</answer>", "<answer>", "<b>", "</b>", "<|box_start|>", "None", "null"),
)
_OPERATORS = (
    *("+", "-", "*", "/", "^", "!", "\\frac{", "\\sqrt{", "\\times", "\\cdot", "\\pm", "\\le", "<", "\\sum", "\\int"),
    *(
        "\\binom{",
        "\\pi",
        "\\infty",
        "e",
        "x",
        "i",
        "\\sin",
        "\\log",
        "×",
        "²",
        "½",
        "√",
        "²",
        "π",
        "≤",
        "\\cup",
        "\\in",
    ),
)
_JOINS = (
    " ",
    "\n",
    ", ",
    ",",
    "; ",
    " and ",
    " or ",
    ")(",
    "} {",
    "\\,",
    "\\quad ",
    " & ",
    "|",
    "\n\n",
    "、",
    "和",
    " ... ",
    "\t",
)
_WRAPS = (
    *(
        "{}",
        "${}$",
        "\\boxed{{{}}}",
        "The answer is {}",
        "答案是{}",
        "**{}**",
        "x = {}",
        "\\[\n{}\n\\]",
        "({})",
        "[{}]",
    ),
    *(
        "\\{{{}\\}}",
        "\\text{{{}}}",
        "Answer: {}.",
        "{} cm",
        "{}%",
        "It is {}, I think",
        "\\boxed{{\\text{{{}}}}}",
        "{{{}}}",
    ),
)


def soup(rng: random.Random, *pieces: Sequence[str]) -> str:
    """Random pieces in a row."""
    return "".join(rng.choice(rng.choice(pieces)) for _ in range(rng.randint(0, 30)))


def wild(rng: random.Random) -> str:
    """Any characters."""
    return "".join(
        chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000))))
        for _ in range(rng.randint(0, 60))
    )


def large(rng: random.Random, piece: str) -> str:
    """A piece over and over, or nested deeply."""
    times = rng.choice((50, 300, 2000, 12_000, 60_000)) // max(1, len(piece)) + 1
    opening, closing = rng.choice(
        (
            ("(", ")"),
            ("[", "]"),
            ("{", "}"),
            ("\\frac{", "}"),
            ("\\boxed{", "}"),
            ("\\sqrt{", "}"),
            ("^{", "}"),
            ("<think>", ""),
            ('{"a":', "}"),
            ("not ", ""),
        )
    )
    deep = rng.choice((8, 20, 200, 3000))
    return rng.choice(
        (
            piece * times,
            opening * deep + piece + closing * deep,
            opening * deep + piece,
            " ".join([piece] * min(times, 5000)),
        )
    )


def wrapped(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice((0, 1, 1, 2))):
        text = rng.choice(_WRAPS).format(text)
    return text


# Mathematics

_YIELDS = re.compile(
    r"[-+*/^!%×÷·√π∞±|<>=≤≥²³¹⁰⁴-⁹½¼¾⅐-⅞:'‰°]|\\[A-Za-z]*|(?<![A-Za-z])[A-Za-z]{1,2}(?![A-Za-z])|[万亿千百]"
)
_NOTHING = re.compile(
    r"\\(?:boxed|text|mathrm|quad|left|right|begin|end)(?![A-Za-z])|\\[(){}\[\],\\]|\b(?:is|or|so|cm|kg)\b"
)


def numbers_in(text: str) -> set[Fraction]:
    """All numbers that a text might state: its digits, and also its digits put together over separators."""
    found = set()
    for run in re.findall(r"\d[\d.,' ]*", text):
        for one in (*re.findall(r"\d+(?:\.\d+)?", run), re.sub(r"[^\d.]", "", run).strip("."), re.sub(r"\D", "", run)):
            if one.count(".") <= 1 and len(one) < 100:
                found.add(Fraction(one))
    return found


def lacks_number(truth: Fraction, tolerance: Fraction = Fraction(0)) -> Callable[[str], bool]:
    """The rule for a whole number above 0 as truth, which a relative error up to the tolerance leaves right."""

    def lacks(text: str) -> bool:
        plain = unicodedata.normalize("NFKC", text) if len(text) < 5000 else text
        if any(sign in text for sign in "²³¹⁰½¼¾⅓√π×÷") or _YIELDS.search(_NOTHING.sub(" ", plain)):
            return False  # an operation might yield it
        right = any(abs(one - truth) <= tolerance * truth for one in numbers_in(plain))
        return not any(unicodedata.category(one) == "No" for one in plain[:5000]) and not right

    return lacks


def apart(rng: random.Random, truth: int) -> str:
    """Addends or factors of a number, side by side without an operation."""
    if rng.random() < 0.5 and truth > 3:
        first = rng.randint(1, truth - 1)
        parts = [first, truth - first]
    else:
        divisor = next((d for d in range(2, truth) if truth % d == 0), 1)
        parts = [divisor, truth // divisor]
    a, b = map(str, parts)
    return rng.choice(
        (
            f"{a} {b}",
            f"{a}\n{b}",
            f"({a})({b})",
            f"{a}({b})",
            f"{a}{{{b}}}",
            f"{a}, {b}",
            f"{a} and {b}",
            f"{{{a}}}{{{b}}}",
            f"{a}\\quad {b}",
            f"{a};{b}",
            f"[{a}][{b}]",
            f"{a}\\text{{ }}{b}",
        )
    )


_BOMBS = (
    *(
        "9^{9^{9^9}}",
        "2^{999999}",
        "99999!",
        "\\sum_{k=1}^{10^9} k^k",
        "\\int_0^1 x^x dx",
        "\\binom{99999}{5000}",
        "((9!)!)!",
    ),
    *(
        "(x+1)^{500}",
        "\\frac{1}{" * 30,
        "\\sqrt{" * 30 + "2",
        "x^{y^{z^{w^{v}}}}",
        "\\prod_{i=1}^{9999} i",
        "1e999",
        "10^{10^{10}}",
    ),
    *(
        "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{99}",
        "\\lim_{x\\to0} \\frac{\\sin x}{x}",
        "\\log_{1} 2",
        "0/0",
        "\\frac{0}{0}",
        "9" * 900,
    ),
)
_NUMBER_DENIED = (
    "not {}",
    "It is not {}.",
    "\\boxed{{{}}} is wrong",
    "anything but {}",
    "{}? No.",
    "more than {}",
    "less than {}",
    "either {} or something else",
)


def _among_others(rng: random.Random, truth: int) -> str:
    """The true number in a list of larger ones."""
    listed = [str(truth), *rng.sample([str(n) for n in range(truth + 1, truth + 40)], rng.randint(1, 8))]
    rng.shuffle(listed)
    join = rng.choice(
        (", ", " or ", " and ", ",", "; ", " / ", "\n", "、", "或", " vs ", "} or \\boxed{", "}, \\boxed{")
    )
    text = join.join(listed)
    if "boxed" in join:
        return f"\\boxed{{{text}}}"
    return rng.choice(("{}", "${}$", "The answer is {}", "({})", "\\{{{}\\}}", "\\boxed{{{}}}")).format(text)


def math_task(rng: random.Random) -> Task:
    truth = rng.choice((rng.randint(11, 99), rng.randint(100, 9999)))
    target = read_answer(str(truth), "math")

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(9)
        digits = [str(rng.randint(0, 9999)) for _ in range(4)]
        if kind == 0:
            return Hostile(soup(rng, _JUNK, digits))
        if kind == 1:
            return Hostile(soup(rng, _JUNK, _OPERATORS, digits))
        if kind == 2:
            return Hostile(
                wrapped(rng, rng.choice(_JOINS).join(str(rng.randint(0, 2 * truth)) for _ in range(rng.randint(1, 9))))
            )
        if kind == 3:
            return Hostile(wrapped(rng, apart(rng, truth)))
        if kind == 4:
            near = rng.choice(
                (truth + 1, truth - 1, truth * 10, -truth, truth + 0.5, truth * 1001, f"{truth}.5", f"{truth}x")
            )
            return Hostile(wrapped(rng, str(near)))
        if kind == 5:
            return Hostile(rng.choice((wild(rng), large(rng, rng.choice((*_JUNK, *_OPERATORS, *digits))))))
        if kind == 6:
            return Hostile(wrapped(rng, rng.choice(_BOMBS)))
        if kind == 7:
            return Hostile(_among_others(rng, truth), True)
        return Hostile(rng.choice(_NUMBER_DENIED).format(truth), True)

    return Task(
        answer,
        lambda text: accuracy_term.batch([text], [target], [()], AnswerFormat.TAGS)[0],
        lacks_number(Fraction(truth)),
    )


# Choices, words, numbers

_WORDS = ("cat", "dog", "bird", "red car", "blue car", "a tree", "house", "river", "table", "lamp", "stone", "cloud")
_LETTER_DENIED = (
    "not {}",
    "It is not {}.",
    "{} is wrong.",
    "It cannot be {}",
    "{}不对",
    "\\boxed{{{}}} is incorrect",
    "Anything but {}.",
    "I doubt that it is {}",
    "neither {} nor the others",
)


def choice_task(rng: random.Random) -> Task:
    if rng.random() < 0.25:
        return other_task(rng)
    choices = tuple(rng.sample(_WORDS, 4)) if rng.random() < 0.7 else tuple(map(str, rng.sample(range(10, 99), 4)))
    letter = rng.choice("ABCD")
    right = choices["ABCD".index(letter)]
    target = Answer(letter, "choice", choices=choices if rng.random() < 0.8 else ())
    words = [word for word in re.findall(r"\w+", right.lower()) if word != "a"]

    def lacks(text: str) -> bool:
        plain = unicodedata.normalize("NFKC", text[:20_000]).lower()
        held = bool(re.search(rf"(?<![a-z]){letter.lower()}(?![a-z])|[a-d]{{2,4}}", plain)) or all(
            word in plain for word in words
        )
        return not held and not (right.isdigit() and not lacks_number(Fraction(right))(text))

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(6)
        others = [other for other in "ABCD" if other != letter]
        if kind == 0:
            return Hostile(soup(rng, _JUNK, "ABCDEFabcdef", choices))
        if kind == 1:
            return Hostile(soup(rng, _JUNK, others, [one for one in choices if one != right]))
        if kind == 2:
            return Hostile(wrapped(rng, rng.choice(_JOINS).join(rng.choices(others, k=rng.randint(1, 3)))))
        if kind == 3:
            return Hostile(rng.choice((wild(rng), large(rng, rng.choice((*_JUNK, *others, "A. x "))))))
        if kind == 4:
            listed = [letter, *rng.sample(others, rng.randint(1, 3))]
            rng.shuffle(listed)
            text = rng.choice((", ", " or ", " and ", "/", "", " ", "\n", "、", ")(", "或", " & ")).join(listed)
            return Hostile(
                rng.choice(("{}", "\\boxed{{{}}}", "The answer is {}", "({})", "{}.", "答案是{}")).format(text), True
            )
        return Hostile(rng.choice(_LETTER_DENIED).format(rng.choice((letter, f"({letter})"))), True)

    return Task(answer, lambda text: accuracy_term.batch([text], [target], [()], AnswerFormat.TAGS)[0], lacks)


def other_task(rng: random.Random) -> Task:
    """Yes or no, a number, or words."""
    kind = rng.choice(("yes_no", "numeric", "exact"))
    truth = {"yes_no": rng.choice(("yes", "no")), "numeric": str(rng.randint(11, 9999)), "exact": rng.choice(_WORDS)}[
        kind
    ]
    target = read_answer(truth, kind)  # type: ignore[arg-type]
    forms = {"yes": ("yes", "true", "是", "对", "有", "正确"), "no": ("no", "false", "不", "否", "错", "没")}.get(
        truth, (truth.removeprefix("a "),)
    )

    def lacks(text: str) -> bool:
        if kind == "numeric":
            return lacks_number(Fraction(truth))(text)
        plain = unicodedata.normalize("NFKC", text[:20_000]).lower()
        return not any(form in plain for form in forms)

    def answer(rng: random.Random) -> Hostile:
        kind_of = rng.randrange(4)
        if kind_of == 0:
            return Hostile(soup(rng, _JUNK, ("yes", "no", "true", "12", "345", *_WORDS)))
        if kind_of == 1:
            return Hostile(
                wrapped(
                    rng, rng.choice(_JOINS).join(rng.choices(("maybe", "7", "88", "red", *_WORDS), k=rng.randint(1, 4)))
                )
            )
        if kind_of == 2:
            return Hostile(rng.choice((wild(rng), large(rng, rng.choice((*_JUNK, "yes", "1"))))))
        both = {
            "yes_no": "yes or no",
            "numeric": f"{truth} or {int(truth) + 1}" if kind == "numeric" else "",
            "exact": f"{truth} or nothing",
        }
        return Hostile(rng.choice(("{}", "{}.", "\\boxed{{{}}}", "The answer is {}")).format(both[kind]), True)

    return Task(answer, lambda text: accuracy_term.batch([text], [target], [()], AnswerFormat.TAGS)[0], lacks)


# Captions


def caption_task(rng: random.Random) -> Task:
    keywords = tuple(rng.sample(("zebra", "violin", "lantern", "斑马", "harbour", "Ampel"), 3))
    target = Caption(keywords, read_answer("4711"))

    def lacks(text: str) -> bool:
        plain = "".join(unicodedata.normalize("NFKC", text[i : i + 1000]) for i in range(0, len(text), 1000)).casefold()
        return not any(word.casefold() in plain for word in keywords) and lacks_number(Fraction(4711))(text)

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(3)
        if kind == 0:
            return Hostile(
                soup(rng, _JUNK, ("a", "street", "12", "### Image Description:", "### The final answer is:"))
            )
        if kind == 1:
            return Hostile(rng.choice((wild(rng), large(rng, rng.choice((*_JUNK, "### Rationales: ", "word "))))))
        return Hostile(" ".join(keywords), True)  # on the answer's line, where it describes nothing

    def score(text: str) -> float:
        form = AnswerFormat.SECTIONS
        return max(described_keywords_reward(text, target, form), answer_reward(text, target, form))

    return Task(answer, score, lacks, AnswerFormat.SECTIONS)


# Counts


def count_task(rng: random.Random) -> Task:
    truth = rng.randint(21, 9999)  # no word is read as these

    def lacks(text: str) -> bool:
        return "<point" not in text.lower() and lacks_number(Fraction(truth))(text)

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(5)
        digits = [str(rng.randint(0, 9999)) for _ in range(4)]
        if kind == 0:
            return Hostile(
                soup(rng, _JUNK, digits, ("five", "twenty", "no", '<points x1="1" y1="2"', 'x2="3" y2="4">'))
            )
        if kind == 1:
            return Hostile(wrapped(rng, rng.choice(_JOINS).join(str(rng.randint(0, 2 * truth)) for _ in range(4))))
        if kind == 2:
            return Hostile(rng.choice((wild(rng), large(rng, rng.choice((*_JUNK, *digits, '<point x="1" y="2">'))))))
        if kind == 3:
            near = rng.choice((truth + 1, truth - 1, truth * 10, -truth, truth + 0.5, f"{truth}.5", f"{truth}x"))
            return Hostile(wrapped(rng, str(near)))
        listed = [str(truth), *map(str, rng.sample(range(truth + 1, truth + 40), rng.randint(1, 8)))]
        rng.shuffle(listed)
        return Hostile(rng.choice((", ", " or ", " and ", "; ", " / ", "\n", "、", "或", "-")).join(listed), True)

    def score(text: str) -> float:
        content = AnswerFormat.TAGS.extract(text)
        return count_reward(text, truth, None if content is None else parse_count(content))

    return Task(answer, score, lacks)


def chart_task(rng: random.Random) -> Task:
    """As counts, with ChartQA's tolerance."""
    truth = rng.randint(21, 9999)
    target = read_answer(str(truth), "numeric")

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(4)
        digits = [str(rng.randint(0, 9999)) for _ in range(4)]
        if kind == 0:
            return Hostile(soup(rng, _JUNK, _OPERATORS, digits))
        if kind == 1:
            return Hostile(wrapped(rng, rng.choice(_JOINS).join(str(rng.randint(0, 2 * truth)) for _ in range(4))))
        if kind == 2:
            return Hostile(rng.choice((wild(rng), large(rng, rng.choice((*_JUNK, *digits))))))
        listed = [str(truth), *map(str, rng.sample(range(2 * truth, 3 * truth), rng.randint(1, 8)))]
        rng.shuffle(listed)
        return Hostile(rng.choice((", ", " or ", " and ", "; ", " / ", "\n", "、", "或")).join(listed), True)

    return Task(answer, lambda text: relaxed_reward(text, target), lacks_number(Fraction(truth), Fraction(1, 20)))


# Spans of time

_CLOCK = re.compile(r"(?:\d+:)?\d+:\d+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+")


def times_in(text: str) -> set[float]:
    """All times in seconds that a text might state: its numbers, and its hours and minutes."""
    found = set()
    for one in _CLOCK.findall(text[:5000]):
        parts = [float(part) for part in one.split(":")]
        found |= {*parts, sum(part * 60**i for i, part in enumerate(reversed(parts)))}
    return found


def span_task(rng: random.Random) -> Task:
    start = rng.randint(100, 2000) / 10
    end = start + rng.randint(20, 600) / 10
    target = TrueSpan(start, end, 300.0)

    def lacks(text: str) -> bool:
        """No two times of the text have an overlap of a half with the truth; of very many that is not known."""
        times = sorted(times_in(text))
        if len(times) > 200 or len(text) > 5000:
            return False
        pairs = ((a, b) for i, a in enumerate(times) for b in times[i:])
        return not any(2 * (min(b, end) - max(a, start)) >= max(b, end) - min(a, start) for a, b in pairs)

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(6)
        low = [f"{rng.randint(0, 90) / 10}" for _ in range(4)]
        words = (" to ", "-", "from ", " seconds", "s", ":", '{"start": ', ', "end": ', '"start_time"', "[", "]", "}")
        if kind == 0:
            return Hostile(soup(rng, _JUNK, low, words))
        if kind == 1:
            return Hostile(rng.choice((wild(rng), large(rng, rng.choice((*_JUNK, *words, *low))))))
        if kind == 2:
            numbers = ("NaN", "Infinity", "-1", "1e400", "1e3", "null", '"7"', "9" * 400, "true", "[1]", "{}")
            return Hostile(f'{{"start": {rng.choice(numbers)}, "end": {rng.choice(numbers)}}}')
        if kind == 3:
            return Hostile(wrapped(rng, f"{end} to {start}"), True)
        said = f"{start} to {end}"
        others = [f"{one / 10} to {one / 10 + 20}" for one in rng.sample(range(2500), rng.randint(1, 9))]
        if kind == 4:
            return Hostile(
                rng.choice(("not {}", "{} is wrong", "{}?!", "-{}", "{}0 minutes", "{} or not")).format(said), True
            )
        return Hostile(rng.choice((", ", " or ", "; ", "\n", " and ")).join([*others, said]), True)

    def score(text: str) -> float:
        content = AnswerFormat.TAGS.extract(text)
        return span_iou50_reward(text, target, None if content is None else parse_span(content))

    return Task(answer, score, lacks)


# Searches

_PAGES = 9


@functools.cache
def album() -> tuple[SearchEnv, tuple[Image, ...]]:
    """The task of searches, and nine small images."""
    return SearchEnv(), tuple(np.full((16, 16, 3), 20 * number, np.uint8) for number in range(_PAGES))


_NO_PAGES = ("0", "10", "-3", "3.5", "1e9", "[3]", "null", "true", '"three"', "9" * 900, "٣", "NaN", "{}", "3x")


def search_task(rng: random.Random) -> Task:
    """A right answer scores 1, and a request that opens an image scores a half."""
    truth = rng.randint(11, 9999)
    env, images = album()
    sample = Sample("album", images, "How many?", read_answer(str(truth), "numeric"))
    lacks_truth = lacks_number(Fraction(truth))

    def lacks(text: str) -> bool:
        """It has no number of an image either, behind the key of a request."""
        pages = re.findall(r"open\W{1,40}([1-9])(?!\w)", text[:20_000])
        return lacks_truth(re.sub("[:'\"]", " ", text)) and not pages

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(6)
        words = ('"open"', "'open'", "open", '{"open": ', ": ", "{", "}", '"image"', '"page": ', "[", "]")
        if kind == 0:
            return Hostile(soup(rng, _JUNK, words, "0123456789"))
        if kind == 1:
            return Hostile(rng.choice((wild(rng), large(rng, rng.choice((*_JUNK, *words, '{"open": 3}'))))))
        if kind == 2:
            return Hostile(f'{{"open": {rng.choice(_NO_PAGES)}}}')
        if kind == 3:
            return Hostile(f'{{"open": {rng.randint(1, 4)}, "open": {rng.randint(5, 9)}}}')
        forms = (
            *('{{"open": {0}}}', '{{"open": 3}} The answer is {0}', '{{"open": 3, "answer": {0}}}', "{0} or {1}"),
            *('{{"open": {0}}} or {{"open": {1}}}', "not {0}", "{0}, {1}"),
        )
        return Hostile(rng.choice(forms).format(truth, truth + 1), True)

    def score(text: str) -> float:
        opens = env.respond(sample, (text,)) is not None
        (scored,) = env.score_batch([text], [sample])
        return max(scored.terms["accuracy"], opens / 2)

    return Task(answer, score, lacks)


# Boxes

_LEAST = 500
"""Left and top edge of the true boxes: no box of numbers up to half of it reaches them, read in whatever way."""


def point_task(rng: random.Random) -> Task:
    x, y = rng.randint(_LEAST, 700), rng.randint(_LEAST, 700)
    target = Pointing(((float(x), float(y), x + 100.0, y + 80.0),), (20.0, 20.0))

    def score(text: str) -> float:
        content = AnswerFormat.TAGS.extract(text)
        return point_f1_reward(text, target, None if content is None else parse_points(content))

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(5)
        low = [str(rng.randint(0, _LEAST // 2)) for _ in range(4)]
        if kind == 0:
            marks = ('<points x1="', '" y1="', '" x2="', '">', "point_2d", "[", "]", "{", "}", ",", ":")
            return Hostile(soup(rng, _JUNK, low, marks))
        if kind == 1:
            rows = [{rng.choice(("point_2d", "point", "x", "label")): rng.choice((low[:2], low, [1, 2], "x", None))}]
            text = json.dumps(rows * rng.randint(1, 5))
            return Hostile(rng.choice((text, text[: rng.randint(0, len(text))], text.replace("]", ""))))
        if kind == 2:
            piece = rng.choice((*_JUNK, "[1,2],", '<point x="1" y="2">', '{"point_2d":[1,2]},'))
            return Hostile(rng.choice((wild(rng), large(rng, piece))))
        if kind == 3:
            numbers = ("NaN", "Infinity", "-1", "1e400", "0", "1.5", "null", '"7"', "9" * 400)
            return Hostile(f"[{rng.choice(numbers)}, {rng.choice(numbers)}]")
        step = rng.choice((15, 40, 60))  # a grid over everything
        return Hostile(json.dumps([[i, j] for i in range(0, 1000, step) for j in range(0, 1000, step)]), True)

    return Task(answer, score, _lacks_large)


def segment_task(rng: random.Random) -> Task:
    x, y = rng.randint(_LEAST, 700), rng.randint(_LEAST, 700)
    box = (float(x), float(y), x + 100.0, y + 80.0)
    target = Objects((Segment(box),), (1.0, 1.0), (1000.0, 1000.0))

    def score(text: str) -> float:
        content = AnswerFormat.TAGS.extract(text)
        answered = None if content is None else parse_segments(content)
        return max(term(text, target, answered) for term in (matched_iou_reward, boxes_points_reward))

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(5)
        low = [str(rng.randint(0, _LEAST // 2)) for _ in range(4)]
        if kind == 0:
            pieces = ('{"polygon": ', '"bbox_2d": ', '"point_2d": ', "[", "]", "{", "}", ",", "[[1,2],[30,2],[30,40]]")
            return Hostile(soup(rng, _JUNK, low, pieces))
        if kind == 1:
            row = {rng.choice(("polygon", "polygons", "bbox_2d")): rng.choice((list(map(int, low)), [[1, 2]], "x", {}))}
            text = json.dumps([row] * rng.randint(1, 5))
            return Hostile(rng.choice((text, text[: rng.randint(0, len(text))], text.replace("]", ""))))
        if kind == 2:
            piece = rng.choice((*_JUNK, "[[1,2],[30,2],[30,40]],", '{"polygon":', '{"bbox_2d":[1,2,30,40]},'))
            return Hostile(rng.choice((wild(rng), large(rng, piece))))
        if kind == 3:  # a tangle
            corners = [
                [rng.randint(0, _LEAST // 2), rng.randint(0, _LEAST // 2)] for _ in range(rng.choice((9, 90, 500)))
            ]
            return Hostile(json.dumps([{"polygon": corners}]))
        boxes = [[i, j, i + 100, j + 100] for i in range(0, 1000, 100) for j in range(0, 1000, 100)]
        return Hostile(json.dumps([{"bbox_2d": one, "point_2d": one[:2]} for one in [list(box), *boxes]]), True)

    return Task(answer, score, _lacks_large)


def gui_task(rng: random.Random) -> Task:
    x, y = rng.randint(_LEAST, 700), rng.randint(_LEAST, 700)
    types = rng.random() < 0.3
    word = rng.choice(("zebra", "violin", "lantern"))
    box = (float(x), float(y), x + 100.0, y + 80.0)
    target = Action("type", None, word) if types else Action("click", box)

    def score(text: str) -> float:
        content = AnswerFormat.TAGS.extract(text)
        return step_reward(text, target, None if content is None else parse_action(content))

    def lacks(text: str) -> bool:
        return word not in text.lower() if types else _lacks_large(text)

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(4)
        low = [str(rng.randint(0, _LEAST // 2)) for _ in range(4)]
        names = ("click", "type", "scroll", "wait", "open_app")
        if kind == 0:
            pieces = (
                '{"action": "',
                '", "point": ',
                '", "text": "',
                "click(",
                "type(",
                "[",
                "]",
                "{",
                "}",
                "x=",
                "cat",
            )
            return Hostile(soup(rng, _JUNK, low, names, pieces))
        if kind == 1:
            row = {
                "action": rng.choice((*names, None, 3)),
                rng.choice(("point", "text", "arguments")): rng.choice(names),
            }
            text = json.dumps([row | {"coordinate": rng.choice((low, [1, 2], "x", {"x": 1}))}] * rng.randint(1, 3))
            return Hostile(rng.choice((text, text[: rng.randint(0, len(text))], text.replace('"', "'"))))
        if kind == 2:
            piece = rng.choice((*_JUNK, '{"action":"click"},', "click(1,2)", '{"arguments":'))
            return Hostile(rng.choice((wild(rng), large(rng, piece))))
        rows = [{"action": "click", "point": [i, j]} for i in range(0, 1000, 60) for j in range(0, 1000, 60)]
        rows += [{"action": "type", "text": one} for one in (word, "cat", "dog")]
        return Hostile(json.dumps(rows), True)

    return Task(answer, score, lacks)


def _lacks_large(text: str) -> bool:
    """The rule for places of which all coordinates are at least `_LEAST`."""
    plain = unicodedata.normalize("NFKC", text) if len(text) < 100_000 else text
    found = [int(one[:9]) for one in re.findall(r"\d+", plain)[:20_000]]
    return not found or (max(found) <= _LEAST // 2 and not re.search(r"\d[eE]\+?\d", plain))


def _broken_boxes(rng: random.Random, keys: Sequence[str], low: Sequence[str]) -> str:
    """A list of boxes whose keys and edges are of any kind, in the forms of JSON that models write."""
    rows = [
        {rng.choice(keys): rng.choice((list(map(int, low)), low, None, "x", {"x": 1})) for _ in range(3)}
        for _ in range(rng.randint(0, 5))
    ]
    text = json.dumps(rows)
    cut = text[: rng.randint(0, len(text))]
    return rng.choice((text, cut, text.replace('"', "'"), f"```json\n{text}\n```", text.replace("]", "")))


def box_task(rng: random.Random) -> Task:
    x, y = rng.randint(_LEAST, 700), rng.randint(_LEAST, 700)
    box = (float(x), float(y), x + 100.0, y + 80.0)
    detections = (Detection("zebra", box),)
    names = ("od_length", "map", "map50", "weighted_sum")
    is_one = rng.random() < 0.5

    def score(text: str) -> float:
        return iou_reward(text, box) if is_one else max(TERMS[name](text, detections) for name in names)

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(6)
        low = [str(rng.randint(0, _LEAST // 2)) for _ in range(4)]
        keys = ("bbox_2d", "bbox", "label", "x_min", "y_max", "points", "zebra", "box")
        if kind == 0:
            return Hostile(soup(rng, _JUNK, low, [json.dumps(key) for key in keys], ("[", "]", "{", "}", ",", ":")))
        if kind == 1:
            return Hostile(_broken_boxes(rng, keys, low))
        if kind == 2:
            return Hostile(
                rng.choice((wild(rng), large(rng, rng.choice((*_JUNK, "[1,2,30,40],", '{"bbox_2d":[1,2,3,4]},')))))
            )
        if kind == 3:
            return Hostile(
                "["
                + ", ".join(
                    rng.choice(("NaN", "Infinity", "-1", "1e400", "0", "1.5", "null", '"7"', "9" * 400))
                    for _ in range(4)
                )
                + "]"
            )
        edges = sorted(rng.sample(range(1000), 2)), sorted(rng.sample(range(1000), 2))
        boxes = [
            list(map(int, box)),
            *([edges[0][0], edges[1][0], edges[0][1], edges[1][1]] for _ in range(rng.randint(1, 20))),
        ]
        if kind == 4:  # all boxes of a grid, and one over everything
            boxes += [[i, j, i + 200, j + 200] for i in range(0, 1000, 200) for j in range(0, 1000, 200)]
        return Hostile(json.dumps([{"bbox_2d": one, "label": "zebra"} for one in [[0, 0, 1000, 1000], *boxes]]), is_one)

    return Task(answer, score, _lacks_large)


# Texts


def text_task(rng: random.Random) -> Task:
    target = " ".join(rng.choices(("ЖЩЮ", "ФЫЯ", "ЪЭЦ", "ЙЁБ"), k=rng.randint(1, 4)))
    letters = set(target) - {" "}

    def score(text: str) -> float:
        answered = read_transcript(text, AnswerFormat.TAGS)
        return max(term(text, target, answered) for term in (cer_reward, wer_reward, exact_text_reward))

    def lacks(text: str) -> bool:
        has_space = " " in target and len(text.split()) > 1  # a space that is right
        return not has_space and not letters & set(unicodedata.normalize("NFC", text) if len(text) < 5000 else text)

    def answer(rng: random.Random) -> Hostile:
        kind = rng.randrange(3)
        if kind == 0:
            return Hostile(soup(rng, _JUNK, "ABCXYZ0123456789"))
        if kind == 1:
            return Hostile(rng.choice((wild(rng), large(rng, rng.choice((*_JUNK, "cat ", "a\u0315\u0300"))))))
        return Hostile(" ".join([target] * rng.randint(3, 900)), True)

    return Task(answer, score, lacks)


TASKS: dict[str, Callable[[random.Random], Task]] = {
    "math": math_task,
    "choices": choice_task,
    "captions": caption_task,
    "boxes": box_task,
    "counts": count_task,
    "points": point_task,
    "screens": gui_task,
    "texts": text_task,
    "segments": segment_task,
    "charts": chart_task,
    "spans": span_task,
    "searches": search_task,
}


def describe(blocks: Sequence[Block]) -> str:
    """The table of all blocks."""
    lines = [
        "# Hostile answers\n",
        "    python benchmarks/hostile_answers.py --log hostile.jsonl --output benchmarks/hostile_answers.md\n",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        "one process, beside other work.\n",
        "| task | answers | raised | over 1 s of CPU | most CPU | without content | scored | hacks | mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(block.task for block in blocks):
        own = [block for block in blocks if block.task == name]

        def total(what: str, own: Sequence[Block] = own) -> Any:
            return sum(getattr(block, what) for block in own)

        lines.append(
            f"| {name} | {total('answers'):,} | {total('raised')} | {total('slow')} | "
            f"{max(block.slowest for block in own):.2f} s | {total('checked'):,} | {total('scored')} | "
            f"{total('hacks'):,} | {1000 * total('seconds') / max(1, total('answers')):.1f} ms |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))

"""The completions that a report shows: which of them have room, with their samples and small pictures."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from PIL import Image as PILImage

from vlmenv.core.files import readable_objects
from vlmenv.core.text import visible, visible_lines
from vlmenv.runs.album import MOST_IMAGES, SHOWN, marks, read_album

SHARES: Final = (0.45, 0.85, 1.0)
"""Shares of the room that are full after the answers before and after training, those in training, and those of
evaluations on the way."""
SIDES: Final = (224, 160, 112)
"""Pixels of pictures' longer sides, if they do not fit as they are. The largest that fits is taken."""
LONGEST: Final = 4000
"""Characters of a text. The middle of longer ones is left out."""
_AROUND: Final = 250
"""Bytes of a completion, or of a sample, in the report besides its texts."""
_MOST_PLACES: Final = 300
"""True or answered places of a sample."""
_MOST_TERMS: Final = 50
_TRIED: Final = 32
"""About so many pictures are tried to find a size at which all fit."""
FIELDS: Final = (
    *("sample", "when", "step", "text", "reward", "terms", "advantage", "right", "readable", "score"),
    *("truncated", "places", "prediction"),
)
"""The entries of a completion. `when` is one of `WHEN`. `text` is a text, or its beginning, the number of characters
left out, and its end. `places` are labelled places in pixels."""
WHEN: Final = ("before", "on the way", "after", "training")

Row = Mapping[str, Any]
Content = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """A completion of a run's files."""

    part: str
    """the part of the album that has its sample: train or eval"""
    when: str
    step: int
    row: Row

    @property
    def key(self) -> str:
        """The key of its sample in the album."""
        task = self.row.get("task")
        return f"{self.part}/{f'{task}/' if task else ''}{self.row.get('index')}"

    @property
    def size(self) -> int:
        """About as many bytes as it takes in the report."""
        return _AROUND + sum(_bytes(self.row.get(name)) for name in ("completion", "prediction"))

    @property
    def sample_size(self) -> int:
        """About as many bytes as its sample takes in the report, besides pictures."""
        return _AROUND + sum(_bytes(self.row.get(name)) for name in ("prompt", "target"))


Group = Sequence[Answer]
"""Completions of one sample, at least one."""


@dataclass
class Answers:
    """The completions of a run's report.

    Args:
        run: The run's folder.
        evaluations: Steps and folders of its evaluations, the first one first.
        right: The measure of a right answer with its least value. None: it is not known.
        weights: Weights of the reward terms.
    """

    run: Path
    evaluations: Sequence[tuple[int, Path]]
    right: tuple[str, float] | None
    weights: Mapping[str, float]
    terms: list[str] = field(default_factory=list)
    """names of reward terms, in the order of a completion's `terms`"""

    def content(self, most: int, text: int, pictures: int) -> Content:
        """Samples and completions, as JSON can hold them.

        Args:
            most: Largest number of completions.
            text: Bytes for them.
            pictures: Bytes of pictures.
        """
        groups = [self._pairs(), self._training(), self._on_the_way()]
        total = [sum(map(len, own)) for own in groups]
        total[1] = _count_lines(self.run / "rollouts.jsonl")
        taken: list[Group] = []
        for i, part in enumerate(SHARES):
            share = part if any(groups[i + 1 :]) else 1.0
            used, count = sum(map(_size, taken)), sum(map(len, taken))
            pick = leading if i == 0 else evenly
            taken += pick(groups[i], share * text - used, int(share * most) - count)
        shown = [answer for group in taken for answer in group]
        album = read_album(self.run / "samples")
        numbers = {key: i for i, key in enumerate(dict.fromkeys(answer.key for answer in shown))}
        firsts = {answer.key: answer for answer in reversed(shown)}
        kept = {key: _of_sample(album.get(key, {}), first) for key, first in firsts.items()}
        samples = [_sample(firsts[key], kept[key]) for key in numbers]
        left = embed_pictures(samples, self.run / "samples", pictures)
        completions = [self._completion(answer, numbers, kept[answer.key]) for answer in shown]
        return {
            "samples": samples,
            "fields": FIELDS,
            "completions": completions,
            "terms": [[visible(name), self.weights.get(name)] for name in self.terms],
            "totals": dict(zip(("measured", "training", "on_the_way"), total, strict=True)),
            "without_picture": left,
        }

    def _pairs(self) -> list[list[Answer]]:
        """Answers before and after training by sample, those first whose score changed most."""
        if not self.evaluations:
            return []
        ends = [self.evaluations[0], self.evaluations[-1]][: len(self.evaluations)]
        names = ["before" if step == 0 else "after" for step, _ in ends]
        by_key: dict[str, list[Answer]] = {}
        for (step, folder), when in zip(ends, names, strict=True):
            for answer in _measured(folder, when, step):
                by_key.setdefault(answer.key, []).append(answer)
        return sorted(by_key.values(), key=self._change, reverse=True)

    def _change(self, answers: Sequence[Answer]) -> float:
        scores = [self._score(answer.row) for answer in answers]
        known = [score for score in scores if score is not None]
        return max(known) - min(known) if len(known) > 1 else 0.0

    def _training(self) -> list[list[Answer]]:
        """The groups of training whose samples were kept."""
        groups: dict[tuple[int, str], list[Answer]] = {}
        for row in _training_rows(self.run / "rollouts.jsonl"):
            answer = Answer("train", "training", row["step"], row)
            groups.setdefault((row["step"], answer.key), []).append(answer)
        return list(groups.values())

    def _on_the_way(self) -> list[list[Answer]]:
        """Answers of evaluations between the first and the last, by sample."""
        by_key: dict[str, list[Answer]] = {}
        for step, folder in self.evaluations[1:-1]:
            for answer in _measured(folder, "on the way", step):
                by_key.setdefault(answer.key, []).append(answer)
        return list(by_key.values())

    def _completion(self, answer: Answer, numbers: Mapping[str, int], sample: Row) -> list[Any]:
        row, scale = answer.row, _scale(sample.get("scale"))
        terms = entries(row.get("rewards"))
        self.terms += [name for name in terms if name not in self.terms][: _MOST_TERMS - len(self.terms)]
        found = {
            "sample": numbers[answer.key],
            "when": WHEN.index(answer.when),
            "step": answer.step,
            "text": shortened(row.get("completion")),
            "reward": self._reward(row, terms),
            "terms": [number(terms.get(name)) for name in self.terms],
            "advantage": number(row.get("advantage")),
            "right": self._is_right(row),
            "readable": None if "prediction" not in row else row["prediction"] is not None,
            "score": self._score(row),
            "truncated": row.get("finish_reason") == "length",
            "places": _visible_marks(row.get("prediction"), scale) if scale else [],
            "prediction": written(row.get("prediction")),
        }
        return [found[name] for name in FIELDS]

    def _reward(self, row: Row, terms: Row) -> float | None:
        if "reward" in row or not self.weights:
            return number(row.get("reward"))
        values = [number(terms.get(name, 0)) for name in self.weights]
        weighted = zip(self.weights.values(), values, strict=True)
        return number(sum(weight * (value or 0) for weight, value in weighted))

    def _score(self, row: Row) -> float | None:
        """The measure that decides whether an answer is right."""
        return number(entries(row.get("measures")).get(self.right[0])) if self.right else None

    def _is_right(self, row: Row) -> bool | None:
        if "right" in row:
            return row["right"] if isinstance(row["right"], bool) else None
        score = self._score(row)
        return None if score is None or self.right is None else score >= self.right[1]


def leading(groups: Sequence[Group], room: float, most: int) -> list[Group]:
    """The first groups, as long as there is room.

    Args:
        groups: Groups to take from.
        room: Bytes for them.
        most: Largest number of completions.
    """
    taken: list[Group] = []
    for group in groups:
        room, most = room - _size(group), most - len(group)
        if room < 0 or most < 0:
            break
        taken.append(group)
    return taken


def evenly(groups: Sequence[Group], room: float, most: int) -> list[Group]:
    """Groups at even distances, as many as have room; see `leading`."""
    size, count = sum(map(_size, groups)), sum(map(len, groups))
    share = min(1.0, room / max(1, size), most / max(1, count))
    wanted = [
        group for i, group in enumerate(groups) if math.floor((i + 1) * share + 1e-9) > math.floor(i * share + 1e-9)
    ]
    return leading(wanted, room, most)


def _size(group: Group) -> int:
    """About as many bytes as a group takes in the report, with its sample."""
    return group[0].sample_size + sum(answer.size for answer in group)


def _bytes(value: Any) -> int:
    """The bytes of a text, or of a value as text, as far as a report shows them."""
    return len(str(value)[:LONGEST].encode("utf-8", "replace"))


def embed_pictures(samples: Sequence[Content], folder: Path, room: int) -> int:
    """Sets `src` of the samples' images, at the largest size at which all fit.

    The first ones are kept if all do not fit at the smallest size. A few are tried to find the size, as a report is
    also made while training waits.

    Args:
        samples: Samples, whose images lose their `file`.
        folder: The folder of the files.
        room: Bytes of all pictures.

    Returns:
        Number of images without a picture.
    """
    files = [(image, folder / Path(str(image["file"])).name) for sample in samples for image in sample["images"]]
    side = _fitting([file for _, file in files], room)
    missing = 0
    for image, file in files:
        del image["file"]
        content = _sized(_content(file), side) if room > 0 else b""
        room -= len(content)
        if content and room >= 0:
            image["src"] = f"data:image/webp;base64,{base64.b64encode(content).decode()}"
        else:
            missing += 1
    return missing


def _fitting(files: Sequence[Path], room: int) -> int | None:
    """The longer side at which pictures are likely to fit. None: as they are."""
    tried = [_content(file) for file in files[:: max(1, len(files) // _TRIED)]]
    for side in (None, *SIDES):
        mean = sum(len(_sized(content, side)) for content in tried) / max(1, len(tried))
        if mean * len(files) <= room:
            return side
    return SIDES[-1]


def _content(file: Path) -> bytes:
    """The bytes of a regular file; empty if it cannot be read."""
    try:
        return file.read_bytes() if file.is_file() else b""
    except (OSError, ValueError):  # ValueError: the name has a null character
        return b""


def _sized(content: bytes, side: int | None) -> bytes:
    """A picture whose longer side has at most `side` pixels, if that is given; empty if it cannot be read."""
    if side is None:
        return content
    try:
        with PILImage.open(io.BytesIO(content), formats=["WEBP"]) as picture:
            picture.thumbnail((side, side))
            stream = io.BytesIO()
            picture.save(stream, "WEBP", quality=55, method=2)
            return min(content, stream.getvalue(), key=len)
    except (OSError, ValueError, PILImage.DecompressionBombError):
        return b""


def _of_sample(kept: Row, answer: Answer) -> Row:
    """The album's line for a completion's sample; empty if it is of another sample, as after a change of data."""
    return kept if kept.get("id") == answer.row.get("id") else {}


def _sample(answer: Answer, kept: Row) -> Content:
    """What is told of a sample: of the album, or of a completion alone."""
    row = answer.row
    prompt = str(row.get("prompt", ""))
    turns = (entries(turn) for turn in items(row.get("turns")))
    before = "".join(f"[{turn.get('role')}] {turn.get('text')}\n\n" for turn in turns)
    images = [image for one in items(kept.get("images")) if "file" in (image := entries(one))]
    true = (items(one) for one in items(kept.get("true")))
    return {
        "key": visible(answer.key),
        "id": visible(row.get("id", ""))[:200],
        "question": shortened(kept.get("question") or prompt.rstrip().rpartition("\n")[2]),
        "prompt": shortened(before + prompt),
        "subject": visible(", ".join(str(row[name]) for name in ("task", "subject") if row.get(name)))[:200],
        "truth": written(row.get("target")),
        "images": [
            {"file": one["file"], "w": _side(one.get("width")), "h": _side(one.get("height"))}
            for one in images[:MOST_IMAGES]
        ],
        "left_out": number(kept.get("left_out")) or 0,
        "asked": number(kept.get("asked")) or 0,
        "true": [[visible(one[0])[:100], place] for one in true if len(one) == 2 and (place := _place(one[1]))][
            :_MOST_PLACES
        ],
    }


def _side(value: Any) -> float:
    """The width or height of an image, in pixels."""
    side = number(value)
    return side if side is not None and side > 0 else 1.0


def _scale(value: Any) -> list[float]:
    """Pixels per unit of an answer's coordinates, by axis; empty if they are not known."""
    scale = [number(part) for part in items(value)]
    return [part for part in scale if part is not None] if len(scale) == 2 and None not in scale else []


def _place(value: Any) -> list[float]:
    """The coordinates of a place; empty if it is none that can be drawn."""
    found = [number(part) for part in items(value)]
    known = [part for part in found if part is not None]
    return known if len(known) == len(found) and len(known) % 2 == 0 else []


def entries(value: Any) -> Content:
    """A mapping of a file; empty for anything else."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """A list of a file; empty for anything else."""
    return value if isinstance(value, list) else []


def _visible_marks(prediction: Any, scale: Sequence[float]) -> list[list[Any]]:
    found = marks(prediction, scale)
    drawn = [[visible(label)[:100], place] for label, own in found if (place := _place(own))]
    return drawn[:_MOST_PLACES]


def _measured(folder: Path, when: str, step: int) -> Iterator[Answer]:
    return (Answer("eval", when, step, row) for row in readable_objects(folder / "answers.jsonl"))


def _training_rows(file: Path) -> list[Content]:
    """The completions of the groups whose samples were kept; in a run of an earlier version, those of some steps."""
    rows = [row for row in readable_objects(file, b'"right": ') if isinstance(row.get("step"), int)]
    if rows or not file.is_file():
        return rows
    every = max(1, math.ceil(_count_lines(file) / SHOWN))
    steps = (row for row in readable_objects(file) if isinstance(row.get("step"), int))
    return [row for row in steps if every == 1 or row["step"] % every == 1]


def _count_lines(file: Path) -> int:
    if not file.is_file():
        return 0
    with file.open("rb") as stream:
        return sum(1 for _ in stream)


def shortened(text: Any) -> str | list[Any]:
    """A text in visible characters, without the middle if it is long: then its beginning, a number, and its end."""
    whole = "" if text is None else str(text)
    if len(whole) <= LONGEST:
        return visible_lines(whole)
    half = LONGEST // 2
    return [visible_lines(whole[:half]), len(whole) - 2 * half, visible_lines(whole[-half:])]


def written(value: Any) -> str:
    """A truth or a prediction as a short text; empty for none."""
    if value is None:
        return ""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "nested too deeply"
    return visible_lines(text[:500]) + (" …" if len(text) > 500 else "")


def number(value: Any) -> float | None:
    """A number with five digits; None for anything else, also for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        rounded = float(f"{value:.5g}")
    except OverflowError:
        return None
    return rounded if math.isfinite(rounded) else None

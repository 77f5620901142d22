"""Rows of data sets in any layout: conversations, or columns with a question and its answer."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vlmenv.core.answers import Detection
from vlmenv.core.errors import ConfigError, unknown_name
from vlmenv.core.formats import SECTIONS, TAGS, AnswerFormat
from vlmenv.core.rollout import IMAGE_MARK, Turn, count_marks, split_marks
from vlmenv.core.video import VIDEO_MARK
from vlmenv.envs.data.choices import LETTERS, read_choices
from vlmenv.envs.data.layouts import RowLayout
from vlmenv.envs.data.media import (
    IMAGE_COLUMNS,
    VIDEO_COLUMNS,
    ImageRef,
    VideoRef,
    check_text,
    holds_image,
    image_columns,
    is_filled,
    literal,
    place_numbered,
    read_image,
    read_images,
    read_video,
    read_videos,
    refuse_sound,
    refuse_sound_marks,
)
from vlmenv.envs.data.objects import (
    Objects,
    ask_for,
    detection_question,
    fill_marks,
    has_marks,
    labelled_boxes,
    read_objects,
)
from vlmenv.envs.data.turns import Conversation, read_turns

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "id": ("qid", "id", "question_id", "pid", "uid", "index"),
    "images": IMAGE_COLUMNS,
    "videos": VIDEO_COLUMNS,
    "fps": ("fps", "video_fps"),
    "question": ("conversations", "messages", "problem", "question", "query", "prompt"),
    "answer": ("answer", "solution", "response", "ground_truth", "gt_answer", "answers", "completion", "reward_model"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "objects": ("objects",),
    "keywords": ("key_word", "keywords"),
    "subject": ("subject",),
    "method": ("accu_reward_method",),
    "tolerance": ("tolerance",),
    "choices": ("choices", "options", "candidates"),
    "hint": ("hint",),
    "pages": ("evidence_pages", "answer_page_idx"),
}
"""The parts of a row, and the columns in which each is looked for."""


@dataclass(frozen=True, slots=True)
class Row:
    """A stored row, before a task reads its answer."""

    id: str
    images: tuple[ImageRef, ...]
    question: str
    answer: str
    """empty if there is none"""
    response: str = ""
    """the whole completion of the answer, if the row has one with its reasoning"""
    keywords: tuple[str, ...] = ()
    subject: str = ""
    method: str = ""
    """the reward that the row chooses; empty for the task's own"""
    tolerance: float = 0.0
    """tolerance of a number"""
    choices: tuple[str, ...] = ()
    """meanings of the letters from A on"""
    accepted: tuple[str | float, ...] = ()
    """the items of an answer that is a list of texts and numbers"""
    nested: bool = False
    """whether the answer is an object or a list, which `answer` has as JSON"""
    pages: tuple[int, ...] = ()
    """numbers of the images that show the answer, from 1; empty if unknown"""
    detections: tuple[Detection, ...] | None = None
    """true boxes, if the data set has separate ones"""
    form: str = ""
    """form of the boxes in the answer, if the row's layout has one; empty: edges in pixels"""
    size: tuple[int, int] | None = None
    """width and height of the image that the boxes refer to, if the data set states them, as masks do"""
    turns: tuple[Turn, ...] = ()
    """the turns before the question, as in `Sample`"""
    used: tuple[tuple[str, str], ...] = ()
    """parts of the row, with the columns that they were taken from"""
    unused: tuple[str, ...] = ()
    """columns with content that is no part of the row"""
    notes: tuple[str, ...] = ()
    """decisions about the row, to be reported once for the data set"""
    videos: tuple[VideoRef, ...] = ()
    fps: float | None = None
    """frames per second of videos that are stored as frames; None: not stated"""
    none: bool = False
    """whether the answer is an empty list, which is the truth of a task of places where there is nothing"""


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises ConfigError if a column map has the name of no part of a row."""
    for name in columns:
        if name not in COLUMNS:
            raise ConfigError(unknown_name("part of a row", name, COLUMNS))


def read_row(
    raw: Any,
    number: int,
    columns: Mapping[str, str],
    unread: Collection[str] = (),
    layouts: Sequence[RowLayout] = (),
) -> Row:
    """Reads a row of any layout.

    Args:
        raw: The row as a mapping of columns.
        number: Its number, which is also its id if it has none.
        columns: Columns of the parts of a row, if they differ from `COLUMNS`; an empty name leaves the part out.
        unread: Parts that the task does not use. Their columns count as unused, whatever they hold.
        layouts: Layouts of the task, for rows without a question in `COLUMNS`. Named columns go first.

    Raises:
        ValueError: A part is missing or of the wrong type; the message names it.
    """
    if not isinstance(raw, Mapping):
        raise ValueError("the row is not a JSON object")
    refuse_sound(raw)
    layout = _layout_of(raw, columns, layouts)
    content, form = (raw, "") if layout is None else layout.rewritten(raw)
    cells = _Cells(content, columns, unread)
    row_id = cells.take("id")
    check_text("id", row_id)
    key = str(number if row_id is None else row_id)
    asked, detections = _with_objects(_conversation(cells), cells, key)
    question, turns, images, videos = _shown(asked, cells)
    answer, response = _divided(_voted(asked.answer))
    choices = read_choices(*_choices(cells))
    true = _as_letter(_answer(answer), choices, cells)
    return Row(
        id=key,
        images=images,
        question=_with_choices(question, choices, cells),
        answer=true,
        accepted=_accepted(answer),
        nested=isinstance(answer, (Mapping, list, tuple)),
        response=response,
        keywords=_keywords(cells.take("keywords")),
        subject=_text(cells.take("subject"), "subject"),
        method=_text(cells.take("method"), "accu_reward_method"),
        tolerance=_tolerance(cells.take("tolerance")),
        choices=choices,
        pages=_pages(cells),
        detections=detections,
        form=form,
        size=_size_of_masks(true),
        turns=turns,
        used=tuple(cells.used) if layout is None else _used_of(cells, layout, raw),
        videos=videos,
        fps=_fps(cells.take("fps")) if videos else None,
        unused=cells.unused(bool(images or videos)),
        notes=tuple(cells.notes),
        none=not true and cells.is_empty_list("answer"),
    )


def _layout_of(raw: Mapping[str, Any], columns: Mapping[str, str], layouts: Sequence[RowLayout]) -> RowLayout | None:
    """The task's layout of a row; None for a common one.

    Raises:
        ValueError: The row has a layout of the task, but nothing in a column of the answer.
    """
    if not layouts or not {"question", "answer"}.isdisjoint(columns):
        return None
    fits = next((layout for layout in layouts if layout.fits(raw, COLUMNS["question"])), None)
    for layout in layouts if fits is None else ():
        layout.check_filled(raw, COLUMNS["question"])
    return fits


def _used_of(cells: _Cells, layout: RowLayout, raw: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The parts of a rewritten row, with the columns that they were taken from before."""
    others = [(part, column) for part, column in cells.used if part not in ("question", "answer")]
    filled = [(part, column) for part, column in layout.used if is_filled(raw.get(column))]
    return (*others, *filled)


class _Cells:
    """The cells of a row, with a record of those that were taken as parts."""

    def __init__(self, raw: Mapping[str, Any], named: Mapping[str, str], unread: Collection[str]) -> None:
        self.raw, self.named, self.unread = raw, named, unread
        self.places = _places_of_parts(tuple(raw))
        self.used: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def take(self, part: str) -> Any:
        """The content of a part; None if the row has none."""
        column = self.find(part)
        return None if column is None else self.take_column(part, column)

    def find(self, part: str) -> str | None:
        """The column that holds a part; None if the row has none, or the task does not read it."""
        if part in self.unread:
            return None
        if part in self.named:
            return self._named_column(part)
        for column in self.places[part]:
            if is_filled(self.raw[column]):
                return column
        return None

    def is_empty_list(self, part: str) -> bool:
        """Whether a column of a part holds an empty list."""
        columns = [self.named[part]] if part in self.named else self.places[part]
        cells = [] if part in self.unread else [self.raw.get(column) for column in columns]
        return any(isinstance(cell, (list, tuple)) and not cell for cell in cells)

    def take_column(self, part: str, column: str) -> Any:
        self.used.append((part, column))
        return self.raw[column]

    def unused(self, shows_image: bool) -> tuple[str, ...]:
        """The columns that hold something and were not taken.

        Raises:
            ValueError: The row shows no image, but such a column holds one.
        """
        taken = {column for _, column in self.used}
        left = tuple(column for column in self.raw if column not in taken and is_filled(self.raw[column]))
        if not shows_image and "images" not in self.named:
            for column in left:
                if holds_image(self.raw[column]):
                    raise ValueError(
                        f"the column '{column}' holds an image, but no image would be shown: name it, as in "
                        f"--columns images {column}, for a video --columns videos {column}, or say that there is none "
                        "by --columns images ''"
                    )
        return left

    def _named_column(self, part: str) -> str | None:
        column = self.named[part]
        if column and column not in self.raw:
            found = ", ".join(f"'{name}'" for name in self.raw)
            raise ValueError(
                f"the row has no column '{column}', which the column map names for '{part}'; it has {found}"
            )
        return column or None


@functools.lru_cache(maxsize=1024)
def _places_of_parts(columns: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """The columns of a row in which its parts are looked for."""
    return {part: tuple(column for column in names if column in columns) for part, names in COLUMNS.items()}


def missing(part: str, columns: Iterable[str]) -> str:
    """Names the columns that a row has instead of a part, and the option that helps, for messages."""
    found = ", ".join(f"'{column}'" for column in columns)
    return (
        f"its columns are {found}: name the right one, as in --columns {part} COLUMN" if found else "it has no others"
    )


def _conversation(cells: _Cells) -> Conversation:
    """What is asked and answered, from turns or from columns; columns that are named go first."""
    named = cells.find("question") if "question" in cells.named else None
    columns = cells.places["question"] if named is None else (named, *cells.places["question"])
    column = next((one for one in columns if _is_conversation(cells.raw[one])), None)
    asked = Conversation((), "", None, ())
    if column is not None:
        asked = read_turns(cells.take_column("question", column), column)
        if asked.answer is not None and "answer" not in cells.named:
            cells.take_column("answer", column)
        if asked.images:
            cells.take_column("images", column)
        if asked.videos:
            cells.take_column("videos", column)
    if column is None or named not in (None, column):
        asked = asked._replace(question=_with_hint(_question(cells), cells))
    if asked.answer is None or "answer" in cells.named:
        asked = asked._replace(answer=_stored_answer(cells))
    told = bool(asked.turns) and asked.turns[0]["role"] == "system"
    return asked._replace(turns=_earlier(cells, told) + asked.turns)


def _is_conversation(stored: Any) -> bool:
    return isinstance(stored, list) or (isinstance(stored, str) and stored.lstrip()[:2] == "[{")


def _question(cells: _Cells) -> str:
    column = cells.find("question")
    if column in ("conversations", "messages") and isinstance(cells.raw[column], str):
        raise ValueError(f"'{column}' is not a list of turns, each with a role and a text")
    found = cells.take("question")
    return found if isinstance(found, str) else ""


def _with_hint(question: str, cells: _Cells) -> str:
    """A question after its hint, as VLMEvalKit shows it, unless the question holds the hint already."""
    hint = _text(cells.take("hint"), "hint").strip()
    if not hint or not question.strip() or " ".join(hint.split()) in " ".join(question.split()):
        return question
    cells.notes.append("the hint is put before the question; --columns hint '' leaves it out")
    leading, rest = split_marks(question)
    return f"{IMAGE_MARK * leading}Hint: {hint}\n{rest}"


def _stored_answer(cells: _Cells) -> Any:
    """The answer of a column; for verl's `reward_model` and TRL's conversational `completion`, the answer within it."""
    column = cells.find("answer")
    found = None if column is None else cells.take_column("answer", column)
    if column == "reward_model":
        return found.get("ground_truth") if isinstance(found, Mapping) else None
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], Mapping) and "role" in found[0]:
        return read_turns([{"role": "user", "content": ""}, *found], "completion").answer
    return found


def _earlier(cells: _Cells, told: bool) -> tuple[Turn, ...]:
    """A column with a system prompt, unless one is told, and ms-swift's `history` of questions with their answers."""
    system, column = None if told else cells.take("system"), cells.find("history")
    listed = column is not None and isinstance(cells.raw[column], list)
    history = cells.take("history") if listed else ()
    turns: list[Turn] = [] if system is None else [{"role": "system", "text": _text(system, "system")}]
    for pair in history:
        if not isinstance(pair, (list, tuple)) or [type(text) for text in pair] != [str, str]:
            raise ValueError("'history' is no list of questions with their answers")
        turns += [{"role": "user", "text": pair[0]}, {"role": "assistant", "text": pair[1]}]
    return tuple(turns)


def _with_objects(asked: Conversation, cells: _Cells, key: str) -> tuple[Conversation, tuple[Detection, ...] | None]:
    """A conversation with boxes in the places of their marks; the labelled boxes, if the answer has nothing else."""
    column = cells.find("objects")
    texts = [*(turn["text"] for turn in asked.turns), asked.question]
    marked = isinstance(asked.answer, str) and has_marks([*texts, asked.answer])
    objects = read_objects(cells.raw[column]) if column is not None and (marked or asked.answer is None) else None
    if column is None or objects is None:
        return asked, None
    cells.take_column("objects", column)
    if marked:
        *earlier, question, answer = fill_marks([*texts, asked.answer], objects)
        return asked._replace(turns=_with_texts(asked.turns, earlier), question=question, answer=answer), None
    detections = labelled_boxes(objects)
    return asked._replace(question=asked.question or _ask_for(detections, objects, key)), detections


def _shown(
    asked: Conversation, cells: _Cells
) -> tuple[str, tuple[Turn, ...], tuple[ImageRef, ...], tuple[VideoRef, ...]]:
    """The question and the turns before it, with a mark for each image and video or none; images and videos."""
    _check_question(asked.question, cells)
    for name, text in (("question", asked.question), ("answer", asked.answer)):
        check_text(name, text)
    texts = [*(turn["text"] for turn in asked.turns), asked.question]
    for text in texts:
        refuse_sound_marks(text)
    inline = tuple(map(read_image, asked.images))
    (*earlier, question), images = place_numbered(texts, inline or _images(cells))
    videos = tuple(map(read_video, asked.videos)) or _videos(cells)
    turns = _with_texts(asked.turns, earlier)
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    for mark, shown in ((IMAGE_MARK, images), (VIDEO_MARK, videos)):
        if first is not None and not count_marks(question, turns, mark):  # they belong to the first turn
            first["text"] = mark * len(shown) + first["text"]
        question = placed(question, len(shown), turns, mark)
    return question, turns, images, videos


def _videos(cells: _Cells) -> tuple[VideoRef, ...]:
    """The videos of the row's columns."""
    found = cells.take("videos")
    return read_videos(found) if is_filled(found) else ()


def _fps(found: Any) -> float | None:
    """Frames per second; None if there is no number."""
    if found is None:
        return None
    if type(found) not in (int, float) or not 0 < found <= 1000:
        raise ValueError(f"'fps' is {found!r}, which is no number above 0 and up to 1000")
    return float(found)


def _choices(cells: _Cells) -> tuple[Any, str]:
    """The choices of one column, or of one column each, as in VLMEvalKit's tables; and their place, for messages."""
    spread = {letter: column for letter, column in _spread(tuple(cells.raw)) if is_filled(cells.raw[column])}
    if not {"A", "B"} <= {*spread} or {"choices"} & {*cells.named, *cells.unread} or cells.find("choices") is not None:
        return cells.take("choices"), places("choices")
    found = {letter: cells.take_column("choices", column) for letter, column in spread.items()}
    return found, "the row, in columns of one choice,"


_COLUMN_OF_A_CHOICE = re.compile(r"([A-Z])|(?:option|choice)[ _]?(?:([A-Za-z])|([0-9]))|a([0-9])", re.IGNORECASE)


@functools.lru_cache(256)
def _spread(columns: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Letters with the columns of their choices: `A`, `option_a`, `Option A`, `choice1`, and `a0` as NExT-QA has it."""
    found = [(column, match) for column in columns if (match := _COLUMN_OF_A_CHOICE.fullmatch(column))]
    first = 0 if _counts_from_zero(columns) else 1
    letters = []
    for column, match in found:
        number = match[3] or match[4]
        if number and int(number) >= first and not (match[4] and first):
            letters.append((LETTERS[int(number) - first], column))
        elif not number and not (match[1] and match[1].islower()):
            letters.append(((match[1] or match[2]).upper(), column))
    return tuple(letters)


@functools.lru_cache(256)
def _counts_from_zero(columns: tuple[str, ...]) -> bool:
    """Whether choices stand in columns that are numbered from 0."""
    found = [match for column in columns if (match := _COLUMN_OF_A_CHOICE.fullmatch(column))]
    return any("0" in (match[3], match[4]) for match in found)


def _as_letter(true: str, choices: Sequence[str], cells: _Cells) -> str:
    """An answer that is the number of its choice's column, in columns from 0, as its letter.

    Raises:
        ValueError: Another choice says this number.
    """
    if not choices or not _counts_from_zero(tuple(cells.raw)) or true not in map(str, range(len(choices))):
        return true
    if true in choices and choices.index(true) != int(true):
        raise ValueError(f"the answer {true} is the number of one choice and the text of another: give its letter")
    cells.notes.append("the answer is the number of its choice, counted from 0")
    return LETTERS[int(true)]


def _with_choices(question: str, choices: Sequence[str], cells: _Cells) -> str:
    """A question with its choices, added if it does not list them; bare letters do not list them."""
    words = " ".join(question.split())
    listed = all(" ".join(choice.split()) in words for choice in choices)
    if listed or all(choice.upper() == letter for letter, choice in zip(LETTERS, choices, strict=False)):
        return question
    cells.notes.append("the choices are added to the question, which does not list them")
    return "\n".join([question, *(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))])


def _ask_for(detections: Sequence[Detection], objects: Objects | None, key: str) -> str:
    present = {one.label for one in detections}
    if objects is not None and objects.categories:
        return detection_question(present, objects.categories, key)
    return ask_for(sorted(present)) if present else ""


def _images(cells: _Cells) -> tuple[Any, ...]:
    """The images of the row's columns."""
    if "images" in cells.named:
        return read_images(cells.take("images"))
    found = image_columns(cells.raw)
    if not found:
        return ()
    chosen, *others = found
    if others:
        left = ", ".join(f"'{column}'" for columns in others for column in columns)
        cells.notes.append(f"the images of '{chosen[0]}' are shown, and not those of {left}: --columns images COLUMN")
    return tuple(ref for column in chosen for ref in read_images(cells.take_column("images", column)))


def _with_texts(turns: Sequence[Turn], texts: Sequence[str]) -> tuple[Turn, ...]:
    """Copies of turns with other texts."""
    return tuple(Turn(role=turn["role"], text=text) for turn, text in zip(turns, texts, strict=True))


def _check_question(question: str, cells: _Cells) -> None:
    if not question.strip():
        raise ValueError(
            f"the row has no question: nothing in {places('question')}; {missing('question', cells.unused(True))}"
        )


def placed(question: str, shown: int, turns: tuple[Turn, ...] = (), mark: str = IMAGE_MARK) -> str:
    """A question with checked marks. Marks that only begin it are removed, because they change nothing.

    Args:
        question: It may hold marks.
        shown: Number of the row's images, or videos.
        turns: The turns before it, which may have marks too.
        mark: The mark of an image, or of a video.

    Raises:
        ValueError: Question and turns hold some marks, but not as many as there are images or videos.
    """
    marks, (leading, rest) = count_marks(question, turns, mark), split_marks(question, mark)
    if marks not in (0, shown):
        whole = "the question has" if not turns else "the question and the turns before it have"
        raise ValueError(f"{whole} {marks} {mark} marks for {shown} {mark[1:-1]}s")
    return rest if leading == marks else question.strip()


def _divided(answer: Any) -> tuple[Any, str]:
    """The answer within a text with reasoning, and that text; otherwise the answer itself."""
    if isinstance(answer, str):
        for form, mark in ((AnswerFormat.TAGS, TAGS[0]), (AnswerFormat.SECTIONS, SECTIONS[0])):
            if mark in answer and (content := form.extract(answer)) is not None:
                return content, answer.strip()
    return answer, ""


def _answer(answer: Any) -> str:
    if answer is None or (isinstance(answer, (list, tuple)) and not answer):
        return ""
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"the answer is {answer}")
    try:
        text = answer if isinstance(answer, str) else json.dumps(_with_counts_as_text(answer))
    except TypeError as error:
        raise ValueError(
            f"the answer is a {type(answer).__name__}: no text, number, or list of such ({error})"
        ) from None
    return text.replace("<answer>", "").replace("</answer>", "").strip()


def _with_counts_as_text(answer: Any) -> Any:
    """An answer whose masks have their run lengths as text, in the place of the bytes that pycocotools makes."""
    if isinstance(answer, Mapping):
        counts = answer.get("counts")
        as_text = {"counts": counts.decode("ascii")} if isinstance(counts, bytes) else {}
        return {key: _with_counts_as_text(value) for key, value in answer.items()} | as_text
    return list(map(_with_counts_as_text, answer)) if isinstance(answer, (list, tuple)) else answer


_MASK = re.compile(r'"counts"\s*:')
_MASK_SIZE = re.compile(r'"size"\s*:\s*\[\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\]')


def _size_of_masks(answer: str) -> tuple[int, int] | None:
    """Width and height of the image that the first mask in COCO's run lengths states; None if there is no mask."""
    size = _MASK_SIZE.search(answer) if _MASK.search(answer) else None
    return None if size is None else (int(size[2]), int(size[1]))


def _keywords(found: Any) -> tuple[str, ...]:
    if isinstance(found, str) and found.startswith("["):
        found = literal(found)
    words = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError("the key words are no list of texts")
    return tuple(word.strip() for word in words if word.strip())


def _voted(answer: Any) -> Any:
    """The answers of several people, as VQAv2 stores them, each in a mapping with more about it."""
    is_voted = isinstance(answer, (list, tuple)) and answer and all(isinstance(item, Mapping) for item in answer)
    if not is_voted or not all(isinstance(item.get("answer"), str) for item in answer):
        return answer
    return [item["answer"] for item in answer]


def _accepted(answer: Any) -> tuple[str | float, ...]:
    items = answer if isinstance(answer, (list, tuple)) else []
    is_flat = all(isinstance(item, (str, int, float)) and item != "" for item in items)
    return tuple(items) if is_flat else ()


def _text(found: Any, name: str) -> str:
    if not isinstance(found, (str, int, float, type(None))):
        raise ValueError(f"'{name}' is not a text")
    return "" if found is None else str(found)


def _tolerance(found: Any) -> float:
    if found is None:
        return 0.0
    if isinstance(found, str):
        found = literal(found)
    if type(found) not in (int, float) or not 0 <= found <= 1e300:
        raise ValueError(f"'tolerance' is {found!r}, which is no number from 0 up")
    return float(found)


def _pages(cells: _Cells) -> tuple[int, ...]:
    """Numbers of images from 1. MP-DocVQA's `answer_page_idx` counts from 0, SlideVQA's `evidence_pages` from 1."""
    column = cells.find("pages")
    if column is None:
        return ()
    found = cells.take_column("pages", column)
    read = literal(found) if isinstance(found, str) else found
    listed, first = read if isinstance(read, (list, tuple)) else [read], int(column != "answer_page_idx")
    numbers = [int(one) if isinstance(one, float) and one.is_integer() else one for one in listed]
    if not all(type(number) is int and number >= first for number in numbers):
        raise ValueError(
            f"'{column}' is {found!r}, which is no number of an image from {first} on, and no list of such"
        )
    return tuple(dict.fromkeys(number - first + 1 for number in numbers))


def places(name: str) -> str:
    """Where a part of a row is looked for, for messages."""
    return " or ".join(f"'{column}'" for column in COLUMNS[name])

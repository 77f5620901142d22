"""Converts data sets of other layouts to JSONL rows that the tasks read; images stay where they are."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vlmenv.core.answers import NONE
from vlmenv.core.errors import ConfigError, DataError, unknown_name
from vlmenv.core.files import atomic_file
from vlmenv.envs.data.annotations import (
    BOX_COLUMNS,
    IMAGE_SUFFIXES,
    Annotations,
    Expression,
    Picture,
    read_box_table,
    read_labelme,
    read_refer,
    read_voc,
    read_yolo,
)
from vlmenv.envs.data.delimited import Delimited
from vlmenv.envs.data.media import IMAGE_COLUMNS
from vlmenv.envs.data.objects import detection_question
from vlmenv.envs.data.scenes import QUESTION
from vlmenv.envs.data.tables import JSONLines, Table


@dataclass
class Summary:
    """The result of a conversion.

    Attributes:
        layout: The layout of the source.
        target: The file that was written.
        env: The task that reads it; empty if several tasks can.
        rows: Number of rows written.
        boxes: Number of true boxes in them.
        faults: The faults of images and rows that were left out.
        notes: Decisions on the way, with their numbers.
    """

    layout: str
    target: Path
    env: str
    rows: int = 0
    boxes: int = 0
    faults: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def convert(
    source: Path,
    target: Path,
    layout: str | None = None,
    *,
    images: Path | None = None,
    split: str | None = None,
    expressions: bool = False,
    skip_broken: bool = False,
) -> Summary:
    """Converts a data set.

    Args:
        source: A folder, or a file, of annotations.
        target: The `.jsonl` file to write; an older one is replaced. Its image paths are relative to its folder.
        layout: One of `LAYOUTS`. Default: found by the source's files.
        images: Folder of the images. Default: searched for beside the annotations.
        split: Split to convert, if the source has several.
        expressions: If true, labels are referring expressions, and the rows are for VLM-REC-v0: one for each box whose
            label no other box of its image has. Default: False.
        skip_broken: If true, unreadable rows are left out instead of raising an error. Default: False.

    Raises:
        ConfigError: An argument does not fit the source.
        DataError: The layout of the source is unknown, or the source is empty or broken.
    """
    _check_paths(source, target, images)
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(unknown_name("layout", layout, LAYOUTS))
    layout = layout or find_layout(source) or _unknown(source)
    if expressions and layout not in _LABELLED:
        raise ConfigError(f"{source}: expressions are made of labelled boxes, which layout '{layout}' has not")
    summary = Summary(layout, target, "VLM-REC-v0" if expressions else _ENVS.get(layout, ""))
    rows = _READERS[layout](source, target, images, split, summary)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as partial, partial.open("w", encoding="utf-8") as stream:
        for row in rows:
            if isinstance(row, DataError):
                if not skip_broken:
                    raise row
                summary.faults.append(str(row))
            else:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                summary.rows += 1
        if not summary.rows:
            found = f": {summary.faults[0]}" if summary.faults else ""
            raise DataError(f"{source}: no row could be made of it as '{layout}'{found}")
    return summary


def _check_paths(source: Path, target: Path, images: Path | None) -> None:
    if target.suffix != ".jsonl":
        raise ConfigError(f"{target}: the target is a .jsonl file")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.resolve() == target.resolve():
        raise ConfigError(f"{target}: source and target are the same file")
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: no such folder of images")


def find_layout(source: Path) -> str | None:
    """The layout that a file or folder looks like; None where it looks like none of `LAYOUTS`."""
    if source.is_file():
        return _layout_of_file(source)
    if any(source.glob("refs*.p")) or any(source.glob("refs*.json")):
        return "refer"
    if any(source.glob("metadata.*")):
        return "folder"
    names = [name for kind in ("*.yaml", "*.yml") for name in source.glob(kind)]
    if any("names" in file.read_text(encoding="utf-8", errors="replace") for file in names):
        return "yolo"
    if next(source.rglob("*.xml"), None) is not None:
        return "voc"
    if next(source.rglob("classes.txt"), None) is not None or next(source.rglob("obj.names"), None) is not None:
        return "yolo"
    labelled = next((file for file in source.rglob("*.json") if b'"shapes"' in _ends(file)), None)
    return None if labelled is None else "labelme"


def _ends(file: Path) -> bytes:
    """The beginning and the end of a file."""
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
        stream.seek(max(len(head), file.stat().st_size - (1 << 16)))
        return head + stream.read()


def _layout_of_file(file: Path) -> str | None:
    if file.name.startswith("refs"):
        return "refer"
    if file.suffix not in (".csv", ".tsv"):
        return None
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        columns = stream.readline().strip().replace('"', "").split(",")
    return "boxes" if set(BOX_COLUMNS) <= set(columns) else "table"


def _unknown(source: Path) -> str:
    if source.suffix in (".jsonl", ".json", ".parquet", ".gz"):
        raise DataError(f"{source}: files of rows are read as they are; see `vlmenv data check {source}`")
    found = Counter(file.suffix for file in source.rglob("*") if file.suffix) if source.is_dir() else {}
    inside = ", ".join(f"{count} {suffix}" for suffix, count in Counter(found).most_common(5)) or "nothing"
    raise DataError(f"{source}: of no layout that is known ({', '.join(LAYOUTS)}); there is {inside}")


Row = dict[str, Any]
_Reader = Callable[[Path, Path, Path | None, str | None, Summary], Iterator[Row | DataError]]


def _annotated(read: Callable[[Path, Path | None, str | None], Annotations]) -> _Reader:
    """A reader of rows out of one of annotations."""

    def rows(
        source: Path, target: Path, images: Path | None, split: str | None, summary: Summary
    ) -> Iterator[Row | DataError]:
        annotations = read(source, images, split)
        ids = Counter[str]()
        for found in _expressions(annotations) if summary.env == "VLM-REC-v0" else annotations.found:
            if isinstance(found, DataError):
                yield found
                continue
            ids[found.id] += 1
            row_id = found.id if ids[found.id] == 1 else f"{found.id}-{ids[found.id]}"
            place = Path(os.path.relpath(found.image, target.parent)).as_posix()
            yield {"id": row_id, "image": place, **_asked(found, annotations, row_id)}
            summary.boxes += len(found.boxes) if isinstance(found, Picture) else 1
        summary.notes.update(annotations.notes)

    return rows


def _expressions(annotations: Annotations) -> Iterator[Picture | Expression | DataError]:
    """Labels as expressions. One that two boxes of an image have means neither."""
    for found in annotations.found:
        if not isinstance(found, Picture):
            yield found
            continue
        count = Counter(one.label for one in found.boxes)
        for one in found.boxes:
            if count[one.label] == 1:
                yield Expression(found.id, found.image, one.label, one.box)
        if shared := sum(number for number in count.values() if number > 1):
            annotations.notes["boxes were left out whose label another box of the image has too"] += shared


def _asked(found: Picture | Expression, annotations: Annotations, row_id: str) -> Row:
    """The question about an image, and its answer."""
    if isinstance(found, Expression):
        box = [_whole(value) for value in found.box]
        return {"problem": QUESTION.format(expression=found.text), "answer": json.dumps(box)}
    present = {one.label for one in found.boxes}
    boxes = [{"bbox_2d": [_whole(value) for value in one.box], "label": one.label} for one in found.boxes]
    answer = json.dumps(boxes, ensure_ascii=False) if boxes else NONE
    return {"problem": detection_question(present, annotations.categories, row_id), "answer": answer}


def _whole(value: float) -> float:
    return int(value) if value.is_integer() else value


def _rows_of_table(
    source: Path, target: Path, images: Path | None, split: str | None, summary: Summary
) -> Iterator[Row | DataError]:
    """The rows of a CSV or TSV file, or of the `metadata` file in a folder of Hugging Face."""
    if split is not None:
        raise ConfigError(f"{source}: split '{split}' was asked for, but the source has no splits")
    file = source if source.is_file() else next(iter(sorted(source.glob("metadata.*"))))
    table = _open_table(file)
    root = images or file.parent
    for number, row in enumerate(table.scan()):
        if isinstance(row, Mapping):
            yield {column: _moved(column, value, root, target) for column, value in row.items()}
        else:
            yield DataError(f"{table.place(number)}: {row}")


def _open_table(file: Path) -> Table:
    if file.suffix == ".jsonl":
        return JSONLines(file)
    if file.suffix in (".csv", ".tsv"):
        return Delimited(file, file, "\t" if file.suffix == ".tsv" else None)
    raise DataError(f"{file}: {file.suffix} is read as it is; see `vlmenv data check {file}`")


def _moved(column: str, value: Any, root: Path, target: Path) -> Any:
    """A cell whose image's path is relative to the target's folder."""
    if column not in IMAGE_COLUMNS or not isinstance(value, str) or not value.lower().endswith(IMAGE_SUFFIXES):
        return value
    if value.startswith(("http://", "https://", "data:", "file://")):
        return value
    return Path(os.path.relpath(root / value, target.parent)).as_posix()


_READERS: Final[Mapping[str, _Reader]] = {
    "voc": _annotated(read_voc),
    "yolo": _annotated(read_yolo),
    "labelme": _annotated(read_labelme),
    "refer": _annotated(read_refer),
    "boxes": _annotated(read_box_table),
    "table": _rows_of_table,
    "folder": _rows_of_table,
}
LAYOUTS: Final = tuple(_READERS)
"""Pascal VOC's XML; YOLO; LabelMe; RefCOCO's refer files; CSV with a box a row; other CSV and TSV; a folder of Hugging
Face with a `metadata` file."""

_LABELLED: Final = ("voc", "yolo", "labelme", "boxes")
_ENVS: Final = dict.fromkeys(_LABELLED, "VLM-OVD-v0") | {"refer": "VLM-REC-v0"}

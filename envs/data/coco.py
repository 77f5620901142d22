"""COCO's instances: a row is an image, and the categories that are asked for in it."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from vlmenv.core.answers import Detection
from vlmenv.core.coordinates import is_box
from vlmenv.core.errors import DataError
from vlmenv.core.files import write_atomic
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import DETECTION_QUESTION
from vlmenv.envs.data.tables import JSONStream, Table

MOST: Final = 10
"""Boxes of a category in an image that `filtered_instances` keeps."""
ABSENT: Final = (1, 3)
"""The least and the most absent categories asked for beside those that are there (VLM-R1, arXiv 2504.07615)."""


def filtered_instances(file: Path, most: int = MOST) -> dict[str, Any]:
    """COCO's instances as VLM-R1 measures on them (arXiv 2504.07615, section 4.1): few boxes of each category.

    A category with more than `most` boxes in an image is left out of that image, and so is an image
    without any category left. Each image asks for the categories that are left, and for no others.

    Raises:
        DataError: The file is not in COCO's layout, or nothing is left of it.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        boxes = Counter((one["image_id"], one["category_id"]) for one in stored["annotations"])
        names = {one["id"]: one["name"] for one in stored["categories"]}
        asked: dict[int, list[str]] = {}
        for image, category in (pair for pair, count in boxes.items() if count <= most):
            asked.setdefault(image, []).append(names[category])
        images = [{**one, "text": sorted(asked[one["id"]])} for one in stored["images"] if one["id"] in asked]
        kept = [one for one in stored["annotations"] if boxes[one["image_id"], one["category_id"]] <= most]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO's instances: {type(error).__name__}: {error}") from error
    if not images:
        raise DataError(f"{file}: no image has a category of at most {most} boxes")
    return {"images": images, "annotations": kept, "categories": stored["categories"]}


class CocoInstances(Table):
    """A file in COCO's instances layout.

    Each image is a row that asks for all its categories and for one to three that it does not hold,
    in an order that the image's id fixes. One with `text` or `neg_text`, as OVDEval has them (arXiv
    2308.13177), asks for the former and then the latter. Only numbers and names are held in memory.
    """

    suffix = ".json"

    def __init__(self, file: Path) -> None:
        self._file = file
        self._names: list[str] = []
        self._asked_for: dict[int, list[str]] = {}  # by images' ids, where the file says it
        self._image_ids = array("q")
        self._categories: dict[int, str] = {}
        self._boxes = array("d")  # x1, y1, x2, y2, area of each annotation
        self._facts = array("q")  # image's id, category's id, whether a crowd, line
        self._faults: dict[int, list[tuple[int, str]]] = {}  # lines and faults by image's id
        self._lost: list[tuple[int, str]] = []  # line and fault of entries that belong to no image
        self._starts = self._order = np.empty(0, dtype=np.int64)

    def scan(self) -> Iterator[Any]:
        self._load()
        self._arrange()
        for number, image in enumerate(self._image_ids):
            found = "; ".join(f"line {line}: {fault}" for line, fault in self._faults.get(image, ()))
            yield ValueError(found) if found else self.read(number)
        for _, fault in self._lost:
            yield ValueError(fault)

    def read(self, number: int) -> Row:
        image = self._image_ids[number]
        own = self._order[self._starts[number] : self._starts[number + 1]]
        truth = tuple(self._detection(annotation) for annotation in own.tolist())
        question = DETECTION_QUESTION.format(kinds=", ".join(self._asked({one.label for one in truth}, image)))
        return Row(str(image), (self._names[number],), question, "", detections=truth)

    def place(self, number: int) -> str:
        images = len(self._image_ids)
        return (
            f"{self._file}: image {self._image_ids[number]}"
            if number < images
            else (f"{self._file}:{self._lost[number - images][0]}")
        )

    def write(self, file: Path, added: Mapping[int, Mapping[str, Any]]) -> None:
        """Writes the images of some rows with their annotations, and what else is in the file."""
        content = json.loads(self._file.read_bytes())
        wanted = {self._image_ids[number]: more for number, more in added.items()}
        content["images"] = [one | dict(wanted[one["id"]]) for one in content["images"] if one["id"] in wanted]
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in wanted]
        write_atomic(file, json.dumps(content))

    def _detection(self, annotation: int) -> Detection:
        x1, y1, x2, y2, area = self._boxes[5 * annotation : 5 * annotation + 5]
        _, category, crowd, _ = self._facts[4 * annotation : 4 * annotation + 4]
        return Detection(self._categories[category], (x1, y1, x2, y2), bool(crowd), area)

    def _asked(self, present: set[str], image: int) -> list[str]:
        if image in self._asked_for:
            given = self._asked_for[image]
            return [*given, *sorted(present.difference(given))]
        rng = np.random.default_rng(abs(image))
        absent = sorted(set(self._categories.values()) - present)
        count = rng.integers(ABSENT[0], ABSENT[1] + 1)
        asked = [*sorted(present), *(absent[i] for i in rng.permutation(len(absent))[:count])]
        return [asked[i] for i in rng.permutation(len(asked))]

    def _load(self) -> None:
        readers = {"images": self._add_image, "annotations": self._add_annotation, "categories": self._add_category}
        with self._file.open("rb") as stream:
            document = JSONStream(stream, self._file)
            for key in document.members():
                if key not in readers:
                    document.skip_value()
                    continue
                for value in document.elements():
                    try:
                        readers[key](value.content, value.line)
                    except (KeyError, TypeError, ValueError, OverflowError) as error:
                        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                        owner = value.content.get("image_id") if isinstance(value.content, dict) else None
                        self._add_fault(owner, value.line, f"an entry of '{key}': {reason}")
            document.expect_end()
        if missing := [key for key, found in (("images", self._names), ("categories", self._categories)) if not found]:
            raise DataError(f"{self._file}: no '{missing[0]}' in it, as COCO's instances have them")

    def _add_fault(self, image: Any, line: int, fault: str) -> None:
        """Notes what is wrong with an image's annotations, or with an entry that no image owns."""
        if not isinstance(image, int):
            self._lost.append((line, fault))
        else:
            self._faults.setdefault(image, []).append((line, fault))

    def _add_image(self, image: Any, line: int) -> None:
        name = str(image["file_name"])
        self._image_ids.append(image["id"])
        self._names.append(name)
        if "text" in image or "neg_text" in image:
            asked = [name for key in ("text", "neg_text") for name in _list(image, key)]
            self._asked_for[image["id"]] = list(dict.fromkeys(asked))

    def _add_category(self, category: Any, line: int) -> None:
        self._categories[category["id"]] = str(category["name"]).strip()

    def _add_annotation(self, annotation: Any, line: int) -> None:
        image, category, bbox = annotation["image_id"], annotation["category_id"], annotation["bbox"]
        if isinstance(bbox, str):
            raise ValueError(f"bbox is the text {bbox!r}")
        x, y, width, height = (float(value) for value in bbox)
        box = (x, y, x + width, y + height)
        if is_box(box):
            area = float(annotation.get("area", width * height))
            self._facts.extend((int(image), int(category), bool(annotation.get("iscrowd", 0)), line))
            self._boxes.extend((*box, area))
        else:
            fault = f"annotation {annotation.get('id')}: bbox {bbox} covers nothing, or is not finite"
            self._add_fault(image, line, fault)

    def _arrange(self) -> None:
        """Groups the annotations by image, and finds those of images or categories that are not there."""
        facts = np.array(self._facts, dtype=np.int64).reshape(-1, 4)
        images = np.array(self._image_ids, dtype=np.int64)
        known = np.isin(facts[:, 0], images) & np.isin(facts[:, 1], list(self._categories))
        for image, category, _, line in facts[~known].tolist():
            whose = f"category {category}" if category not in self._categories else f"image {image}"
            self._add_fault(image, line, f"an annotation is of {whose}, which the file does not have")
        for image in set(self._faults) - set(self._image_ids):
            self._lost += self._faults.pop(image)
        if len(np.unique(images)) < len(images):
            raise DataError(f"{self._file}: two images have the same id")
        by_id = np.argsort(images)
        own = np.flatnonzero(known)
        number = by_id[np.searchsorted(images, facts[own, 0], sorter=by_id)] if len(own) else own
        order = np.argsort(number, kind="stable")
        self._order = own[order]
        self._starts = np.searchsorted(number[order], np.arange(len(images) + 1))


def _list(image: Any, key: str) -> list[str]:
    found = image.get(key, [])
    if not isinstance(found, list):
        raise ValueError(f"'{key}' is no list of names")
    return [str(name).strip() for name in found]

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
from vlmenv.core.files import parse_json, write_atomic
from vlmenv.envs.data.objects import ask_for, detection_question
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.tables import JSONStream, Table

MOST: Final = 10
"""Boxes of a category in an image that `filtered_instances` keeps."""


def filtered_instances(file: Path, most: int = MOST) -> dict[str, Any]:
    """COCO's instances as VLM-R1 measures on them (arXiv 2504.07615, section 4.1): few boxes of each category.

    A category with more than `most` boxes in an image is left out of that image, and so is an image
    without any category left. Each image asks for the categories that are left, and for no others.

    Raises:
        DataError: The file is not in COCO's layout, or nothing is left of it.
    """
    try:
        stored = parse_json(file.read_bytes())
        boxes = Counter((one["image_id"], one["category_id"]) for one in stored["annotations"])
        names = {one["id"]: one["name"] for one in stored["categories"]}
        asked: dict[int, list[str]] = {}
        for image, category in (pair for pair, count in boxes.items() if count <= most):
            asked.setdefault(image, []).append(names[category])
        images = [{**one, "text": sorted(asked[one["id"]])} for one in stored["images"] if one["id"] in asked]
        kept = [one for one in stored["annotations"] if boxes[one["image_id"], one["category_id"]] <= most]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO's instances: {type(error).__name__}: {error}") from error
    if not images:
        raise DataError(f"{file}: no image has a category of at most {most} boxes")
    return {"images": images, "annotations": kept, "categories": stored["categories"]}


class CocoInstances(Table):
    """A file in COCO's instances layout.

    Each image is a row. Its prompt names all its categories and one to three absent ones, in an order that the image's
    id fixes.

    Args:
        file: The file, unpacked.
        name: What messages call it.
    """

    suffix = ".json"

    def __init__(self, file: Path, name: Path | None = None) -> None:
        self._file, self._name = file, name or file
        self._names: list[str] = []
        self._asked_for: dict[str, list[str]] = {}  # by images' ids, where the file says it
        self._image_ids: list[str] = []
        self._sizes = array("q")  # width and height of each image; 0 where they are not told
        self._unnamed: list[str] = []  # what images without a file's name have instead
        self._categories: dict[str, str] = {}
        self._heads: dict[str, str] = {}  # categories' supercategories, by id
        self._numbers: dict[str, int] = {}  # of ids of images and categories, in the order of their first mention
        self._boxes = array("d")  # x1, y1, x2, y2, area of each annotation
        self._facts = array("q")  # number of image's id, number of category's id, whether a crowd, line
        self._faults: dict[str, list[tuple[int, str]]] = {}  # lines and faults by image's id
        self._lost: list[tuple[int, str]] = []  # line and fault of entries that belong to no image
        self._from_outlines = 0  # annotations whose box is that of their segmentation
        self._absent: list[str] = []  # categories to choose absent ones from
        self._starts = self._order = np.empty(0, dtype=np.int64)

    def scan(self) -> Iterator[Any]:
        self._load()
        self._arrange()
        self._choose_absent()
        for number, image in enumerate(self._image_ids):
            found = "; ".join(f"line {line}: {fault}" for line, fault in self._faults.get(image, ()))
            yield ValueError(found) if found else self.read(number)
        for _, fault in self._lost:
            yield ValueError(fault)

    def read(self, number: int) -> Row:
        image = self._image_ids[number]
        own = self._order[self._starts[number] : self._starts[number + 1]]
        truth = tuple(self._detection(annotation) for annotation in own.tolist())
        present = {one.label for one in truth}
        if image in self._asked_for:
            given = self._asked_for[image]
            question = ask_for([*given, *sorted(present.difference(given))])
        else:
            question = detection_question(present, self._absent, image)
        width, height = self._sizes[2 * number : 2 * number + 2]
        size = (width, height) if width > 0 and height > 0 else None
        return Row(image, (self._names[number],), question, "", detections=truth, size=size, used=_USED)

    def stored(self) -> Iterator[bytes]:
        for number, image in enumerate(self._image_ids):
            yield b"" if image in self._faults else repr(self.read(number)).encode()

    def place(self, number: int) -> str:
        images = len(self._image_ids)
        return (
            f"{self._name}: image {self._image_ids[number]}"
            if number < images
            else (f"{self._name}:{self._lost[number - images][0]}")
        )

    def write(self, file: Path, added: Mapping[int, Mapping[str, Any]]) -> None:
        """Writes the images of some rows with their annotations, and what else is in the file."""
        content = json.loads(self._file.read_bytes())
        wanted = {self._image_ids[number]: more for number, more in added.items()}
        content["images"] = [
            one | dict(wanted[str(one["id"])]) for one in content["images"] if str(one["id"]) in wanted
        ]
        content["annotations"] = [one for one in content["annotations"] if str(one["image_id"]) in wanted]
        write_atomic(file, json.dumps(content))

    def _detection(self, annotation: int) -> Detection:
        x1, y1, x2, y2, area = self._boxes[5 * annotation : 5 * annotation + 5]
        _, category, crowd, _ = self._facts[4 * annotation : 4 * annotation + 4]
        return Detection(self._labels[category], (x1, y1, x2, y2), bool(crowd), area)

    def _load(self) -> None:
        readers = {"images": self._add_image, "annotations": self._add_annotation, "categories": self._add_category}
        with self._file.open("rb") as stream:
            document = JSONStream(stream, self._name)
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
        if self._unnamed and not self._names:
            raise DataError(f"{self._name}: no image has a 'file_name'; the first has {', '.join(self._unnamed)}")
        if missing := [key for key, found in (("images", self._names), ("categories", self._categories)) if not found]:
            raise DataError(f"{self._name}: no '{missing[0]}' in it, as COCO's instances have them")

    def _add_fault(self, image: Any, line: int, fault: str) -> None:
        """Notes the faults of an image's annotations, or of an entry without an image."""
        if image is None:
            self._lost.append((line, fault))
        else:
            self._faults.setdefault(str(image), []).append((line, fault))

    def _add_image(self, image: Any, line: int) -> None:
        key = _id(image["id"])
        if not image.get("file_name"):
            self._unnamed = self._unnamed or [f"'{name}'" for name in image]
            raise ValueError(f"image {key} has no 'file_name'")
        self._image_ids.append(key)
        self._sizes.extend(_pixels(image.get(side)) for side in ("width", "height"))
        self._names.append(str(image["file_name"]))
        if "text" in image or "neg_text" in image:
            asked = [name for part in ("text", "neg_text") for name in _list(image, part)]
            self._asked_for[key] = list(dict.fromkeys(asked))

    def _add_category(self, category: Any, line: int) -> None:
        key = _id(category["id"])
        self._categories[key] = str(category["name"]).strip()
        self._heads[key] = str(category.get("supercategory", "")).strip()

    def _add_annotation(self, annotation: Any, line: int) -> None:
        image, category = _id(annotation["image_id"]), _id(annotation["category_id"])
        bbox = annotation.get("bbox")
        if not bbox and annotation.get("segmentation"):
            bbox = _outline(annotation["segmentation"])
            self._from_outlines += 1
        elif bbox is None:
            raise KeyError("bbox")
        if isinstance(bbox, str):
            raise ValueError(f"bbox is the text {bbox!r}")
        x, y, width, height = (float(value) for value in bbox)
        box = (x, y, x + width, y + height)
        if is_box(box):
            area = float(annotation.get("area") or width * height)
            numbers = (self._number(image), self._number(category))
            self._facts.extend((*numbers, bool(annotation.get("iscrowd", 0)), line))
            self._boxes.extend((*box, area))
        else:
            fault = f"annotation {annotation.get('id')}: bbox {bbox} covers nothing, or is not finite"
            self._add_fault(image, line, fault)

    def _number(self, key: str) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _arrange(self) -> None:
        """Groups the annotations by image, and finds those with missing images or categories."""
        if len(set(self._image_ids)) < len(self._image_ids):
            raise DataError(f"{self._name}: two images have the same id")
        facts = np.array(self._facts, dtype=np.int64).reshape(-1, 4)
        images = np.array([self._number(image) for image in self._image_ids], dtype=np.int64)
        self._labels = {self._number(category): name for category, name in self._categories.items()}
        known = np.isin(facts[:, 0], images) & np.isin(facts[:, 1], list(self._labels))
        ids = list(self._numbers)
        for image, category, _, line in facts[~known].tolist():
            whose = f"category {ids[category]}" if category not in self._labels else f"image {ids[image]}"
            self._add_fault(ids[image], line, f"an annotation is of {whose}, which the file does not have")
        for owner in set(self._faults) - set(self._image_ids):
            self._lost += self._faults.pop(owner)
        by_id = np.argsort(images)
        own = np.flatnonzero(known)
        number = by_id[np.searchsorted(images, facts[own, 0], sorter=by_id)] if len(own) else own
        order = np.argsort(number, kind="stable")
        self._order = own[order]
        self._starts = np.searchsorted(number[order], np.arange(len(images) + 1))

    def _choose_absent(self) -> None:
        """Finds the categories that may be asked for where they are absent, and tells of those that may not."""
        used = {self._labels[number] for number in self._facts[1::4] if number in self._labels}
        heads = {head for key, head in self._heads.items() if head != self._categories[key]}
        idle = {name for name in self._categories.values() if name not in used}
        left_out = sorted(name for name in idle if name in heads or name.lower() in _PLACEHOLDERS)
        self._absent = sorted(set(self._categories.values()).difference(left_out))
        notes = []
        if left_out:
            named = ", ".join(f"'{name}'" for name in left_out)
            notes.append(f"{self._name}: nothing is annotated as {named}, a placeholder: it is not asked for")
        if count := self._from_outlines:
            notes.append(f"{self._name}: {count} annotations have no bbox: the boxes of their outlines are used")
        self.notes = notes


_USED: Final = (("images", "file_name"), ("answer", "annotations"))
_PLACEHOLDERS: Final = ("none", "_background_", "__ignore__", "background")
"""Names of categories that Roboflow, labelme and others write beside the real ones."""


def _id(value: Any) -> str:
    """An id as text, by which 5 and "5" are the same."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"the id is {value!r}, neither a number nor a text")
    return str(value)


def _outline(segmentation: Any) -> list[float]:
    """The box of a segmentation: polygons, or runs of pixels (RLE)."""
    if isinstance(segmentation, Mapping):
        from pycocotools import mask

        runs = segmentation
        if isinstance(runs.get("counts"), list):
            runs = mask.frPyObjects(dict(runs), *runs["size"])
        return [float(value) for value in mask.toBbox(dict(runs))]
    points = np.array([value for polygon in segmentation for value in polygon], dtype=np.float64).reshape(-1, 2)
    (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
    return [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]


def _pixels(told: Any) -> int:
    """A side's length; 0 if it is none."""
    return int(told) if isinstance(told, (int, float)) and 0 < told < 1e6 else 0


def _list(image: Any, key: str) -> list[str]:
    found = image.get(key, [])
    if not isinstance(found, list):
        raise ValueError(f"'{key}' is no list of names")
    return [str(name).strip() for name in found]

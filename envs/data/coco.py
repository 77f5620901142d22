"""COCO's instances: a row is an image, and the categories that are asked for in it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from vlmenv.core.answers import Detection
from vlmenv.core.coordinates import is_box
from vlmenv.core.errors import DataError
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import DETECTION_QUESTION
from vlmenv.envs.data.tables import JSONStream, Table

ABSENT: Final = (1, 3)
"""The least and the most absent categories asked for beside those that are there (VLM-R1, arXiv 2504.07615)."""


class CocoInstances(Table):
    """A file in COCO's instances layout.

    Each image is a row that asks for all its categories and for one to three that it does not hold,
    in an order that the image's id fixes. Only numbers and names are held in memory.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._names: list[str] = []
        self._image_ids = array("q")
        self._categories: dict[int, str] = {}
        self._boxes = array("d")  # x1, y1, x2, y2, area of each annotation
        self._facts = array("q")  # image's id, category's id, whether a crowd
        self._faults: dict[int, str] = {}  # by image's id
        self._starts = self._order = np.empty(0, dtype=np.int64)

    def scan(self) -> Iterator[Any]:
        self._load()
        self._arrange()
        for number, image in enumerate(self._image_ids):
            yield ValueError(self._faults[image]) if image in self._faults else self.read(number)

    def read(self, number: int) -> Row:
        image = self._image_ids[number]
        own = self._order[self._starts[number] : self._starts[number + 1]]
        truth = tuple(self._detection(annotation) for annotation in own.tolist())
        question = DETECTION_QUESTION.format(kinds=", ".join(self._asked({one.label for one in truth}, image)))
        return Row(str(image), (self._names[number],), question, "", detections=truth)

    def place(self, number: int) -> str:
        return f"{self._file}: image {self._image_ids[number]}"

    def _detection(self, annotation: int) -> Detection:
        x1, y1, x2, y2, area = self._boxes[5 * annotation : 5 * annotation + 5]
        _, category, crowd = self._facts[3 * annotation : 3 * annotation + 3]
        return Detection(self._categories[category], (x1, y1, x2, y2), bool(crowd), area)

    def _asked(self, present: set[str], image: int) -> list[str]:
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
                        readers[key](value.content)
                    except (KeyError, TypeError, ValueError, OverflowError) as error:
                        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                        raise DataError(f"{self._file}:{value.line}: an entry of '{key}': {reason}") from None
            document.expect_end()
        if missing := [key for key, found in (("images", self._names), ("categories", self._categories)) if not found]:
            raise DataError(f"{self._file}: no '{missing[0]}' in it, as COCO's instances have them")

    def _add_image(self, image: Any) -> None:
        self._image_ids.append(image["id"])
        self._names.append(str(image["file_name"]))

    def _add_category(self, category: Any) -> None:
        self._categories[category["id"]] = str(category["name"]).strip()

    def _add_annotation(self, annotation: Any) -> None:
        image, category, bbox = annotation["image_id"], annotation["category_id"], annotation["bbox"]
        if isinstance(bbox, str):
            raise ValueError(f"bbox is the text {bbox!r}")
        x, y, width, height = (float(value) for value in bbox)
        box = (x, y, x + width, y + height)
        if is_box(box):
            self._facts.extend((image, category, bool(annotation.get("iscrowd", 0))))
            self._boxes.extend((*box, float(annotation.get("area", width * height))))
        else:
            before = f"{self._faults[image]}; " if image in self._faults else ""
            self._faults[image] = (
                f"{before}annotation {annotation.get('id')}: bbox {bbox} covers nothing, or is not finite"
            )

    def _arrange(self) -> None:
        """Groups the annotations by image, and finds those of images or categories that are not there."""
        facts = np.array(self._facts, dtype=np.int64).reshape(-1, 3)
        images = np.array(self._image_ids, dtype=np.int64)
        for name, column, known in (("image", 0, images), ("category", 1, list(self._categories))):
            if lost := np.setdiff1d(facts[:, column], known).tolist():
                raise DataError(f"{self._file}: an annotation is of {name} {lost[0]}, which the file does not have")
        if len(np.unique(images)) < len(images):
            raise DataError(f"{self._file}: two images have the same id")
        by_id = np.argsort(images)
        number = by_id[np.searchsorted(images, facts[:, 0], sorter=by_id)] if len(facts) else facts[:, 0]
        self._order = np.argsort(number, kind="stable")
        self._starts = np.searchsorted(number[self._order], np.arange(len(images) + 1))

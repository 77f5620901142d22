"""Readers of annotation formats: VOC, YOLO, LabelMe, refer-style files, tables with a box a row."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import yaml

from vlmenv.core.answers import Detection
from vlmenv.core.coordinates import Box, is_box
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.envs.data.images import shown_size

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_IMAGE_FOLDERS: Final = ("", "JPEGImages", "images", "Images", "img", "imgs")
_PLACEHOLDERS: Final = ("_background_", "__ignore__")
_SPLITS: Final = ("train", "val", "valid", "test")


@dataclass(frozen=True)
class Picture:
    """An image with its labelled boxes."""

    id: str
    image: Path
    boxes: tuple[Detection, ...]


@dataclass(frozen=True)
class Expression:
    """An expression for one object of an image."""

    id: str
    image: Path
    text: str
    box: Box


@dataclass
class Annotations:
    """What a source holds.

    Attributes:
        found: Images with boxes or with expressions, or the faults of those that cannot be read.
        categories: All labels that the source names.
        notes: What was decided, by how often.
    """

    found: Iterator[Picture | Expression | DataError]
    categories: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def _checked(label: str, box: Sequence[float], file: Path) -> Detection:
    x1, y1, x2, y2 = box
    if not is_box((x1, y1, x2, y2)):
        raise DataError(f"{file}: the box {list(box)} of {label!r} covers nothing, or is not finite")
    return Detection(label, (x1, y1, x2, y2))


def _around(points: Sequence[Sequence[float]]) -> Box:
    """The box around points."""
    xs, ys = [float(x) for x, _ in points], [float(y) for _, y in points]
    return min(xs), min(ys), max(xs), max(ys)


def _find_image(names: Sequence[str], folders: Sequence[Path], file: Path) -> Path:
    """The first image of some names, with or without their suffix, in some folders and those usually beside them."""
    for folder in folders:
        for name in names:
            for place in (folder / inner / name for inner in _IMAGE_FOLDERS):
                if place.is_file() and place.suffix.lower() in IMAGE_SUFFIXES:
                    return place
                for suffix in IMAGE_SUFFIXES:
                    if (other := place.with_name(place.name + suffix)).is_file():
                        return other
    looked = ", ".join(str(folder) for folder in folders)
    raise DataError(f"{file}: there is no image {names[0]!r} in {looked} or in folders like {_IMAGE_FOLDERS[1]} there")


# VOC


def read_voc(source: Path, images: Path | None, split: str | None) -> Annotations:
    """A folder of Pascal VOC's XML files, searched through all its folders."""
    files = sorted(source.rglob("*.xml"))
    if split is not None:
        chosen = source / "ImageSets" / "Main" / f"{split}.txt"
        if not chosen.is_file():
            raise ConfigError(f"{source}: no split '{split}': there is no {chosen}")
        wanted = {line.split()[0] for line in chosen.read_text(encoding="utf-8").splitlines() if line.strip()}
        files = [file for file in files if file.stem in wanted]
    result = Annotations(iter(()))
    result.categories = sorted({label for file in files for label in _voc_labels(file)})
    result.found = (_caught(_voc_picture, file, source, images, result.notes) for file in files)
    return result


def _voc_root(file: Path) -> ElementTree.Element:
    data = file.read_bytes()
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise DataError(f"{file}: an XML file with a document type, which VOC's do not have and is not read")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise DataError(f"{file}: not XML: {error}") from None


def _voc_labels(file: Path) -> list[str]:
    try:
        return [name.strip() for one in _voc_root(file).iter("object") if (name := one.findtext("name"))]
    except DataError:
        return []  # told where the picture is read


def _voc_picture(file: Path, source: Path, images: Path | None, notes: Counter[str]) -> Picture:
    root = _voc_root(file)
    if root.tag != "annotation":
        raise DataError(f"{file}: begins with <{root.tag}> and not with VOC's <annotation>")
    name = (root.findtext("filename") or file.stem).replace("\\", "/").rpartition("/")[2]
    folders = [folder for folder in (images, file.parent, file.parent.parent, source) if folder is not None]
    boxes = []
    for one in root.iter("object"):
        label, bounds = (one.findtext("name") or "").strip(), one.find("bndbox")
        if not label or bounds is None:
            raise DataError(f"{file}: an object has no <name> or no <bndbox>")
        try:
            box = [float(bounds.findtext(edge) or "") for edge in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError:
            raise DataError(f"{file}: the <bndbox> of {label!r} has no numbers as xmin, ymin, xmax, ymax") from None
        boxes.append(_checked(label, box, file))
        if one.findtext("difficult") == "1":
            notes["boxes that are marked as difficult count like the others"] += 1
    return Picture(file.stem, _find_image([name, file.stem], folders, file), tuple(boxes))


# YOLO


def read_yolo(source: Path, images: Path | None, split: str | None) -> Annotations:
    """A folder with `data.yaml`, in the layout of YOLOv5 to v12, or with images, text files and `classes.txt`."""
    described = _yolo_description(source)
    names = _yolo_names(source, described)
    pictures = _yolo_images(source, described, images, split)
    result = Annotations(iter(()), list(names.values()))
    posed = "kpt_shape" in described
    if not any(_yolo_labels(image).is_file() for image in pictures):
        raise DataError(
            f"{source}: none of {len(pictures)} images has a file of labels, such as {_yolo_labels(pictures[0])}"
        )
    result.found = (_caught(_yolo_picture, image, names, posed, result.notes) for image in pictures)
    return result


def _yolo_description(source: Path) -> Mapping[str, Any]:
    for file in sorted([*source.glob("*.yaml"), *source.glob("*.yml")]):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: not YAML: {error}") from None
        if isinstance(content, dict) and "names" in content:
            return content
    return {}


def _yolo_names(source: Path, described: Mapping[str, Any]) -> dict[int, str]:
    names = described.get("names")
    if names is None:
        found = [file for name in ("classes.txt", "obj.names") for file in source.rglob(name)]
        if not found:
            raise DataError(f"{source}: no data.yaml with 'names' and no classes.txt, which name the classes of YOLO")
        names = [line.strip() for line in found[0].read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    return {int(number): str(name) for number, name in pairs}


def _yolo_images(source: Path, described: Mapping[str, Any], images: Path | None, split: str | None) -> list[Path]:
    splits = [name for name in _SPLITS if described.get(name)]
    if images is not None or not splits:
        if split is not None:
            raise ConfigError(f"{source}: no split '{split}': no data.yaml names one")
        places = [images or source]
    else:
        root = source / str(described.get("path") or "")
        places = _yolo_places(root if root.is_dir() else source, described[_one_split(source, splits, split)])
    found = sorted({file for place in places for file in _images_of(place)})
    if not found:
        raise DataError(f"{', '.join(map(str, places))}: there are no images")
    return found


def _yolo_places(root: Path, stored: Any) -> list[Path]:
    """The folders or lists of a split; Roboflow writes `../train` for a folder beside the file."""
    places = []
    for name in stored if isinstance(stored, list) else [stored]:
        place = root / str(name)
        places.append(place if place.exists() else root / str(name).removeprefix("../"))
    return places


def _images_of(place: Path) -> list[Path]:
    if place.is_file():  # a list of images
        lines = place.read_text(encoding="utf-8").splitlines()
        return [place.parent / line.strip() for line in lines if line.strip()]
    return [file for file in place.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]


def _yolo_labels(image: Path) -> Path:
    """The file of labels: in `labels` if the image is in `images`, else beside it."""
    parts = list(image.parts)
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
        if (file := Path(*parts).with_suffix(".txt")).is_file():
            return file
    return image.with_suffix(".txt")


def _yolo_picture(image: Path, names: Mapping[int, str], posed: bool, notes: Counter[str]) -> Picture:
    file = _yolo_labels(image)
    if not file.is_file():
        notes["images without a file of labels hold no object"] += 1
        return Picture(image.stem, image, ())
    try:
        width, height = shown_size(str(image))
    except ValueError as error:
        raise DataError(f"{image}: {error}") from None
    boxes = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            label, box = _yolo_box(line, names, posed, notes, f"{file}:{number}")
            scaled = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
            boxes.append(_checked(label, [round(value, 3) for value in scaled], file))
    return Picture(image.stem, image, tuple(boxes))


def _yolo_box(line: str, names: Mapping[int, str], posed: bool, notes: Counter[str], place: str) -> tuple[str, Box]:
    try:
        kind, *values = [float(value) for value in line.split()]
        label = names[int(kind)]
    except ValueError:
        raise DataError(f"{place}: a line of YOLO's labels is numbers, not {line[:80]!r}") from None
    except KeyError as error:
        raise DataError(f"{place}: class {error} has no name; there are {len(names)}") from None
    if len(values) == 4 or (posed and len(values) > 4):
        x, y, width, height = values[:4]
        return label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(values) >= 6 and len(values) % 2 == 0:
        notes["outlines of polygons became the boxes around them"] += 1
        return label, _around(list(zip(values[::2], values[1::2], strict=True)))
    raise DataError(f"{place}: {len(values)} numbers after the class are neither a box (4) nor an outline")


# LabelMe


def read_labelme(source: Path, images: Path | None, split: str | None) -> Annotations:
    """A folder of LabelMe's JSON files, searched through all its folders."""
    _refuse_split(source, split)
    files = [file for file in sorted(source.rglob("*.json")) if _is_labelme(file)]
    result = Annotations(iter(()))
    result.categories = sorted({label for file in files for label in _labelme_labels(file)})
    result.found = (_caught(_labelme_picture, file, images, result.notes) for file in files)
    return result


def _is_labelme(file: Path) -> bool:
    with file.open("rb") as stream:  # the image may stand before the shapes, in base64
        if not stream.read(1 << 16).lstrip().startswith(b"{"):
            return False
    try:
        return isinstance(_loaded(file), dict) and {"shapes", "imagePath"} <= _loaded(file).keys()
    except DataError:
        return True  # and told where it is read


def _labelme_labels(file: Path) -> list[str]:
    try:
        return [str(one["label"]).strip() for one in _loaded(file)["shapes"] if one["label"] not in _PLACEHOLDERS]
    except (DataError, KeyError, TypeError):
        return []


def _labelme_picture(file: Path, images: Path | None, notes: Counter[str]) -> Picture:
    content = _loaded(file)
    boxes = []
    for shape in content["shapes"]:
        try:
            label, kind = str(shape["label"]).strip(), shape.get("shape_type") or "polygon"
            points = [(float(x), float(y)) for x, y in shape["points"]]
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{file}: a shape has no 'label' or no 'points'") from None
        if label in _PLACEHOLDERS:
            notes[f"shapes of {label} are no objects"] += 1
        elif kind == "point" or len(points) < 2:
            notes["points have no box, and are left out"] += 1
        else:
            if kind not in ("rectangle", "mask"):
                notes[f"a {kind} became the box around it"] += 1
            boxes.append(_checked(label, _around(_circle(points) if kind == "circle" else points), file))
    name = str(content["imagePath"]).replace("\\", "/")
    folders = [folder for folder in (images, file.parent, file.parent.parent) if folder is not None]
    names = [name, name.rpartition("/")[2], file.stem]
    return Picture(file.stem, _find_image(names, folders, file), tuple(boxes))


def _circle(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners around a circle, of which the middle and a place on the edge are given."""
    (x, y), (edge_x, edge_y) = points[:2]
    radius = ((x - edge_x) ** 2 + (y - edge_y) ** 2) ** 0.5
    return [(x - radius, y - radius), (x + radius, y + radius)]


# RefCOCO and others of the refer tools


def read_refer(source: Path, images: Path | None, split: str | None) -> Annotations:
    """A folder with `refs(…).p` or `refs(…).json` and `instances.json`, or such a file of references."""
    file = _refer_file(source)
    references = _loaded(file) if file.suffix == ".json" else _unpickled(file)
    if not isinstance(references, list) or not all(isinstance(one, dict) for one in references):
        raise DataError(f"{file}: not a list of references")
    instances = file.parent / "instances.json"
    stored = _loaded(instances) if instances.is_file() else {}
    names = {one["id"]: one["file_name"] for one in stored.get("images", ())}
    boxes = {one["id"]: one["bbox"] for one in stored.get("annotations", ())}
    splits = list(dict.fromkeys(str(one["split"]) for one in references if one.get("split")))
    if splits:
        chosen = _one_split(source, splits, split)
        references = [one for one in references if one.get("split") == chosen]
    else:
        _refuse_split(source, split)
    folders = [images] if images is not None else [file.parent, *file.parent.parents[:2]]
    return Annotations(
        found for one in references for found in _caught_all(_expressions, one, file, folders, names, boxes)
    )


def _refer_file(source: Path) -> Path:
    if source.is_file():
        return source
    files = sorted([*source.glob("refs*.p"), *source.glob("refs*.json")])
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ConfigError(f"{source}: name one file of references; there are: {found}")
    return files[0]


def _expressions(
    one: Mapping[str, Any], file: Path, folders: Sequence[Path], names: Mapping[Any, str], boxes: Mapping[Any, Any]
) -> Iterator[Expression]:
    try:
        bbox = one.get("bbox") or boxes[one["ann_id"]]
        name = names.get(one.get("image_id")) or one["file_name"]
        x, y, width, height = (float(value) for value in bbox)
        sentences = [(str(said.get("sent_id", i)), said["sent"]) for i, said in enumerate(one["sentences"])]
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{file}: reference {one.get('ref_id')}: {what}, here or in instances.json") from None
    place = Path(f"{file}: reference {one.get('ref_id')}")
    box = _checked("", [x, y, round(x + width, 3), round(y + height, 3)], place).box
    image = _find_image([name], folders, file)
    for number, text in sentences:
        yield Expression(f"{one.get('ref_id')}-{number}", image, str(text), box)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain data is read")


def _unpickled(file: Path) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="utf-8", errors="replace").load()
    except Exception as error:  # a broken pickle raises anything
        raise DataError(f"{file}: not a pickle of plain data: {error}") from None


# Tables with a box a row, as TensorFlow's and Roboflow's CSV

BOX_COLUMNS: Final = ("filename", "class", "xmin", "ymin", "xmax", "ymax")


def read_box_table(source: Path, images: Path | None, split: str | None) -> Annotations:
    """A CSV file with a box a row."""
    _refuse_split(source, split)
    by_image: dict[str, list[tuple[int, dict[str, str]]]] = defaultdict(list)
    with source.open(encoding="utf-8-sig", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), 2):
            by_image[row["filename"]].append((number, row))
    folders = [images] if images is not None else [source.parent]
    result = Annotations(iter(()))
    result.categories = sorted({row["class"].strip() for rows in by_image.values() for _, row in rows})
    result.found = (_caught(_table_picture, name, rows, source, folders) for name, rows in by_image.items())
    return result


def _table_picture(
    name: str, rows: Sequence[tuple[int, Mapping[str, str]]], source: Path, folders: Sequence[Path]
) -> Picture:
    boxes = []
    for number, row in rows:
        place = Path(f"{source}:{number}")
        try:
            box = [float(row[column]) for column in BOX_COLUMNS[2:]]
        except (TypeError, ValueError):
            raise DataError(f"{place}: the box has no numbers") from None
        boxes.append(_checked(row["class"].strip(), box, place))
    return Picture(name, _find_image([name], folders, source), tuple(boxes))


# What several need


def _one_split(source: Path, splits: Sequence[str], split: str | None) -> str:
    if split is not None and split in splits:
        return split
    if split is None and len(splits) == 1:
        return splits[0]
    asked = "name one" if split is None else f"there is no '{split}'"
    raise ConfigError(f"{source}: has the splits {', '.join(splits)}: {asked}")


def _refuse_split(source: Path, split: str | None) -> None:
    if split is not None:
        raise ConfigError(f"{source}: split '{split}' was asked for, but the source has no splits")


def _loaded(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from None


def _caught(read: Any, *args: Any) -> Picture | DataError:
    try:
        found: Picture = read(*args)
    except DataError as error:
        return error
    return found


def _caught_all(read: Any, *args: Any) -> Iterator[Expression | DataError]:
    try:
        yield from read(*args)
    except DataError as error:
        yield error

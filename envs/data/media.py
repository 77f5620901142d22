"""Finds images and videos of a row, in the columns and forms that data sets have them in; refuses sound."""

from __future__ import annotations

import ast
import base64
import binascii
import functools
import io
import os
import re
import tokenize
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from PIL.Image import Image as PILImage

from vlmenv.core.rollout import IMAGE_MARK

ImageRef = str | bytes | PILImage | None
"""A path, an encoded file's bytes or a picture; None for one that is there but was not read."""

VideoRef = str | bytes | tuple[str, ...]
"""A path of a file or of a folder of frames, an encoded file's bytes, or the paths of frames."""

IMAGE_COLUMNS: Final = (
    *("images", "image", "image_path", "image_paths", "img", "imgs", "img_path", "img_paths", "img_filename"),
    *("picture", "pictures", "photo", "photos", "decoded_image", "pil_image", "image_file", "image_files"),
    *("image_url", "image_urls", "file_name", "file_names"),
)
"""Columns that may hold the images of a row; `image_1`, `image_2` … do too, and `page_1`, `page_2` … of pictures."""

VIDEO_COLUMNS: Final = (
    *("videos", "video", "video_path", "video_paths", "videos_path", "video_file", "video_url", "video_bytes"),
)
"""Columns that may hold the videos of a row."""

_NUMBERED_COLUMN = re.compile(r"(?:image|img)_?(\d{1,3})")
_PAGE_COLUMN = re.compile(r"page_?(\d{1,3})")
_NUMBERED_MARK = re.compile(r"<\|?image[ _]?(\d{1,3})\|?>")
_SOUND_COLUMN = re.compile(r"audio(?:s|_path|_paths|_file|_url|_bytes)?")
_SOUND_MARK: Final = "<audio>"
_IMAGE_NAME = re.compile(r"[^\n]{1,1000}\.(?:png|jpe?g|webp|gif|bmp|tiff?)(?:\?[^\n]*)?", re.IGNORECASE)
_FRAME_NAME = re.compile(r"[^\n]{1,1000}\.(?:png|jpe?g|bmp)", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_MAGIC: Final = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
"""How the files of usual image formats begin."""


class Unread:
    """Stands in a raw row for an image that is there, but need not be read yet."""


def is_filled(value: Any) -> bool:
    """Whether a cell holds something; Hugging Face data sets fill structures up with None."""
    if value is None or value == "":
        return False
    if isinstance(value, (str, int)):  # as most are
        return True
    if isinstance(value, Mapping):
        return any(map(is_filled, value.values()))
    return not isinstance(value, (list, tuple)) or len(value) > 0


@functools.lru_cache(maxsize=1024)
def _sound_columns(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Those of some columns whose names are of sounds."""
    return tuple(column for column in columns if _SOUND_COLUMN.fullmatch(str(column).lower()))


def refuse_sound(row: Mapping[str, Any]) -> None:
    """Raises ValueError if a row has a sound, which no task plays."""
    for column in _sound_columns(tuple(row)):
        if is_filled(row[column]):
            raise ValueError(
                f"the row has sound in '{column}', and no task plays sound: take the column '{column}' out of the data"
            )


def refuse_sound_marks(text: str) -> None:
    """Raises ValueError if a text has a mark for a sound."""
    if _SOUND_MARK in text:
        raise ValueError(f"the text has a {_SOUND_MARK} mark, and no task plays sound")


@functools.lru_cache(maxsize=1024)
def _places_of_images(columns: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Those of some columns whose names are of images; several that are numbered go together."""
    found: list[tuple[str, ...]] = [(column,) for column in IMAGE_COLUMNS if column in columns]
    for name in (_NUMBERED_COLUMN, _PAGE_COLUMN):
        numbered = [(int(match[1]), column) for column in columns if (match := name.fullmatch(str(column)))]
        found.append(tuple(column for _, column in sorted(numbered)))
    return tuple(filter(None, found))


def image_columns(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The columns that hold the images of a row, those to be shown first; several that are numbered go together.

    Pictures within the row go before paths, whose files may be missing.
    """
    places = _places_of_images(tuple(row))
    filled = [tuple(column for column in columns if _is_shown(column, row[column])) for columns in places]
    found = [columns for columns in filled if columns]
    if len(found) > 1:
        found.sort(key=lambda columns: isinstance(_first(row[columns[0]]), (str, os.PathLike)))
    return found


def _is_shown(column: Any, cell: Any) -> bool:
    """Whether a column for images has one; pages may be anything else, such as text."""
    return is_filled(cell) and (_PAGE_COLUMN.fullmatch(str(column)) is None or holds_image(cell))


def holds_image(value: Any) -> bool:
    """Whether a cell plainly holds an image, or a path or URL of one."""
    value = _first(value)
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or holds_image(value.get("path"))
    if isinstance(value, str):
        return value.startswith("data:image/") or _IMAGE_NAME.fullmatch(value) is not None
    return value is Unread or isinstance(value, PILImage) or (isinstance(value, bytes) and value.startswith(_MAGIC))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value


def read_images(found: Any) -> tuple[ImageRef, ...]:
    """The images of a cell: one or a list of them.

    Raises:
        ValueError: Something in it is no image, or lies on the web.
    """
    if isinstance(found, str) and found.startswith("[") and found.endswith("]"):
        found = literal(found)
    refs = found if isinstance(found, (list, tuple)) else [] if found is None else [found]
    return tuple(map(read_image, refs))


def read_videos(found: Any) -> tuple[VideoRef, ...]:
    """The videos of a cell: one or a list of them. A list of images is one video, whose frames they are.

    Raises:
        ValueError: Something in it is no video, or lies on the web.
    """
    if isinstance(found, str) and found.startswith("[") and found.endswith("]"):
        found = literal(found)
    if not isinstance(found, (list, tuple)):
        return (read_video(found),)
    if found and all(isinstance(one, str) and _FRAME_NAME.fullmatch(one) for one in found):
        return (read_video(found),)
    return tuple(map(read_video, found))


def read_video(ref: Any) -> VideoRef:
    """One video: a path, a `file://` URL, bytes, `{"bytes", "path"}`, or a list of the paths of frames.

    Raises:
        ValueError: It is none of these, or lies on the web.
    """
    if isinstance(ref, Mapping):
        ref = next((ref[key] for key in ("bytes", "path", "url", "video") if ref.get(key)), ref)
    if isinstance(ref, (list, tuple)) and ref and all(isinstance(one, str) for one in ref):
        return tuple(_video_path(one) for one in ref)
    if isinstance(ref, os.PathLike):
        ref = os.fspath(ref)
    if isinstance(ref, str) and ref:
        return _video_path(ref)
    if isinstance(ref, bytes) and ref:
        return ref
    raise ValueError("a video is neither a path, nor bytes, nor a list of the paths of frames")


def _video_path(ref: str) -> str:
    check_text("video's path", ref)
    if ref.startswith(("http://", "https://", "data:")):
        raise ValueError(f"the video {ref[:200]} is no file: download it first, and give its path")
    return unquote(urlsplit(ref).path) if ref.startswith("file://") else ref


def literal(text: str) -> Any:
    """A list or a number that is written out, as CSV and TSV files have them; else the text itself.

    Raises:
        ValueError: It lists texts without commas, which Python would join.
    """
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    if isinstance(found, (list, tuple)) and _joins_texts(text):
        raise ValueError(f"{text[:80]} lists texts without commas, as NumPy prints them: write the list as JSON")
    return found


def _joins_texts(text: str) -> bool:
    """Whether two texts of Python's syntax stand side by side."""
    ignored = (tokenize.NL, tokenize.NEWLINE)
    kinds = [one.type for one in tokenize.generate_tokens(io.StringIO(text).readline) if one.type not in ignored]
    return any(one == other == tokenize.STRING for one, other in pairwise(kinds))


def read_image(ref: Any) -> ImageRef:
    """One image: a path, bytes, a picture, `{"bytes", "path"}`, a data URI, a `file://` URL or base64.

    Raises:
        ValueError: It is none of these, or lies on the web.
    """
    if isinstance(ref, Mapping):
        ref = next((ref[key] for key in ("bytes", "path", "url", "image", "base64") if ref.get(key)), ref)
    if ref is Unread:
        return None
    if isinstance(ref, os.PathLike):
        ref = os.fspath(ref)
    if isinstance(ref, str):
        return _read_text(ref)
    if isinstance(ref, PILImage) and 0 in ref.size:
        raise ValueError("an image has no pixels")
    if isinstance(ref, (bytes, PILImage)):
        return ref
    raise ValueError("an image is neither a path, nor bytes, nor a picture")


def _read_text(ref: str) -> str | bytes:
    check_text("image's path", ref)
    if ref.startswith("data:"):
        return _decoded(ref.partition(",")[2])
    if ref.startswith(("http://", "https://")):
        raise ValueError(f"the image {ref[:200]} lies on the web: download it first, and give its path")
    if ref.startswith("file://"):
        return unquote(urlsplit(ref).path)
    head = ref[:64]
    if len(head) == 64 and _BASE64.fullmatch(head) and base64.b64decode(head).startswith(_MAGIC):
        return _decoded(ref)
    return ref


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"an image within the row is not base64: {error}") from None


def check_text(name: str, value: Any) -> None:
    """Raises ValueError for half a surrogate pair, which no tokenizer and no file system takes."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the {name} holds half a surrogate pair, which is no character") from None


def place_numbered(texts: Sequence[str], images: tuple[ImageRef, ...]) -> tuple[tuple[str, ...], tuple[ImageRef, ...]]:
    """Texts with plain marks for numbered ones (`<image 1>`), and the images in the order of these marks.

    A mark after the first of an image becomes its number, such as "image 2"; so do all, where some image has none.

    Raises:
        ValueError: A mark is of an image that the row does not have.
    """
    if not any("image" in text and _NUMBERED_MARK.search(text) for text in texts):
        return tuple(texts), images
    numbers = [int(found) for text in texts for found in _NUMBERED_MARK.findall(text)]
    if wrong := [number for number in numbers if not 1 <= number <= len(images)]:
        raise ValueError(f"the text has a mark of image {wrong[0]}, but the row has {len(images)} images")
    order = list(dict.fromkeys(numbers))
    unmarked = set() if len(order) == len(images) else set(order)
    order = order if not unmarked else list(range(1, len(images) + 1))
    shown = set(unmarked)

    def rewrite(found: re.Match[str]) -> str:
        number = int(found[1])
        if number in shown:
            return f"image {order.index(number) + 1}"
        shown.add(number)
        return IMAGE_MARK

    return tuple(_NUMBERED_MARK.sub(rewrite, text) for text in texts), tuple(images[i - 1] for i in order)

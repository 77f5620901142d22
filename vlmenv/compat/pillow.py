"""Private parts of Pillow: the open file of a picture."""

from __future__ import annotations

import io
from typing import IO, Final

from PIL import Image

from vlmenv.compat import Use


def open_file(picture: Image.Image) -> IO[bytes] | None:
    """The file that a picture is read from; None if it is read already, or if Pillow does not tell."""
    stream: IO[bytes] | None = getattr(picture, "fp", None)
    return stream


def _check_file() -> str | None:
    with io.BytesIO() as stream:
        Image.new("1", (1, 1)).save(stream, "PNG")
        stream.seek(0)
        with Image.open(stream) as picture:
            return None if open_file(picture) is stream else "Pillow does not tell the file of a picture"


USES: Final = (Use("open files", _check_file, "the orientation of a PNG is read with its pixels, which is slower"),)

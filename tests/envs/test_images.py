"""Images are decoded at the size that the model sees, and what refers to them stays in pixels of the full image."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import DataError
from vlmenv.envs.data.images import load_image, outline_image
from vlmenv.envs.rec import RECEnv

BOUND = ResizeRule(factor=28, min_pixels=56 * 56, max_pixels=200_000)


def photo(width: int, height: int) -> PILImage.Image:
    """Smooth colours, which every way to scale an image keeps about the same."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / width * 9), np.cos(y / height * 7), np.sin((x / width + y / height) * 5)]
    return PILImage.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


def encoded(picture: PILImage.Image, kind: str, orientation: int = 1, **options: Any) -> bytes:
    stream, exif = io.BytesIO(), PILImage.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture.save(stream, kind, exif=exif, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_within_the_bound_are_as_without_it(kind: str, orientation: int) -> None:
    data = encoded(photo(60, 40), kind, orientation)
    theirs = np.asarray(ImageOps.exif_transpose(PILImage.open(io.BytesIO(data))).convert("RGB"))
    for bound in (None, BOUND):
        image, size = load_image(data, "here", bound)
        assert np.array_equal(image, theirs)
        assert size == (image.shape[1], image.shape[0])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_larger_images_are_decoded_at_the_models_size(kind: str, orientation: int) -> None:
    data = encoded(photo(1700, 900), kind, orientation)
    full = ImageOps.exif_transpose(PILImage.open(io.BytesIO(data)))
    image, size = load_image(data, "here", BOUND)
    assert size == full.size
    assert image.shape[1::-1] == BOUND.size(*full.size)
    theirs = np.asarray(full.resize(BOUND.size(*full.size), PILImage.Resampling.BICUBIC), dtype=int)
    assert np.abs(image - theirs).mean() < 2
    blank, told = outline_image(data, "here", BOUND)
    assert (blank.shape, told) == (image.shape, size)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_all_modes_are_scaled(mode: str) -> None:
    source = photo(1200, 700)
    picture = PILImage.fromarray(np.full((700, 1200), 40_000, np.uint16)) if mode == "I;16" else source.convert(mode)
    image, _ = load_image(encoded(picture, "TIFF"), "here", BOUND)
    assert image.shape[1::-1] == BOUND.size(1200, 700)
    plain, _ = load_image(encoded(picture, "TIFF"), "here")
    assert np.abs(image.mean((0, 1)) - plain.mean((0, 1))).max() < 3


def test_transparency_is_composed_before_or_after_scaling_alike() -> None:
    layer = photo(1200, 700).convert("RGBA")
    layer.putalpha(PILImage.linear_gradient("L").resize(layer.size))
    image, _ = load_image(encoded(layer, "PNG"), "here", BOUND)
    plain = PILImage.fromarray(load_image(encoded(layer, "PNG"), "here")[0])
    theirs = np.asarray(plain.resize(BOUND.size(1200, 700), PILImage.Resampling.BICUBIC), dtype=int)
    assert np.abs(image - theirs).max() < 6


def test_headers_alone_tell_the_size_even_of_half_a_file() -> None:
    for kind in ("JPEG", "PNG"):
        data = encoded(photo(1700, 900), kind, 6)
        blank, size = outline_image(data[: len(data) // 2], "here", BOUND)
        assert size == (900, 1700)
        assert blank.shape[1::-1] == BOUND.size(900, 1700)
        with pytest.raises(DataError, match="cannot be read as an image"):
            load_image(data[: len(data) // 2], "here", BOUND)


def test_a_png_may_tell_its_orientation_after_its_pixels() -> None:
    data = encoded(photo(60, 40), "PNG", 6)
    at = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[at : at + 4])
    chunk, end = data[at : at + length], data.index(b"IEND") - 4
    late = data[:at] + data[at + length : end] + chunk + data[end:]
    assert outline_image(late, "here")[1] == load_image(late, "here")[1] == (40, 60)


def test_too_many_pixels_are_refused_before_anything_is_decoded() -> None:
    huge = encoded(PILImage.new("L", (9500, 9500)), "PNG")
    for read in (load_image, outline_image):
        with pytest.raises(DataError, match="9500 x 9500 pixels, more than"):
            read(huge, "here", BOUND)
        jpeg = encoded(PILImage.new("L", (9500, 9500)), "JPEG")  # decoded at an eighth
        assert read(jpeg, "here", BOUND)[0].shape[1::-1] == BOUND.size(9500, 9500)
        with pytest.raises(DataError, match="9500 x 9500 pixels, more than"):
            read(jpeg, "here")


def test_places_stay_in_pixels_of_the_full_image(tmp_path: Path) -> None:
    """An EXIF-turned photo of 1700 x 900: what is asked, scored and drawn is the same with and without a bound."""
    (tmp_path / "a.jpg").write_bytes(encoded(photo(1700, 900), "JPEG", 6))
    row = {"image": "a.jpg", "problem": "Where?", "solution": [90, 170, 450, 850]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for coordinates in ("original", "norm1000", "resized"):
        told: dict[str, Any] = {"dataset": tmp_path / "rows.jsonl", "coordinates": coordinates}
        told |= {"resize": BOUND} if coordinates == "resized" else {}
        plain, bounded = RECEnv(**told), RECEnv(**told, image_bound=BOUND)
        samples = [env.source.get(0) for env in (plain, bounded)]
        assert samples[1].images[0].shape[1::-1] == BOUND.size(900, 1700)
        assert samples[0].target == samples[1].target == (90, 170, 450, 850)
        answers = [env.write_answer(one) for env, one in zip((plain, bounded), samples, strict=True)]
        assert answers[0] == answers[1]
        assert bounded.score(answers[0], samples[1]).reward == plain.score(answers[0], samples[0]).reward
        assert bounded.target(samples[1]) == plain.target(samples[0])
        shown = bounded.observe(samples[1])["images"][0].shape[1::-1]
        assert shown == BOUND.size(900, 1700)
        outline = bounded.observe(bounded.source.outline(0))
        assert outline["images"][0].shape[1::-1] == shown
        green = [
            np.argwhere((env.draw(one, None) == (0, 114, 178)).all(-1))
            for env, one in zip((plain, bounded), samples, strict=True)
        ]
        share = [
            found.max(0) / env.draw(one, None).shape[:2]
            for found, env, one in zip(green, (plain, bounded), samples, strict=True)
        ]
        assert np.abs(share[0] - share[1]).max() < 0.01


@pytest.mark.slow
def test_memory_does_not_follow_the_camera(tmp_path: Path) -> None:
    """A JPEG of 13,000 x 13,000 takes under 400 MB, where its pixels alone have 507 MB."""
    PILImage.new("RGB", (13_000, 13_000), "red").save(tmp_path / "a.jpg")
    code = (
        "import resource; from vlmenv.core.coordinates import ResizeRule\n"
        "from vlmenv.envs.data.images import load_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"image, size = load_image({str(tmp_path / 'a.jpg')!r}, 'here', ResizeRule(28, 3136, 12845056))\n"
        "assert size == (13000, 13000) and image.size <= 3 * 12845056\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400_000

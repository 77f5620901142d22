"""Reads videos: chosen frames of a file, of an animated image, or of a folder or a list of frames."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageSequence

from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.spaces import Image, blank_image
from vlmenv.core.video import FrameRule, Video
from vlmenv.envs.data.images import MOST_PIXELS, load_image, open_image, outline_image, regular_file
from vlmenv.envs.data.media import VideoRef

MOST_FRAMES: Final = 1_000_000
"""Of a file; nine hours at 30 frames per second."""
ANIMATED: Final = (".gif", ".webp", ".apng", ".png")
"""Endings of animated images, which Pillow reads."""
CONTAINERS: Final = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf"
"""Formats of files that PyAV may open. Others, such as lists of addresses, could lead it to other files."""
_FRAME_ENDINGS: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class _Opened:
    """A video of which only times and the size are known. T frames."""

    times: NDArray[np.float64]
    """[T], seconds from the start, ascending"""
    duration: float
    size: tuple[int, int]
    """width and height"""
    read: Callable[[Sequence[int], tuple[int, int]], Iterator[Image]]
    """gives the frames of ascending numbers at a width and height"""


def load_video(ref: VideoRef, fps: float | None, place: str, rule: FrameRule) -> Video:
    """Reads the frames that a rule chooses. Only these are kept, at their size by the rule.

    Args:
        ref: A file's path or bytes, a folder of frames, or a list of frames.
        fps: Frames per second of a folder or a list of frames. None: not known.
        place: Where it is asked for, as file and line, for the error message.
        rule: The choice of frames.

    Raises:
        ConfigError: The file needs PyAV, which is not installed.
        DataError: There is no such video, or it cannot be read.
    """
    return _loaded(ref, fps, place, rule, blank=False)


def outline_video(ref: VideoRef, fps: float | None, place: str, rule: FrameRule) -> Video:
    """As `load_video`, but with blank frames: at most one frame is decoded.

    Raises:
        ConfigError: As for `load_video`.
        DataError: As for `load_video`, as far as headers and packets tell.
    """
    return _loaded(ref, fps, place, rule, blank=True)


def check_video(ref: VideoRef, fps: float | None) -> None:
    """Looks for a video, without opening it.

    Raises:
        ConfigError: The file needs PyAV, which is not installed.
        ValueError: There is none, or a folder or a list of frames has no `fps`.
    """
    if isinstance(ref, str) and not Path(ref).exists():
        raise ValueError(f"there is no video {ref[:200]}")
    if _is_frames(ref) and fps is None:
        raise ValueError("the row has a video as frames: state their number per second in the column 'fps'")
    if not _is_frames(ref) and not _is_animated(ref):
        _pyav()


def files_of(ref: VideoRef) -> list[str]:
    """The paths of a video's files; none of bytes."""
    if isinstance(ref, str) and _is_frames(ref):
        return sorted(str(path) for path in Path(ref).iterdir() if path.suffix.lower() in _FRAME_ENDINGS)
    return list(ref) if isinstance(ref, tuple) else [ref] if isinstance(ref, str) else []


def _is_frames(ref: VideoRef) -> bool:
    return isinstance(ref, tuple) or (isinstance(ref, str) and Path(ref).is_dir())


def _loaded(ref: VideoRef, fps: float | None, place: str, rule: FrameRule, *, blank: bool) -> Video:
    name = str(ref)[:200] if isinstance(ref, str) else f"a video within the row ({type(ref).__name__})"
    try:
        with _opened(ref, fps, place) as found:
            if found.size[0] * found.size[1] > MOST_PIXELS:
                raise ValueError(f"its frames have {found.size} pixels, more than {MOST_PIXELS:,} in all")
            chosen, size = rule.choose(len(found.times), found.duration), rule.size(*found.size)
            if blank:
                frames = np.broadcast_to(blank_image(*size), (len(chosen), size[1], size[0], 3))
            else:
                frames = np.empty((len(chosen), size[1], size[0], 3), np.uint8)
                count = 0
                for count, frame in enumerate(found.read(chosen.tolist(), size), 1):
                    frames[count - 1] = frame
                if count < len(chosen):
                    raise ValueError(f"{count} of {len(chosen)} frames can be decoded")
            return Video(frames, found.times[chosen], found.duration)
    except FileNotFoundError:
        raise DataError(f"{place}: there is no video {name}") from None
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, PILImage.DecompressionBombError) as error:
        raise DataError(f"{place}: {name} cannot be read as a video: {error}") from error


@contextmanager
def _opened(ref: VideoRef, fps: float | None, place: str) -> Iterator[_Opened]:
    if _is_frames(ref):
        yield _of_frames(files_of(ref), fps, place)
    elif _is_animated(ref):
        with open_image(ref) as picture:
            yield _of_animation(picture)
    else:
        with _of_file(ref) as found:
            yield found


def _is_animated(ref: VideoRef) -> TypeGuard[str | bytes]:
    if isinstance(ref, bytes):
        return ref.startswith((b"GIF8", b"\x89PNG")) or ref[8:12] == b"WEBP"
    return isinstance(ref, str) and ref.lower().endswith(ANIMATED)


def _of_frames(files: Sequence[str], fps: float | None, place: str) -> _Opened:
    """A video as images of one size, at equal distances of time."""
    if not files:
        raise ValueError(f"the folder has no frames: none of its files ends in {', '.join(_FRAME_ENDINGS)}")
    if fps is None:
        raise ValueError("the number of its frames per second is not known: state it in the column 'fps'")
    first = outline_image(files[0], place)[1]

    def read(numbers: Sequence[int], size: tuple[int, int]) -> Iterator[Image]:
        # A bound of as many pixels as the size has makes a JPEG of a large photo decode at fewer.
        bound = ResizeRule(1, 1, size[0] * size[1])
        for number in numbers:
            image, full = load_image(files[number], place, bound)
            if full != first:
                raise ValueError(f"frame {number + 1} has {full} pixels, the first {first}")
            yield _scaled(PILImage.fromarray(image), size)

    return _Opened(np.arange(len(files)) / fps, len(files) / fps, first, read)


def _of_animation(picture: PILImage.Image) -> _Opened:
    """An animated image, whose frames last as long as it says; 0.1 seconds, as in browsers, where it says nothing."""
    count = int(getattr(picture, "n_frames", 1))
    if count > MOST_FRAMES:
        raise ValueError(f"it has {count:,} frames, more than {MOST_FRAMES:,}")
    lasting = []
    for frame in ImageSequence.Iterator(picture):
        lasting.append((frame.info.get("duration") or 100) / 1000)
    starts = np.concatenate([[0.0], np.cumsum(lasting)])

    def read(numbers: Sequence[int], size: tuple[int, int]) -> Iterator[Image]:
        for number in numbers:
            picture.seek(number)
            yield _scaled(picture.convert("RGB"), size)

    return _Opened(starts[:-1], float(starts[-1]), picture.size, read)


@contextmanager
def _of_file(ref: Any) -> Iterator[_Opened]:
    """A file that PyAV reads: first the times of its packets, then the frames until the last chosen one."""
    av = _pyav()
    with io.BytesIO(ref) if isinstance(ref, bytes) else regular_file(ref) as stream:
        try:
            with _container(stream) as (container, track):
                second, rate = float(track.time_base), float(track.average_rate or 1)
                ticks = _ticks(container, track)
            with _container(stream) as (container, track):
                first = next(container.decode(track))
            gap = float(np.median(np.diff(ticks))) * second if len(ticks) > 1 else 1 / rate
            times = (ticks - ticks[0]) * second
            turns = round(getattr(first, "rotation", 0) / 90) % 4
            size = (first.height, first.width) if turns % 2 else (first.width, first.height)
            yield _Opened(times, float(times[-1]) + gap, size, _reader(stream, ticks, turns))
        except StopIteration:
            raise ValueError("none of its frames can be decoded") from None
        except av.FFmpegError as error:
            raise ValueError(str(error)) from error


@contextmanager
def _container(stream: Any) -> Iterator[tuple[Any, Any]]:
    """Opens a file from its start, with its first track of pictures."""
    stream.seek(0)
    with _pyav().open(stream, mode="r", options={"format_whitelist": CONTAINERS}) as container:
        if not container.streams.video:
            raise ValueError("it has no stream of pictures")
        yield container, container.streams.video[0]


def _ticks(container: Any, track: Any) -> NDArray[np.int64]:
    """The times of all frames in ticks of the track, ascending. Nothing is decoded."""
    found, packets = set[int](), 0
    for packet in container.demux(track):
        packets += packet.size > 0
        if packet.pts is not None and not packet.is_discard:
            found.add(packet.pts)
        if packets > MOST_FRAMES:
            raise ValueError(f"it has more than {MOST_FRAMES:,} frames")
    if packets < track.frames:
        raise ValueError(f"it is cut off: {packets} of its {track.frames} frames are there")
    if not found:
        raise ValueError("it has no frames with times")
    return np.array(sorted(found), dtype=np.int64)


def _reader(
    stream: Any, ticks: NDArray[np.int64], turns: int
) -> Callable[[Sequence[int], tuple[int, int]], Iterator[Image]]:
    """Reads frames of a file, turned by quarters of a turn against the clock, as its header says."""

    def read(numbers: Sequence[int], size: tuple[int, int]) -> Iterator[Image]:
        wanted = {int(ticks[number]) for number in numbers}
        width, height = size[::-1] if turns % 2 else size
        with _container(stream) as (container, track):
            for frame in container.decode(track):
                if frame.pts in wanted:
                    wanted.remove(frame.pts)
                    stored = frame.to_ndarray(width=width, height=height, format="rgb24", interpolation="BICUBIC")
                    yield np.rot90(stored, turns)
                if not wanted:
                    return

    return read


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            f'videos need PyAV ({error}): pip install "vlmenv[video]". GIFs and folders of frames do not'
        ) from error
    return av


def _scaled(picture: PILImage.Image, size: tuple[int, int]) -> Image:
    return np.asarray(picture if picture.size == size else picture.resize(size, PILImage.Resampling.BICUBIC))

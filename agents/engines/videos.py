"""Videos as vLLM takes them: frames at the size that the model sees, and their times.

The public inputs of vLLM are frames with metadata. Over HTTP there are only files of videos, so servers read a format
of this project's own: the frames as they are, in a safetensors file.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vlmenv.agents.families import Family
from vlmenv.core.video import Video

LOADER: Final = "vlmenv"
"""vLLM's name of `FrameLoader`"""
Frames = tuple[NDArray[np.uint8], dict[str, Any]]
"""frames [F, H, W, 3] and metadata, as vLLM takes a video"""
AS_GIVEN: Final = {"videos_kwargs": {"do_resize": False, "do_sample_frames": False}}
"""settings of vLLM's processor by which it takes frames as they are"""


def as_frames(family: Family, video: Video) -> Frames:
    """A video for vLLM in this process.

    Raises:
        ValueError: The processor refuses frames of this shape.
    """
    return _with_times(family.resized_frames(video), video.seconds)


def packed(family: Family, video: Video) -> bytes:
    """A video for a server, which `FrameLoader` reads.

    Raises:
        ValueError: The processor refuses frames of this shape.
    """
    return save({"frames": np.ascontiguousarray(family.resized_frames(video)), "seconds": video.seconds})


class FrameLoader:
    """Reads what `packed` wrote, in a server of vLLM's."""

    @classmethod
    def load_bytes(cls, data: bytes, **settings: Any) -> Frames:
        """Reads a video.

        Args:
            data: The bytes.
            settings: vLLM's choice of frames, which are chosen already.

        Raises:
            ValueError: They are no video in this form.
        """
        try:
            found = load(data)
        except SafetensorError as error:
            raise ValueError(f"servers of vlmenv take videos as trainers of vlmenv send them: {error}") from error
        if found.keys() != {"frames", "seconds"}:
            raise ValueError(f"a video has frames and seconds, not {', '.join(sorted(found))}")
        frames, seconds = found["frames"], found["seconds"]
        whole = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and frames.size > 0
        if not whole or seconds.dtype != np.float64 or seconds.shape != frames.shape[:1]:
            raise ValueError(
                f"a video is uint8 [F, H, W, 3] with float64 [F], not {frames.dtype} {list(frames.shape)} with "
                f"{seconds.dtype} {list(seconds.shape)}"
            )
        return _with_times(frames, seconds)


def _with_times(frames: NDArray[np.uint8], seconds: NDArray[np.float64]) -> Frames:
    """vLLM divides the numbers of frames by frames per second. With one per second, the numbers are the seconds."""
    metadata = {
        "total_num_frames": len(frames),
        "fps": 1.0,
        "duration": float(seconds[-1]),
        "video_backend": LOADER,
        "frames_indices": seconds.tolist(),
    }
    return frames, metadata

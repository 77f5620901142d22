"""Samples as rows of a file, in PeBR-R1's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from vlmenv.core.answers import Answer, Caption
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.source import Sample


def export_sample(task: VisualTaskEnv, sample: Sample, folder: Path) -> dict[str, Any]:
    """A row from which the task reads the same sample; its images are written beside it.

    Args:
        task: The task, in the coordinates of the stored images, as the boxes of data sets are.
        sample: One of its samples.
        folder: Folder of the images, which become `images/ID-NUMBER.png`, and of the frames of videos, which become
            `videos/ID-NUMBER/0000.png` and so on.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{sample.id}-{number}.png" for number in range(len(sample.images))]
    for name, image in zip(names, sample.images, strict=True):
        PILImage.fromarray(image).save(folder / name)
    answer = task.stored_answer(sample)
    row = {"qid": sample.id, "images": names, "problem": sample.question, "answer": answer}
    videos = _export_videos(sample, folder)
    return row | videos | ({"subject": sample.subject} if sample.subject else {}) | _truth(sample.target)


def _export_videos(sample: Sample, folder: Path) -> dict[str, Any]:
    """The entries of a row about videos, whose frames are written. They are to be at equal distances of time."""
    names = [f"videos/{sample.id}-{number}" for number in range(len(sample.videos))]
    for name, video in zip(names, sample.videos, strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(video.frames):
            PILImage.fromarray(frame).save(folder / name / f"{number:04}.png")
    return {"videos": names, "fps": sample.videos[0].rate} if names else {}


def _truth(target: Any) -> dict[str, Any]:
    """The content of a target beside the text of its answer."""
    if isinstance(target, Answer):
        pages = {"evidence_pages": list(target.pages)} if target.pages else {}
        return {"accu_reward_method": target.kind, "tolerance": target.tolerance} | pages
    if isinstance(target, Caption):
        return {"key_word": list(target.keywords)} | ({} if target.answer else {"answer": ""})
    return {}

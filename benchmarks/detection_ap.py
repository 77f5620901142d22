"""Detection AP of single images: ours against a pycocotools `COCOeval` for each.

python benchmarks/detection_ap.py
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from rich.table import Table

from vlmenv.envs.rewards.detection import average_precision


def main() -> None:
    rng = np.random.default_rng(0)
    table = Table("boxes", "COCOeval, ms", "ours, ms", "times as fast", title=f"one image, {os.cpu_count()} cores")
    for count in (1, 5, 20, 100):
        target = boxes(rng, count)
        answered = np.clip(target + rng.normal(0, 3, target.shape), 0, None)
        answered[:, 2:] = np.maximum(answered[:, 2:], answered[:, :2] + 1)
        assert abs(coco_ap(answered, target) - average_precision(answered, target)) < 1e-9
        theirs, ours = (
            seconds(lambda a=answered, t=target: coco_ap(a, t)),
            seconds(lambda a=answered, t=target: average_precision(a, t)),
        )
        table.add_row(str(count), f"{theirs * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{theirs / ours:.0f}")
    Console().print(table)


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corners = rng.uniform(0, 400, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(10, 200, (count, 2))], axis=1)


def coco_ap(answered: np.ndarray, target: np.ndarray) -> float:
    """One category in one image by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth, answers = COCO(), xywh(answered)
        rows = [{"bbox": b, "area": b[2] * b[3], "iscrowd": 0, "category_id": 1, "image_id": 1} for b in xywh(target)]
        annotations = [{"id": i} | row for i, row in enumerate(rows, 1)]
        truth.dataset = {"info": {}, "images": [{"id": 1}], "annotations": annotations, "categories": [{"id": 1}]}
        truth.createIndex()
        found = truth.loadRes([{"bbox": b, "score": 1.0, "category_id": 1, "image_id": 1} for b in answers])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return float(evaluation.eval["precision"][:, :, 0, 0, 2].mean())


def xywh(corners: np.ndarray) -> list[list[float]]:
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()


def seconds(call: Callable[[], object]) -> float:
    """Median over twenty calls."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


if __name__ == "__main__":
    main()

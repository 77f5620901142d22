from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import vlmenv  # noqa: F401 (registers the environments)
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.export import export_sample

TASKS = (
    *("VLM-REC-v0", "VLM-OVD-v0", "VLM-Math-v0", "VLM-Caption-v0", "VLM-VQA-v0"),
    *("VLM-Count-v0", "VLM-Point-v0", "VLM-GUI-v0", "VLM-OCR-v0", "VLM-Seg-v0"),
    *("VLM-Chart-v0", "VLM-Search-v0", "VLM-Temporal-v0", "VLM-VideoQA-v0"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_what_is_exported_is_read_back_as_it_was(name: str, tmp_path: Path) -> None:
    task = gymnasium.make(name, split="eval").unwrapped
    assert isinstance(task, VisualTaskEnv)
    samples = [task.source.get(index) for index in range(40)]
    rows = [export_sample(task, sample, tmp_path) for sample in samples]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = gymnasium.make(name, dataset=tmp_path / "rows.jsonl").unwrapped
    assert isinstance(read, VisualTaskEnv)
    for index, sample in enumerate(samples):
        again = read.source.get(index)
        assert (again.id, again.question, again.target) == (sample.id, sample.question, sample.target)
        assert again.subject == sample.subject
        assert all(np.array_equal(a, b) for a, b in zip(again.images, sample.images, strict=True))
        assert again.videos == sample.videos

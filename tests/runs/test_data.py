"""Fingerprints of data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmenv.envs.making import make_envs
from vlmenv.runs.data import difference, fingerprint

ROWS = [
    {
        "id": str(i),
        "image": "one.png",
        "conversations": [
            {"from": "human", "value": f"Where is {i}?"},
            {"from": "gpt", "value": f"[1, 2, 30, {30 + i}]"},
        ],
    }
    for i in range(100)
]


def source(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Any:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (64, 140)).save(folder / "one.png")
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(json.dumps(row) for row in rows)
    (folder / name).write_text(text)
    return make_envs("VLM-REC-v0", 1, dataset=str(folder / name)).task.source


def other_answer(rows: list[Any]) -> list[Any]:
    changed = json.loads(json.dumps(rows))
    changed[77]["conversations"][1]["value"] = "[1, 2, 30, 31]"
    return changed


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[::-1], "another order"),
        (lambda rows: rows[:60], "60 samples, and had 100 samples; the first 60 rows are the same"),
        (lambda rows: rows + rows, "200 samples, and had 100 samples; the first 100 rows are the same"),
        (lambda rows: rows[50:] + rows, "150 samples, and had 100 samples; the first 100 rows are others"),
        (other_answer, "samples 76 to 77, counted from 0 (1 of 50 stretches"),
        (lambda rows: [{**row, "id": f"x{row['id']}"} for row in rows], "samples 0 to 1, counted from 0 (50 of 50"),
    ],
)
def test_changes_are_told_in_words(tmp_path: Path, name: str, change: Any, told: str) -> None:
    old = json.loads(json.dumps(fingerprint(source(tmp_path, ROWS, name))))
    assert difference(old, source(tmp_path / "again", ROWS, name)) is None
    found = difference(old, source(tmp_path / "changed", change(ROWS), name))
    assert found is not None
    assert told in found


def test_rows_that_are_left_out_do_not_count(tmp_path: Path) -> None:
    whole = fingerprint(source(tmp_path, ROWS))
    broken = [*ROWS[:50], {"id": "broken"}, *ROWS[50:]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in broken))
    left_out = make_envs("VLM-REC-v0", 1, dataset=str(tmp_path / "rows.jsonl"), skip_broken=True).task.source
    assert difference(whole, left_out) is None


def test_rows_in_memory_and_several_sets(tmp_path: Path) -> None:
    source(tmp_path, ROWS)
    first, second = (
        [dict(row, image=Image.new("RGB", (64, 140), (shade, 0, 0))) for row in ROWS[:3]] for shade in (1, 2)
    )
    one, other, again = (make_envs("VLM-REC-v0", 1, dataset=rows).task.source for rows in (first, second, first))
    assert difference(fingerprint(one), other) is not None
    assert difference(fingerprint(one), again) is None
    file = str(tmp_path / "rows.jsonl")
    both = make_envs("VLM-REC-v0", 1, dataset=[file, file]).task.source
    assert fingerprint(both)["size"] == 200
    assert difference(fingerprint(make_envs("VLM-REC-v0", 1, dataset=file).task.source), both) is not None


def test_built_in_samples_have_no_end() -> None:
    built_in = make_envs("VLM-REC-v0", 1).task.source
    assert fingerprint(built_in) == {"size": None}
    assert difference({"size": None}, built_in) is None
    assert difference({"size": 12}, built_in) == "it has samples without end, and had 12 samples"

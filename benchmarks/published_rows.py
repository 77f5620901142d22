"""Rewrites and reads every row of published annotation files, and answers each with its own truth.

No images are read. A row fails if its rewriting rule or its task refuses it, or if its own truth does not score 1.
Files that are absent are left out. The repository has only counts and a hash of the ids of each file, in
`published_rows.json`; a test redoes them where the files are.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from vlmenv.core.answers import Answer
from vlmenv.core.errors import DataError
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.benchmarks import hallusion_bench, math_vision, mathverse, mathvista
from vlmenv.envs.data.coco import CocoInstances, filtered_instances
from vlmenv.envs.data.dataset import Reading, UnwantedError
from vlmenv.envs.data.tables import JSONLines, JSONList, Rewritten, Rows, Table
from vlmenv.envs.math_reasoning import MathEnv
from vlmenv.envs.ovd import OVDEnv
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.selfcheck import check_answers
from vlmenv.envs.vqa import VQAEnv

Rewrite = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass
class Args:
    """Rewrite and read published annotation files."""

    folders: tuple[Path, ...]
    """Folders that hold the files, by the paths in the table."""
    output: Path | None = None
    """Markdown file for the table; a JSON file for the test is written beside it."""


@dataclass(frozen=True)
class File:
    """A published file."""

    path: str
    source: str
    task: type[VisualTaskEnv]
    table: Callable[[Path], Table]
    rewrite: Rewrite | None = None


@dataclass
class Read:
    """What came of a file's rows."""

    rows: int = 0
    read: int = 0
    ids: str = ""
    """the hash of all ids, in order"""
    kinds: dict[str, int] = field(default_factory=dict)
    """rows by the kind of their answer"""
    left_out: dict[str, int] = field(default_factory=dict)
    """rows by the reason for which they are left out on purpose"""
    unused: tuple[str, ...] = ()
    """columns that are not read"""
    faults: list[str] = field(default_factory=list)


def _mathvista(path: Path) -> Table:
    """The rows of MathVista's repository with the queries that its parquet files have too."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    queries = json.loads((path.parent / "query.json").read_text(encoding="utf-8"))
    return Rows([row | {"query": queries[pid], "decoded_image": row["image"]} for pid, row in stored.items()])


def _hallusion(path: Path) -> Table:
    """The rows of HallusionBench's repository in the columns of its parquet file of rows with an image."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return Rows([row | {"image": row["filename"]} for row in rows])


def mmmu_pro(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of MMMU-Pro's published answers in the columns of its parquet file, images by name."""
    numbers = sorted({*re.findall(r"<image (\d+)>", row["question"] + row["options"])})
    images = {f"image_{number}": f"{row['id']}_{number}.png" for number in numbers}
    return {name: row[name] for name in ("id", "question", "options", "answer")} | images


def _mmmu_val(path: Path) -> Table:
    """The choices and answers of MMMU's validation rows, as its example outputs have them; without the questions."""
    files = sorted((path.parent / "example_outputs" / "llava1.5_13b").glob("*/output.json"))
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    return Rows(
        [
            {"id": row["id"], "question": "Which?", "answer": row["answer"], "choices": row.get("index2ans")}
            for row in rows
        ]
    )


def _few_boxes(path: Path) -> Table:
    """COCO's instances as the suite measures on them."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as kept:
        json.dump(filtered_instances(path), kept)
    table = CocoInstances(Path(kept.name), path)
    weakref.finalize(table, Path(kept.name).unlink, missing_ok=True)
    return table


_MMMU = "github.com/MMMU-Benchmark/MMMU, bb0b95a"

FILES = (
    File("MathVision/data/test.jsonl", "github.com/mathllm/MATH-V, a1f5cc3", MathEnv, JSONLines, math_vision),
    File("MathVision/data/testmini.jsonl", "github.com/mathllm/MATH-V, a1f5cc3", MathEnv, JSONLines, math_vision),
    File("MathVista/data/testmini.json", "github.com/lupantech/MathVista, 53d5258", MathEnv, _mathvista, mathvista),
    File(
        "MathVerse/data/testmini_text_only.json",
        "github.com/ZrrSkywalker/MathVerse, 937b090",
        MathEnv,
        JSONList,
        mathverse,
    ),
    File(
        "MathVerse/output_templates/output_testmini.json",
        "github.com/ZrrSkywalker/MathVerse, 937b090",
        MathEnv,
        JSONList,
        mathverse,
    ),
    File("HallusionBench.json", "github.com/tianyi-lab/HallusionBench", VQAEnv, _hallusion, hallusion_bench),
    File("MMMU/mmmu/answer_dict_val.json", f"{_MMMU}, its outputs", VQAEnv, _mmmu_val),
    File(
        "MMMU/mmmu-pro/output/gpt-4o_standard(10 options)_cot.jsonl",
        f"{_MMMU}, MMMU-Pro",
        VQAEnv,
        JSONLines,
        mmmu_pro,
    ),
    File("data/eval_reference/coco_val2014_100/instances_val2014_100.json", "COCO val2014, 100", OVDEnv, _few_boxes),
    File(
        "data/eval_reference/coco_val2014_100/instances_val2014_100.json#all",
        "COCO val2014, 100",
        OVDEnv,
        CocoInstances,
    ),
    File("data/ovd/bccd/instances.json", "BCCD", OVDEnv, CocoInstances),
    File("data/ovd/bccd/samples.jsonl", "BCCD, in VLM-R1's form", OVDEnv, JSONLines),
    File("data/ovd/tinycoco/instances.json", "COCO, 23 images", OVDEnv, CocoInstances),
    File("data/ovd/tinycoco/samples.jsonl", "COCO, in VLM-R1's form", OVDEnv, JSONLines),
    File("data/rec/refcocos/samples.jsonl", "RefCOCO's kind, in VLM-R1's form", RECEnv, JSONLines),
    File("data/visual_math/geometry3k_examples/samples.jsonl", "Geometry3K", MathEnv, JSONLines),
    File("data/visual_math/mathvision/samples.jsonl", "MATH-Vision, in VLM-R1's form", MathEnv, JSONLines),
)
"""The files whose rows were read. Those of a `path#name` are the same file, read in another way."""


def main(args: Args) -> None:
    found = {file.path: read_file(file, place) for file in FILES if (place := find(file, args.folders)) is not None}
    table = describe(found)
    print(table)
    for path, read in found.items():
        for fault in read.faults[:20]:
            print(f"{path}: {fault}")
    if args.output is not None:
        args.output.write_text(table, encoding="utf-8")
        facts = {path: {k: v for k, v in asdict(read).items() if k != "faults"} for path, read in found.items()}
        args.output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def find(file: File, folders: Sequence[Path]) -> Path | None:
    places = (folder / file.path.partition("#")[0] for folder in folders)
    return next((place for place in places if place.is_file()), None)


def read_file(file: File, place: Path) -> Read:
    """Reads every row of a file as its task does, and answers it with its truth."""
    table = file.table(place)
    table = table if file.rewrite is None else Rewritten(table, file.rewrite)
    env = file.task()
    reading = env.reading()
    read, ids, kinds, left_out, unused = Read(), hashlib.sha256(), Counter[str](), Counter[str](), set[str]()
    for number, raw in enumerate(table.scan()):
        read.rows += 1
        try:
            row_id, kind, columns = _read_row(env, reading, raw, number)
        except UnwantedError as reason:
            left_out[str(reason)] += 1
        except (ValueError, DataError) as error:
            if isinstance(raw, ValueError) and str(raw).startswith("there is no image"):
                left_out["without an image"] += 1
            else:
                read.faults.append(f"row {number}: {error}")
        else:
            ids.update(f"{row_id}\n".encode())
            kinds[kind] += 1
            unused |= columns
            read.read += 1
    read.ids, read.kinds, read.left_out = ids.hexdigest(), dict(sorted(kinds.items())), dict(left_out)
    read.unused = tuple(sorted(unused))
    return read


def _read_row(env: VisualTaskEnv, reading: Reading, raw: Any, number: int) -> tuple[str, str, set[str]]:
    """The id, the kind of answer, and the columns that are not read.

    Raises:
        ValueError: The row cannot be read, or its own truth does not score 1.
    """
    row = reading.row(raw, number)
    sample = reading.sample_of(row)
    if env.geometry is None and (faults := list(check_answers(env, [sample]))):
        raise ValueError(f"its own truth {str(sample.target)[:100]} does not score: {faults[0]}")
    kind = sample.target.kind if isinstance(sample.target, Answer) else "boxes"
    return row.id, kind, {*row.unused}


def describe(found: Mapping[str, Read]) -> str:
    """The table of all files."""
    lines = [
        "# Rows of published files\n",
        "    python benchmarks/published_rows.py --folders PUBLISHED ../shared --output benchmarks/published_rows.md\n",
        "Every row is rewritten by its suite's rule, read by its task, and answered with its own truth, which must",
        "score 1. Images are not read. The repository has no rows, only counts and the hash of the ids.\n",
        "| file | source | rows | read | left out | fails | answers |",
        "|---|---|---|---|---|---|---|",
        *_lines(found),
    ]
    return "\n".join(lines) + "\n"


def _lines(found: Mapping[str, Read]) -> Iterator[str]:
    sources = {file.path: file.source for file in FILES}
    for path, read in found.items():
        left = ", ".join(f"{count} {reason}" for reason, count in read.left_out.items()) or "0"
        kinds = ", ".join(f"{count} {kind}" for kind, count in read.kinds.items())
        yield f"| `{path}` | {sources[path]} | {read.rows} | {read.read} | {left} | {len(read.faults)} | {kinds} |"


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))

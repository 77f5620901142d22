"""Small data sets in the layouts of the published ones, in the folders that the recipes name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import shared
from PIL import Image

from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.captioning import CaptionEnv
from vlmenv.envs.data.export import export_sample
from vlmenv.envs.vqa import VQAEnv

COUNT = 6


def lay_out(recipe: str, folder: Path) -> None:
    """Puts what a recipe reads into a folder."""
    kind = recipe.removeprefix("vlm_r1_").removeprefix("pebr_r1_").partition("_")[0]
    LAYOUTS[kind](folder)


def referring(folder: Path) -> None:
    """VLM-R1's JSONL to train on and its JSON to measure on, with COCO's photos of 2014."""
    source = shared("data/rec/refcocos")
    (folder / "rec_jsons_processed").mkdir()
    (folder / "coco" / "train2014").mkdir(parents=True)
    rows = [json.loads(line) for line in (source / "samples.jsonl").read_text().splitlines()][:COUNT]
    for row in rows:
        name = f"train2014/COCO_train2014_{Path(row['image']).name}"
        shutil.copyfile(source / row["image"], folder / "coco" / name)
        row["image"] = name
    written = "".join(json.dumps({key: row[key] for key in ("id", "image", "conversations")}) + "\n" for row in rows)
    for name in ("refcoco", "refcocop", "refcocog"):
        (folder / "rec_jsons_processed" / f"{name}_train.jsonl").write_text(written)
    found = [row for row in rows if not row["no_target"]]
    measured = [{"image": r["image"], "problem": r["expression"], "solution": r["bbox_xyxy"]} for r in found]
    (folder / "rec_jsons_processed" / "refcoco_val.json").write_text(json.dumps(measured))


def detection(folder: Path) -> None:
    """COCO's instances of 2017."""
    source = shared("data/ovd/tinycoco")
    content = json.loads((source / "instances.json").read_text())
    (folder / "coco" / "annotations").mkdir(parents=True)
    for part in ("train2017", "val2017"):
        (folder / "coco" / part).mkdir()
        for image in content["images"]:
            name = Path(image["file_name"]).name
            shutil.copyfile(source / "images" / name, folder / "coco" / part / name)
            image["file_name"] = name
        (folder / "coco" / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def mathematics(folder: Path) -> None:
    shutil.copytree(shared("data/visual_math/geometry3k_examples"), folder / "geometry")


def screens(folder: Path) -> None:
    """Rows of two images, and what differs between them."""
    env = VQAEnv()
    samples = (sample for sample in map(env.source.get, range(1000)) if len(sample.images) == 2)
    rows = [export_sample(env, next(samples), folder / "gui_multi-image") for _ in range(COUNT)]
    lines = [
        {
            "id": row["qid"],
            "image": row["images"],
            "conversations": [
                {"from": "human", "value": "<image><image>" + row["problem"]},
                {"from": "gpt", "value": row["answer"]},
            ],
            "accu_reward_method": "all_match",
        }
        for row in rows
    ]
    (folder / "gui_multi-image.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def reasoning(folder: Path) -> None:
    """Mulberry's rows of written-out reasoning, and two of them that are to be left out."""
    env = CaptionEnv()
    rows: list[dict[str, Any]] = []
    for index in range(COUNT):
        row = export_sample(env, env.source.get(index), folder / "mulberry_images")
        said = AnswerFormat.SECTIONS.write(row["answer"], "I look at it.")
        turns = [{"role": "user", "content": f"<image>{row['problem']}"}, {"role": "assistant", "content": said}]
        rows.append({"images": row["images"], "messages": turns})
    rows[1]["messages"][1]["content"] = AnswerFormat.SECTIONS.write("3", "I was wrong. Let me rethink it.")
    Image.new("RGB", (200, 27)).save(folder / "mulberry_images" / rows[2]["images"][0])
    (folder / "mulberry_sft.json").write_text(json.dumps(rows))


def questions(folder: Path) -> None:
    """PeBR-R1's rows, as they are and divided by difficulty."""
    env = CaptionEnv()
    rows = [export_sample(env, env.source.get(index), folder) for index in range(COUNT)]
    (folder / "sampled").mkdir()
    for name in ("pebr_grpo_dataset", "sampled/easy", "sampled/medium"):
        (folder / f"{name}.json").write_text(json.dumps(rows))


LAYOUTS = {
    "rec": referring,
    "ovd": detection,
    "math": mathematics,
    "gui": screens,
    "warmup": reasoning,
    "sampling": questions,
    "stage1": questions,
    "stage2": questions,
}

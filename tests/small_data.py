"""Small data sets in the layouts of the published ones, in the folders that the recipes name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT, shared
from PIL import Image

from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.captioning import CaptionEnv
from vlmenv.envs.counting import CountEnv
from vlmenv.envs.data.scenes import sample_scene
from vlmenv.envs.export import export_sample
from vlmenv.envs.gui import GUIEnv
from vlmenv.envs.math_reasoning import MathEnv
from vlmenv.envs.temporal import TemporalEnv
from vlmenv.envs.vqa import VQAEnv

COUNT = 6
SMALL = {
    "train": ["--steps", "1", "--prompts-per-step", "1", "--group-size", "2", "--eval-limit", "2", "--device", "cpu"],
    "eval": ["--eval-limit", "2", "--device", "cpu"],
    "doctor": ["--device", "cpu"],
    "sample": ["--eval-limit", "2", "--n", "2", "--device", "cpu"],
    "pipeline": ["--output", "runs/pipeline"],
    "data": [],
    "envs": [],
    "recipes": [],
    "score": [],
    "export": [],
    "report": [],
    "answer": ["--device", "cpu"],
}
"""Options by command that let a test run what pages show."""
WITHOUT_HUB = {
    "vlm_r1_math": "--dataset geometry/samples.jsonl",
    "geometry3k": "--min-pixels None --max-pixels None",
    "r1v_clevr": "--max-pixels None",
    "virl39k": "--min-pixels None --max-pixels None",
    "multimodal_open_r1": "--max-pixels None",
    "gui_r1": "--min-pixels None --max-pixels None",
    "pebr_r1_stage1": "--clip-model None --rewards clip 0.4 keywords 0.4 format 0.1 length 0.1",
}
"""For recipes that need the Hugging Face hub or a published model, options that do not."""


def lay_out(recipe: str, folder: Path) -> None:
    """Puts what a recipe reads into a folder."""
    kind = recipe.removeprefix("vlm_r1_").removeprefix("pebr_r1_").removeprefix("gui_").partition("_")[0]
    LAYOUTS[kind](folder)


def lay_out_rows(folder: Path) -> None:
    """Puts the pictures and rows into a folder that commands and scripts of the pages name."""
    pictures = [Path(place) / f"{n}.png" for place in (".", "images", "data/images", "photos") for n in (1, 2)]
    for picture in pictures:
        (folder / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(folder / picture)
    turns = [{"from": "human", "value": "<image>Where is it?"}, {"from": "gpt", "value": "[1, 2, 30, 40]"}]
    rows = "".join(json.dumps({"id": n, "image": f"{n}.png", "conversations": turns}) + "\n" for n in (1, 2))
    for name in ("rec", "train", "held_out"):
        (folder / f"{name}.jsonl").write_text(rows)
    (folder / "data" / "refcoco_val.jsonl").write_text(rows.replace('"image": "', '"image": "images/'))
    (folder / "points.jsonl").write_text('{"image": "1.png", "question": "Point at it.", "answer": [8, 8, 24, 24]}')
    shape = {"label": "the red square", "shape_type": "rectangle", "points": [[0, 0], [64, 64]]}
    (folder / "photos" / "1.json").write_text(json.dumps({"imagePath": "1.png", "shapes": [shape]}))


def lay_out_pipeline(folder: Path) -> None:
    """Puts what the published pipeline reads into a folder."""
    lay_out("pebr_r1_warmup", folder)
    lay_out("pebr_r1_stage1", folder)
    shutil.copyfile(folder / "pebr_grpo_dataset.json", folder / "pebr_held_out.json")


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


def geometry3k(folder: Path) -> None:
    """The data set of the hub as a folder that the library `datasets` saved, with its columns."""
    import datasets

    source = shared("data/visual_math/geometry3k_examples")
    lines = (source / "samples.jsonl").read_text().splitlines()[:COUNT]
    columns = datasets.Features(
        {"images": datasets.List(datasets.Image()), "problem": datasets.Value("string")}
        | {"answer": datasets.Value("string")}
    )
    stored: dict[str, list[Any]] = {name: [] for name in columns}
    for row in map(json.loads, lines):
        stored["images"].append([str(source / row["image"])])
        stored["problem"].append("<image>" + row["conversations"][0]["value"].removeprefix("<image>"))
        stored["answer"].append(row["answer_value"])
    rows = datasets.Dataset.from_dict(stored, columns)
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(folder / "hiyouga" / "geometry3k"))


def counting(folder: Path) -> None:
    """R1-V's rows of counted objects, as a folder that the library `datasets` saved."""
    import datasets

    env = CountEnv()
    samples = [env.source.get(index) for index in range(COUNT)]
    columns = datasets.Features(
        {"image": datasets.Image(), "problem": datasets.Value("string"), "solution": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(sample.images[0]) for sample in samples],
            "problem": [sample.question for sample in samples],
            "solution": [f"<answer> {sample.target} </answer>" for sample in samples],
        },
        columns,
    )
    datasets.DatasetDict(train=rows).save_to_disk(str(folder / "leonardPKU" / "clevr_cogen_a_train"))


def school_questions(folder: Path) -> None:
    """MM-Eureka's rows, as a folder that the library `datasets` saved: its test rows have choices."""
    import datasets

    task = MathEnv()
    samples = [task.source.get(index) for index in range(COUNT)]
    stored = {
        "id": [str(index) for index in range(COUNT)],
        "question": [f"<image>{sample.question}" for sample in samples],
        "answer": [sample.target.text for sample in samples],
        "subject": ["math"] * COUNT,
        "image": [Image.fromarray(sample.images[0]) for sample in samples],
    }
    chosen = {"question": [f"<image>Which?\nA. {sample.target.text}\nB. -7" for sample in samples]}
    parts = {"train": stored, "test": stored | chosen | {"answer": ["A"] * COUNT}}
    rows = {
        name: datasets.Dataset.from_dict(part).cast_column("image", datasets.Image()) for name, part in parts.items()
    }
    datasets.DatasetDict(rows).save_to_disk(str(folder / "FanqingM" / "MMK12"))


def rated_questions(folder: Path) -> None:
    """ViRL39K's rows: boxed answers, and paths of images; one row has no image and one has two."""
    import datasets

    task, root = MathEnv(), folder / "ViRL39K"
    (root / "images").mkdir(parents=True)
    rows = []
    for index in range(COUNT):
        sample = task.source.get(index)
        names = [f"images/{index}-{n}.png" for n in range(2 if index == 1 else 1)]
        for name in names:
            Image.fromarray(sample.images[0]).save(root / name)
        row = {"question": "<image>" * len(names) + sample.question, "answer": f"\\boxed{{{sample.target.text}}}"}
        row |= {"PassRate_32BTrained": 0.5, "PassRate_7BBase": 0.25, "category": "(GradeSchool) Geometric"}
        rows.append(row | {"source": "ours", "qid": f"ours-{index}", "image": names})
    rows[2] |= {"question": "What is 3 + 4?", "answer": "\\boxed{7}", "image": []}
    datasets.Dataset.from_list(rows).to_parquet(root / "39Krelease.parquet")


def reasoned_questions(folder: Path) -> None:
    """Multimodal Open R1's rows, as a folder that the library `datasets` saved; one solution has no answer."""
    import datasets

    task = MathEnv()
    samples = [task.source.get(index) for index in range(COUNT)]
    solutions = [f"<think>{one.rationale}</think>\n\n<answer>{one.target.text}</answer>" for one in samples]
    stored = {
        "image": [Image.fromarray(sample.images[0]) for sample in samples],
        "problem": [sample.question for sample in samples],
        "solution": [*solutions[:-1], "<think>It cannot be told.</think>"],
        "original_question": [sample.question for sample in samples],
        "original_answer": [f"The answer is {sample.target.text}." for sample in samples],
    }
    rows = datasets.Dataset.from_dict(stored).cast_column("image", datasets.Image())
    target = folder / "lmms-lab" / "multimodal-open-r1-8k-verified"
    datasets.DatasetDict(train=rows).save_to_disk(str(target))


def boxes_with_points(folder: Path) -> None:
    """VisionReasoner's rows of objects, as a folder that the library `datasets` saved."""
    import datasets

    stored: dict[str, list[Any]] = {"image": [], "problem": [], "solution": []}
    for index in range(COUNT):
        scene, _ = sample_scene("train", index)
        centres = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in (shape.box for shape in scene.shapes)]
        objects = [
            {"bbox_2d": list(shape.box), "point_2d": list(centre)}
            for shape, centre in zip(scene.shapes, centres, strict=True)
        ]
        stored["image"].append(Image.fromarray(scene.image))
        stored["problem"].append("the shapes")
        stored["solution"].append(json.dumps(objects))
    rows = datasets.Dataset.from_dict(stored).cast_column("image", datasets.Image())
    target = folder / "Ricky06662" / "VisionReasoner_multi_object_7k_840"
    datasets.DatasetDict(train=rows).save_to_disk(str(target))


def actions(folder: Path) -> None:
    """GUI-R1's parquet files, with places in fractions of the screen."""
    import datasets

    env = GUIEnv()
    rows = []
    for sample in map(env.source.get, range(COUNT)):
        (width, height), place = sample.full_sizes[0], sample.target.place
        box = [-100.0, -100.0] if place is None else [v / (width, height)[i % 2] for i, v in enumerate(place)]
        row = {"image": Image.fromarray(sample.images[0]), "instruction": sample.question, "history": "None"}
        action = {"gt_action": sample.target.kind, "gt_input_text": sample.target.text or "no input text"}
        rows.append(row | action | {"gt_bbox": box, "task_type": "low"})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    for name in ("train", "test"):
        table.to_parquet(str(folder / f"{name}.parquet"))


def moments(folder: Path) -> None:
    """Time-R1's rows, of moving shapes."""
    env = TemporalEnv()
    videos = "dataset/timer1/videos/timerft_data"
    (folder / videos).mkdir(parents=True)
    (folder / "dataset" / "timer1" / "annotations").mkdir()
    rows = []
    for sample in map(env.source.get, range(COUNT)):
        (video,), file = sample.videos, f"{videos}/{sample.id}.gif"
        first, *rest = [Image.fromarray(frame) for frame in video.frames]
        first.save(folder / file, save_all=True, append_images=rest, duration=500)
        row = {"video": f"./{file}", "duration": video.duration, "timestamp": list(sample.target)}
        rows.append(row | {"sentence": sample.question, "qid": sample.id, "video_start": None, "video_end": None})
    (folder / "dataset" / "timer1" / "annotations" / "train_2k5.json").write_text(json.dumps(rows))


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
    "geometry3k": geometry3k,
    "r1v": counting,
    "r1": actions,
    "vision": boxes_with_points,
    "time": moments,
    "mm": school_questions,
    "virl39k": rated_questions,
    "multimodal": reasoned_questions,
}


def small_pipeline(name: str, folder: Path, **changes: Any) -> Path:
    """A published pipeline with each stage cut down to a few steps, as a file.

    Args:
        name: Of the pipeline.
        folder: Where the file goes.
        changes: Options of all stages that train.
    """
    content = yaml.safe_load((ROOT / "vlmenv" / "pipelines" / f"{name}.yaml").read_text())
    for stage in content["stages"].values():
        command, options = next(iter(stage.items()))
        options |= {"device": "cpu", "max_new_tokens": 24}
        if "{" not in options.get("model", ""):
            options["model"] = "builtin"
        if command == "sample":
            options |= {"n": 2, "part_size": 2, "temperature": 1.0}
        else:
            options |= {"steps": 2, "prompts_per_step": 2, "eval_limit": 0, "warmup_steps": 0} | changes
            options |= (
                {} if options.get("algo") == "sft" or "warmup" in options.get("recipe", "") else {"group_size": 2}
            )
            options.pop("warmup_share", None)
    for options in content["evaluate"].values():
        options |= {"device": "cpu", "max_new_tokens": 8, "eval_limit": 4}
    content["stages"]["warmup"]["train"]["max_new_tokens"] = 96  # room for the true answers
    if name == "pebr_r1_builtin":
        mixed = {"measure": "keyword_recall", "threshold": 0.75, "max_new_tokens": 64, "eval_limit": 16}
        content["stages"]["sampling"]["sample"] |= mixed
        content["stages"]["warmup"]["train"]["lr"] = 1e-5  # two steps at more would harm the model
    else:
        terms = {"clip": 0.4, "keywords": 0.4, "format": 0.1, "length": 0.1}  # by the model that is built in
        content["stages"]["perception"]["train"] |= {"rewards": terms, "clip_model": None}
        content["evaluate"]["perception"] |= {"rewards": terms, "clip_model": None}
        # A few answers of a model that is not meant for these rows: all count as right, and so all rows as easy.
        content["stages"]["sampling"]["sample"] |= {"measure": "unparsable", "threshold": 0.0}
        content["stages"]["reasoning"]["train"]["dataset"] = ["{sampling}/easy.json"]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file

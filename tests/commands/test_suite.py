"""The papers' data sets as they are published, in small, and the numbers that come out."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import shared
from judge_server import Server
from PIL import Image
from pycocotools.coco import COCO

import vlmenv.commands.suite
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.cli import main
from vlmenv.commands.suite import SUITES, VLM_R1, Found, all_right, image_root, run_suite
from vlmenv.core.answers import Detection, parse_detections, write_detections
from vlmenv.core.errors import ConfigError, DataError, ModelError
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.rollout import Observation
from vlmenv.envs.data.coco import filtered_instances
from vlmenv.envs.metrics.detection import nms_ap
from vlmenv.options.evaluate import EvalConfig
from vlmenv.options.fields import replaced

TAGS, SECTIONS = AnswerFormat.TAGS.write, AnswerFormat.SECTIONS.write


class Scripted(VLMAgent):
    """The built-in model with its answers replaced: by those whose keys occur in the prompts, or in order."""

    def script(self, answers: dict[str, str] | list[str]) -> Scripted:
        self.answers, self.asked = answers, list[str]()
        return self

    def act(self, observations: Sequence[Observation]) -> list[str]:
        prompts = [observation["prompt"] for observation in observations]
        self.asked += prompts
        if isinstance(self.answers, list):
            return [self.answers.pop(0) for _ in prompts]
        return [next((answer for key, answer in self.answers.items() if key in prompt), "") for prompt in prompts]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    agent = Scripted.from_pretrained("builtin").script({})
    monkeypatch.setattr(vlmenv.commands.suite, "load_agent", lambda *args: agent)
    return agent


def options(suite: str, data: Path, output: Path, **more: Any) -> EvalConfig:
    given = {"suite": suite, "suite_data": (data,), "output": output, "device": "cpu", "coordinates": "original"}
    return replaced(EvalConfig(), given | more)  # type: ignore[arg-type]


def picture(file: Path | None = None) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (100, 80), "white").save(stream, "PNG")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(stream.getvalue())
    return stream.getvalue()


def dump(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def parquet(file: Path, rows: list[dict[str, Any]], image: str) -> None:
    """A parquet file as the library `datasets` makes them, with images as encoded bytes."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    file.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_list(rows)
    features = Features({**data.features, image: ImageFeature()})
    assert Value("string") in features.values()
    data.cast(features).to_parquet(file)


def stored(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


# VLM-R1


def refcoco(data: Path) -> None:
    """rec_jsons_processed holds lists with `problem` and `solution`, and lines with `conversations`."""
    for i in range(3):
        picture(data / "coco" / "train2014" / f"COCO_train2014_{i}.jpg")
    images = [f"train2014/COCO_train2014_{i}.jpg" for i in range(3)]
    asks = "Please provide the bounding box coordinate of the region this sentence describes: {}."
    rows = [
        {"image": image, "problem": asks.format(f"thing {i}"), "solution": [10, 10, 50, 50], "normal_caption": f"{i}"}
        for i, image in enumerate(images)
    ]
    dump(data / "rec_jsons_processed" / "refcoco_val.json", rows)
    lines = [
        {
            "id": i,
            "image": image,
            "conversations": [
                {"from": "human", "value": "<image>" + asks.format(f"thing {i}")},
                {"from": "gpt", "value": "[10, 10, 50, 50]"},
            ],
        }
        for i, image in enumerate(images)
    ]
    (data / "rec_jsons_processed" / "refcocog_val.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_refcoco_in_both_of_its_layouts(tmp_path: Path, scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """Overlaps of 1, of 20/40 and of 10/40: two of three are at least 0.5."""
    refcoco(tmp_path / "data")
    boxes = {"thing 0": "[10,10,50,50]", "thing 1": "[10,10,30,50]", "thing 2": "[10,10,20,50]"}
    scripted.script({key: TAGS(box) for key, box in boxes.items()})
    run_suite(options("vlm_r1", tmp_path / "data", tmp_path / "out"))
    for name in ("refcoco_val", "refcocog_val"):
        metrics = stored(tmp_path / "out")[name]
        assert metrics["accuracy@0.5"]["value"] == pytest.approx(2 / 3)
        assert metrics["iou/mean"]["value"] == pytest.approx((1 + 0.5 + 0.25) / 3)
        lines = (tmp_path / "out" / name / "answers.jsonl").read_text().splitlines()
        assert [json.loads(line)["completion"] for line in lines] == [TAGS(box) for box in boxes.values()]
    shown = capsys.readouterr().out
    assert re.search(r"refcoco_val +│ accuracy@0.5 +│ 0.667 \(0.208 to 0.939\) +│ 0.0%", shown)
    assert "left out, as not there: refcocop_val (refcocop_val.jsonl)" in shown
    assert "lisa_test" in shown
    assert "huggingface.co/datasets/omlab/OVDEval" in shown.replace("\n", "")


def test_expressions_on_photos_are_all_found_by_their_truth(tmp_path: Path, scripted: Scripted) -> None:
    folder = shared("data/rec/refcocos")
    (tmp_path / "lisa").symlink_to(folder)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    (tmp_path / "lisa_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scripted.script({row["expression"]: TAGS(row["conversations"][1]["value"]) for row in rows})
    found = run_suite(options("vlm_r1", tmp_path, tmp_path / "out"))
    assert found["lisa_test"]["accuracy@0.5"].value == 1
    assert found["lisa_test"]["accuracy@0.5"].low == pytest.approx(19 / (19 + 1.959964**2))  # Wilson's of 19 in 19


def test_coco_without_the_categories_of_many_boxes() -> None:
    """Against pycocotools' own index."""
    file = shared("data/eval_reference/coco_val2014_100/instances_val2014_100.json")
    coco = COCO(file)
    for most in (10, 3):
        kept = filtered_instances(file, most)
        expected: dict[int, set[str]] = {}
        for image in coco.getImgIds():
            for category in coco.getCatIds():
                count = len(coco.getAnnIds(imgIds=image, catIds=category, iscrowd=None))
                if 0 < count <= most:
                    expected.setdefault(image, set()).add(coco.loadCats(category)[0]["name"])
        assert {image["id"]: set(image["text"]) for image in kept["images"]} == expected
        boxes = COCO()
        boxes.dataset = kept
        boxes.createIndex()
        for image, names in expected.items():
            for category in coco.getCatIds():
                whole, part = (len(one.getAnnIds(imgIds=image, catIds=category, iscrowd=None)) for one in (coco, boxes))
                assert part == (whole if coco.loadCats(category)[0]["name"] in names else 0)
    assert len(filtered_instances(file, 3)["images"]) < len(filtered_instances(file)["images"])


@pytest.mark.slow
def test_filtered_coco_asks_for_what_is_there_and_counts_by_pycocotools(tmp_path: Path, scripted: Scripted) -> None:
    folder = shared("data/ovd/tinycoco")
    content = json.loads((folder / "instances.json").read_text())
    dump(tmp_path / "coco" / "annotations" / "instances_val2017.json", content)
    (tmp_path / "coco" / "val2017").symlink_to(folder / "images")
    names = {one["id"]: one["name"] for one in content["categories"]}
    kept = filtered_instances(folder / "instances.json")
    answers = []
    for image in kept["images"]:
        own = [one for one in kept["annotations"] if one["image_id"] == image["id"] and not one["iscrowd"]]
        boxes = [(names[one["category_id"]], (x, y, x + w, y + h)) for one in own for x, y, w, h in [one["bbox"]]]
        truth = [Detection(*box) for box in boxes]
        answers.append(TAGS(write_detections(truth)))
    scripted.script(answers)
    metrics = run_suite(options("vlm_r1", tmp_path, tmp_path / "out"))["coco_filtered"]
    for image, prompt in zip(kept["images"], scripted.asked, strict=True):
        assert f": {', '.join(image['text'])}." in prompt
    assert metrics["recall@0.5"].value == 1
    assert metrics["precision@0.5"].value == 1
    assert metrics["AP"].value > 0.99  # whole numbers cost the smallest boxes a little
    scripted.script([TAGS("None")] * len(kept["images"]))
    assert run_suite(options("vlm_r1", tmp_path, tmp_path / "none"))["coco_filtered"]["AP"].value == 0


def ovdeval(data: Path, task: str) -> None:
    """Images with positive and hard negative labels of their own, category ids from 0."""
    for i in range(2):
        picture(data / "OVDEval" / "images" / task / f"{task}{i}.jpg")
    images = [
        {
            "file_name": f"{task}{i}.jpg",
            "id": i,
            "height": 80,
            "width": 100,
            "text": [f"{task} {i}"],
            "neg_text": ["no"],
        }
        for i in range(2)
    ]
    boxes = [{"id": i, "bbox": [10, 10, 40, 40], "category_id": i, "image_id": i, "iscrowd": 0} for i in range(2)]
    names = (f"{task} 0", f"{task} 1", "no")
    categories = [{"supercategory": "object", "id": i, "name": name} for i, name in enumerate(names)]
    content = {"categories": categories, "annotations": boxes, "images": images}
    dump(data / "OVDEval" / "annotations" / f"{task}.json", content)


@pytest.mark.slow
def test_ovdeval_by_nms_ap_and_its_mean(tmp_path: Path, scripted: Scripted) -> None:
    """A box that is given the hard negative label first is suppressed by it."""
    for task in ("color", "negation"):
        ovdeval(tmp_path, task)
    right, wrong = (f'{{"bbox_2d": [10, 10, 50, 50], "label": "{label}"}}' for label in ("negation 1", "no"))
    answers = {f"{task} {i}": f'[{{"bbox_2d": [10, 10, 50, 50], "label": "{task} {i}"}}]' for task, i in TASKS[:3]}
    answers["negation 1"] = f"[{wrong}, {right}]"
    scripted.script({key: TAGS(answer) for key, answer in answers.items()})
    found = run_suite(options("vlm_r1", tmp_path, tmp_path / "out"))
    parsed = [parse_detections(answers[f"negation {i}"]) or () for i in range(2)]
    truth = [(Detection(f"negation {i}", (10.0, 10.0, 50.0, 50.0)),) for i in range(2)]
    assert found["ovdeval_color"]["NMS-AP"].value == pytest.approx(1)
    assert found["ovdeval_negation"]["NMS-AP"].value == nms_ap(parsed, truth).value == pytest.approx(0.5)
    assert found["ovdeval_negation"]["AP"].value == pytest.approx(1)  # without suppression it pays
    assert stored(tmp_path / "out")["ovdeval, mean of 2"]["NMS-AP"]["value"] == pytest.approx(0.75)
    assert all(f"{task} {i}, no." in prompt for (task, i), prompt in zip(TASKS, scripted.asked, strict=True))


TASKS = [("color", 0), ("color", 1), ("negation", 0), ("negation", 1)]


def test_images_of_the_same_name_are_those_in_the_folder_of_the_annotations_name(tmp_path: Path) -> None:
    for task in ("color", "negation"):
        picture(tmp_path / "images" / task / "1.jpg")
        dump(tmp_path / "annotations" / f"{task}.json", {"images": [{"file_name": "1.jpg", "id": 1}]})
        entry = next(entry for entry in VLM_R1.entries if entry.name == f"ovdeval_{task}")
        found = Found(entry, (tmp_path / "annotations" / f"{task}.json",), tmp_path)
        assert image_root(found) == tmp_path / "images" / task


# PeBR-R1


def mathvista(data: Path) -> None:
    """Of 4 rows: a choice, an integer, a decimal, a text."""
    common = {"image": "images/1.jpg", "unit": None, "metadata": {"split": "testmini"}}
    rows = [
        {"question_type": "multi_choice", "answer_type": "text", "choices": ["145°", "140°"], "answer": "140°"},
        {"question_type": "free_form", "answer_type": "integer", "choices": None, "answer": "14"},
        {"question_type": "free_form", "answer_type": "float", "choices": None, "answer": "1.2", "precision": 1.0},
        {"question_type": "free_form", "answer_type": "text", "choices": None, "answer": "Paris"},
    ]
    for i, row in enumerate(rows):
        query = f"Hint: Please answer the question.\nQuestion: number {i}?"
        row |= common | {"pid": str(i + 1), "question": f"number {i}?", "query": query, "decoded_image": picture()}
        row["precision"] = row.get("precision")
    parquet(data / "MathVista" / "data" / "testmini-00000-of-00001-725687bf7a18d64b.parquet", rows, "decoded_image")


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (("B", "14", "1.2", "Paris"), 4),
        (("(B) 140°", "14.0", "1.24", "paris."), 4),
        (("140°", "14 cm", "1.15", "in Paris"), 3),
        (("140", "15", "1.26", "Rome"), 1),
        (("A", "13.9", "0", ""), 0),
    ],
)
def test_mathvista(answers: tuple[str, ...], right: int, tmp_path: Path, scripted: Scripted) -> None:
    mathvista(tmp_path)
    scripted.script({f"number {i}?": SECTIONS(answer) for i, answer in enumerate(answers)})
    found = run_suite(options("pebr_r1", tmp_path, tmp_path / "out"))
    assert found["mathvista"]["accuracy"].value == right / 4
    assert "### Image Description:" in scripted.asked[0]


def test_mathverse_tells_its_versions_apart(tmp_path: Path, scripted: Scripted) -> None:
    picture(tmp_path / "MathVerse" / "images" / "images_version_5" / "image_1.png")
    versions = ("Text Dominant", "Vision Only", "Vision Only")
    rows = [
        {
            "sample_index": str(i),
            "problem_index": "1",
            "problem_version": version,
            "question": "" if version == "Vision Only" else f"number {i}?",
            "image": "images_version_5/image_1.png",
            "answer": ("B", "2\\sqrt{3}", "x=3")[i],
            "question_type": "multi-choice" if i == 0 else "free-form",
            "metadata": {"subject": "Plane Geometry"},
            "query_wo": "…",
            "query_cot": f"Please first conduct reasoning.\nQuestion: number {i}?",
        }
        for i, version in enumerate(versions)
    ]
    dump(tmp_path / "MathVerse" / "testmini.json", rows)
    answers = ("B", "\\sqrt{12}", "4")
    scripted.script({f"number {i}?": SECTIONS(answer) for i, answer in enumerate(answers)})
    metrics = run_suite(options("pebr_r1", tmp_path, tmp_path / "out"))["mathverse"]
    found = {name: metric.value for name, metric in metrics.items() if name.startswith("accuracy")}
    expected = {"accuracy": 2 / 3, "accuracy/Text Dominant": 1, "accuracy/Vision Only": 0.5}
    assert found == pytest.approx(expected)


def test_math_vision_takes_a_letter_or_what_it_stands_for(tmp_path: Path, scripted: Scripted) -> None:
    rows = [
        {"options": ["3", "5", "7"], "answer": "C", "subject": "counting"},
        {"options": ["3", "5", "7"], "answer": "C", "subject": "counting"},
        {"options": ["A", "B"], "answer": "B", "subject": "algebra"},
        {"options": [], "answer": "\\frac{1}{2}", "subject": "algebra"},
    ]
    for i, row in enumerate(rows):
        picture(tmp_path / "MathVision" / "images" / f"{i}.jpg")
        row |= {"id": str(i), "question": f"number {i}?\n<image1>", "image": f"images/{i}.jpg", "level": 1}
    folder = tmp_path / "MathVision" / "data"
    folder.mkdir()
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scripted.script({f"number {i}?": SECTIONS(answer) for i, answer in enumerate(("C", "7", "A", "0.5"))})
    metrics = run_suite(options("pebr_r1", tmp_path, tmp_path / "out"))["math_vision"]
    assert metrics["accuracy"].value == 3 / 4
    assert metrics["accuracy/algebra"].value == 1 / 2
    assert "number 0?\nChoices:\n(A) 3\n(B) 5\n(C) 7" in scripted.asked[0]


def test_a_question_of_math_vision_may_be_the_image_alone(tmp_path: Path, scripted: Scripted) -> None:
    rows = [{"options": options, "answer": answer} for options, answer in (([], "5"), (["3", "5"], "B"))]
    for i, row in enumerate(rows):
        picture(tmp_path / "MathVision" / "images" / f"{i}.jpg")
        row |= {"id": str(i), "question": "<image1>", "image": f"images/{i}.jpg", "subject": "algebra", "level": 1}
    folder = tmp_path / "MathVision" / "data"
    folder.mkdir()
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scripted.script({"": SECTIONS("5")})
    assert run_suite(options("pebr_r1", tmp_path, tmp_path / "out"))["math_vision"]["accuracy"].value == 1
    assert "<image1>" not in "".join(scripted.asked)


def test_mmstar(tmp_path: Path, scripted: Scripted) -> None:
    rows = [
        {
            "index": i,
            "question": f"number {i}?\nOptions: A: one, B: two, C: three, D: four",
            "image": picture(),
            "answer": "ABD"[i],
            "category": ("math", "math", "logical reasoning")[i],
            "l2_category": "…",
            "meta_info": {"source": "MMMU", "split": "val", "image_path": "images/0.jpg"},
        }
        for i in range(3)
    ]
    parquet(tmp_path / "MMStar" / "mmstar.parquet", rows, "image")
    answers = {f"number {i}?": SECTIONS(answer) for i, answer in enumerate(("A", "C", "D: four"))}
    metrics = run_suite_with(scripted, answers, tmp_path)["mmstar"]
    assert metrics["accuracy"].value == pytest.approx(2 / 3)
    assert (metrics["accuracy/math"].value, metrics["accuracy/logical reasoning"].value) == (0.5, 1)


def run_suite_with(scripted: Scripted, answers: dict[str, str], folder: Path) -> Any:
    scripted.script(answers)
    return run_suite(options("pebr_r1", folder, folder / "out"))


def test_a_judge_says_what_it_thinks_besides_the_rules(
    tmp_path: Path, scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    """MathVista's own evaluation reads answers by a language model; "fourteen" is one that rules do not read."""
    mathvista(tmp_path)
    scripted.script({f"number {i}?": SECTIONS(answer) for i, answer in enumerate(("A", "fourteen", "1.2", "Paris"))})
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.reply = lambda turn, request: "no" if ": 140°" in request["messages"][0]["content"] else "yes"
        scorers = {"judge_url": server.url, "judge_model": "tester"}
        found = run_suite(options("pebr_r1", tmp_path, tmp_path / "out", **scorers))["mathvista"]
        with pytest.raises(ConfigError, match="judge_url does not go with vlm_r1"):
            run_suite(options("vlm_r1", tmp_path, tmp_path / "out", **scorers))
        server.shutdown()
    assert (found["accuracy"].value, found["judge"].value) == (2 / 4, 3 / 4)
    assert "judge" in capsys.readouterr().out
    assert any("B: 140°" in prompt for prompt in server.prompts())


def test_hallusion_bench_by_figure_and_by_pair_of_questions(tmp_path: Path, scripted: Scripted) -> None:
    """Two figures with two questions each, one of the four answers wrong: 3/4, one figure and one pair."""
    rows = [
        {
            "category": "VD",
            "subcategory": "illusion",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": str(figure),
            "question_id": str(question),
            "sample_note": "circle",
            "question": f"Figure {figure}, question {question}?",
            "gt_answer": str((figure + question) % 2),
            "gt_answer_details": "…",
            "filename": f"VD/illusion/0_{figure}.png",
            "image": picture(),
        }
        for figure in (1, 2)
        for question in (0, 1)
    ]
    parquet(tmp_path / "HallusionBench" / "data" / "image-00000-of-00001.parquet", rows, "image")
    words = ("No", "Yes")
    answers = {row["question"]: SECTIONS(words[int(row["gt_answer"])]) for row in rows}
    answers["Figure 2, question 1?"] = SECTIONS("No, it is not")
    metrics = run_suite_with(scripted, answers, tmp_path)["hallusion_bench"]
    assert metrics["accuracy"].value == 3 / 4
    assert metrics["accuracy/figure"].value == 1 / 2
    assert metrics["accuracy/question_pair"].value == 1 / 2


def test_groups_of_several_answers_each() -> None:
    """First answers and second answers make up groups of their own."""
    answers = [
        {"id": f"a/{question}", "index": question, "measures": {"accuracy": accuracy}}
        for question, accuracy in ((0, 1.0), (0, 1.0), (1, 1.0), (1, 0.0))
    ]
    assert all_right(answers, (0,)).value == 0.5


# What is there, and what was measured before


@pytest.mark.slow
def test_what_was_measured_is_not_measured_anew(tmp_path: Path, scripted: Scripted) -> None:
    refcoco(tmp_path / "data")
    config = options("vlm_r1", tmp_path / "data", tmp_path / "out")
    first = run_suite(config)
    assert len(scripted.asked) == 6
    (tmp_path / "out" / "refcocog_val" / "metrics.json").unlink()
    scripted.script({"thing": TAGS("[10,10,50,50]")})
    again = run_suite(config)
    assert len(scripted.asked) == 3
    assert again["refcoco_val"] == first["refcoco_val"]
    assert (first["refcocog_val"]["iou/mean"].value, again["refcocog_val"]["iou/mean"].value) == (0, 1)
    run_suite(config)
    assert len(scripted.asked) == 3
    with pytest.raises(ConfigError, match=r"out holds results with another eval_limit, see .*: give another --output"):
        run_suite(options("vlm_r1", tmp_path / "data", tmp_path / "out", eval_limit=2))


def test_measuring_goes_on_with_other_servers_and_from_another_folder(
    tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    refcoco(tmp_path / "data")
    (tmp_path / "model").symlink_to(find_model("builtin"))
    monkeypatch.chdir(tmp_path)
    first = run_suite(options("vlm_r1", tmp_path / "data", tmp_path / "out", model="model"))
    monkeypatch.chdir(tmp_path / "data")
    server: dict[str, Any] = {"engine": "vllm-server", "server": ("http://127.0.0.1:1",), "server_timeout": 5.0}
    more = {"model": str(tmp_path / "model"), "weights_folder": tmp_path} | server
    assert run_suite(options("vlm_r1", tmp_path / "data", tmp_path / "out", **more)) == first
    assert len(scripted.asked) == 6


def test_a_folder_in_which_nothing_was_measured_takes_other_options(tmp_path: Path, scripted: Scripted) -> None:
    refcoco(tmp_path / "data")
    with pytest.raises(ModelError, match="no such model folder"):
        run_suite(options("vlm_r1", tmp_path / "data", tmp_path / "out", model="./modle"))
    assert (tmp_path / "out" / "config.yaml").is_file()
    assert run_suite(options("vlm_r1", tmp_path / "data", tmp_path / "out"))


def test_an_empty_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "holds none of the data sets of pebr_r1"), ("nowhere", "no such folder")):
        with pytest.raises(SystemExit):
            main(
                ["eval", "--suite", "pebr_r1", "--suite-data", str(tmp_path / name), "--output", str(tmp_path / "out")]
            )
        captured = capsys.readouterr()
        assert message in captured.err.replace("\n", " ")
        assert captured.out.count("left out, as not there: ") == (5 if name == "empty" else 0)


def test_images_that_are_not_there_are_an_error(tmp_path: Path, scripted: Scripted) -> None:
    refcoco(tmp_path)
    (tmp_path / "coco").rename(tmp_path / "elsewhere")
    run_suite(options("vlm_r1", tmp_path, tmp_path / "out"))
    (tmp_path / "elsewhere" / "train2014").rename(tmp_path / "elsewhere" / "val2014")
    with pytest.raises(DataError, match=r"its first image, train2014/COCO_train2014_0\.jpg, is nowhere under"):
        run_suite(options("vlm_r1", tmp_path, tmp_path / "again"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output": None}, "a suite needs --suite-data"),
        ({"suite_data": None}, "a suite needs --suite-data"),
        ({"env": "VLM-VQA-v0"}, "env does not go with a suite"),
        ({"dataset": ("a.jsonl",)}, "dataset does not go with a suite"),
        ({"rewards": {"iou": 1.0}}, "rewards does not go with a suite"),
        ({"min_image_side": 28}, "min_image_side does not go with a suite"),
        ({"without_text": ("rethink",)}, "without_text does not go with a suite"),
        ({"clip_model": "a"}, "clip_model does not go with a suite"),
        ({"suite": None}, "data goes with a suite"),
    ],
)
def test_options_that_do_not_go_with_a_suite(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"suite": "vlm_r1", "suite_data": (tmp_path,), "output": tmp_path / "out"}
    with pytest.raises(ConfigError, match=message):
        run_suite(replaced(EvalConfig(), given | more))


def test_the_command_with_the_builtin_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refcoco(tmp_path / "data")
    args = ["eval", "--suite", "vlm_r1", "--suite-data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    main([*args, "--eval-limit", "2", "--max-new-tokens", "8", "--device", "cpu"])
    assert "refcocog_val" in capsys.readouterr().out
    assert set(stored(tmp_path / "out")) == {"refcoco_val", "refcocog_val"}


def test_a_data_set_that_fails_does_not_take_the_others_with_it(
    tmp_path: Path, scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    """One cannot be opened, which is told before anything is asked; the other's results are there."""
    refcoco(tmp_path / "data")
    (file,) = (tmp_path / "data").rglob("refcocog_val.json*")
    file.write_text("{broken\n")
    with pytest.raises(DataError, match=r"1 data sets could not be measured; .*refcocog_val: .*refcocog_val\.json"):
        run_suite(options("vlm_r1", tmp_path / "data", tmp_path / "out"))
    assert "refcocog_val cannot be measured" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()).keys() == {"refcoco_val"}


def test_the_split_that_was_measured_is_named() -> None:
    (entry,) = [one for one in SUITES["pebr_r1"].entries if one.name == "math_vision"]
    titles = [Found(entry, (Path(name),), Path()).title for name in ("testmini.jsonl", "test-00000-of-00001.parquet")]
    assert titles == ["math_vision (testmini)", "math_vision (test)"]

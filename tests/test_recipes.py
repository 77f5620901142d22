"""The published recipes: their values, and that each trains, on small data in the layout that it names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from small_data import COUNT, WITHOUT_HUB, lay_out

from vlmenv.cli import main

pytestmark = pytest.mark.usefixtures("without_pictures")

RECIPES = {file.stem: file for file in (ROOT / "vlmenv" / "recipes").glob("*.yaml")}
SMALL = "--model builtin --device cpu --max-new-tokens 8 --steps 2 --prompts-per-step 2 --eval-limit 2 --output run"
REC = {"group_size": 8, "beta": 0.04, "kl_estimator": "k3", "epsilon": 0.2, "lr": 1e-6, "temperature": 0.9}
REC |= {"epochs": 2, "precision": "bf16", "max_new_tokens": 2048}
STAGE = {"group_size": 8, "temperature": 1.2, "lr": 1e-6, "weight_decay": 0.01, "kl_estimator": "k3", "beta": 0.01}
EASYR1 = {"group_size": 5, "prompts_per_step": 512, "minibatches": 512 // 128, "epochs": 15, "temperature": 1.0}
EASYR1 |= {"lr": 1e-6, "weight_decay": 0.01, "kl_estimator": "k3", "beta": 0.01, "lr_schedule": "constant"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "geometry3k": EASYR1
    | {"max_new_tokens": 2048, "top_p": 0.99, "min_pixels": 2**18, "max_pixels": 2**22}
    | {"rewards": {"accuracy": 0.9, "format": 0.1}},
    "mm_eureka": {"group_size": 8, "prompts_per_step": 128, "minibatches": 128 * 8 // 128, "epochs": 10, "lr": 1e-6}
    | {"beta": 0, "temperature": 1.0, "max_new_tokens": 4096, "freeze_vision": True, "lr_schedule": "cosine"}
    | {"warmup_share": 0.03, "rewards": {"accuracy": 1.0, "format": 0.5}},
    "virl39k": {"group_size": 8, "prompts_per_step": 512, "minibatches": 512 * 8 // 512, "epochs": 3, "lr": 1e-6}
    | {"beta": 0, "temperature": 1.0, "top_p": 0.95, "min_pixels": 256 * 28 * 28, "max_pixels": 1280 * 28 * 28}
    | {"warmup_share": 0.03, "max_new_tokens": 2048, "rewards": {"accuracy": 1.0}},
    "multimodal_open_r1": {"group_size": 8, "prompts_per_step": 8, "epochs": 1, "max_pixels": 2359296, "lr": 1e-6}
    | {"beta": 0.04, "kl_estimator": "k3", "temperature": 1.0, "rewards": {"accuracy": 1.0, "format": 1.0}},
    "gui_r1": EASYR1 | {"max_new_tokens": 1024, "max_pixels": 1258291, "rewards": {"accuracy": 0.8, "format": 0.2}},
    "vision_reasoner": {"group_size": 8, "prompts_per_step": 16, "epochs": 1, "lr": 1e-6, "beta": 0.01}
    | {"rewards": {"boxes_points": 3.0, "format": 3.0, "non_repeat": 1.0}},
    "time_r1": {"group_size": 8, "prompts_per_step": 2, "epochs": 5, "max_new_tokens": 200, "temperature": 1.0}
    | {"lr": 1e-6, "beta": 0.04, "freeze_vision": True, "rewards": {"timed_iou": 1.0, "format": 1.0}},
    "r1v_clevr": {"group_size": 8, "prompts_per_step": 16, "epochs": 2, "max_pixels": 401408}
    | {"lr": 1e-6, "beta": 0.04, "temperature": 1.0, "rewards": {"accuracy": 1.0, "format": 1.0}},
    "vlm_r1_rec": REC,
    "vlm_r1_rec_lora": REC | {"lora_rank": 64, "lora_alpha": 128, "lora_dropout": 0.05, "lr": 1e-5},
    "vlm_r1_rec_frozen_vision": REC | {"freeze_vision": True},
    "vlm_r1_ovd": {k: v for k, v in REC.items() if k != "kl_estimator"}
    | {"beta": 0, "rewards": {"od_length": 1, "format": 1}},
    "vlm_r1_math": REC,
    "vlm_r1_gui": {k: v for k, v in REC.items() if k != "epochs"} | {"steps": 1200},
    "pebr_r1_warmup": {
        "algo": "sft",
        "freeze_vision": True,
        "freeze_projector": True,
        "lr": 1e-5,
        "lr_schedule": "cosine",
        "warmup_share": 0.1,
        "epochs": 2,
        "min_image_side": 28,
        "without_text": ["let me rethink it"],
    },
    "pebr_r1_sampling": {"n": 8, "temperature": 1.2, "top_p": 0.99, "weights": "bf16"},
    "pebr_r1_stage1": STAGE
    | {
        "prompts_per_step": 560,
        "minibatches": 560 // 112,
        "epochs": 1,
        "clip_model": "qihoo360/fg-clip-large",
        "rewards": {"clip": 0.4, "keywords": 0.4, "format": 0.1, "length": 0.1},
    },
    "pebr_r1_stage2": STAGE
    | {
        "prompts_per_step": 512,
        "minibatches": 512 // 128,
        "epochs": 2,
        "rewards": {"accuracy": 0.9, "format": 0.1},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_the_published_values(name: str) -> None:
    """Those of the publications and of their code, and says where from."""
    text = RECIPES[name].read_text(encoding="utf-8")
    options = yaml.safe_load(text)
    options |= options.pop(options.get("algo", ""), {})
    assert {key: options[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert not options.get("freeze_vision") or "freeze_vision" in PUBLISHED[name]
    head = text.partition("\n\n")[0]
    for what in ("Source", "Hardware", "Data", "Time"):
        assert f"\n# {what} " in head
    assert "estimate" in head


def test_the_page_has_each_recipe_with_its_task() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| \[`(\w+)`\]\(../vlmenv/recipes/(\w+).yaml\) \| `([\w-]+)` \|", page, flags=re.MULTILINE)
    tasks = {name: yaml.safe_load(file.read_text(encoding="utf-8"))["env"] for name, file in RECIPES.items()}
    assert {name: task for name, _, task in found} == tasks
    assert all(name == file for name, file, _ in found)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "pebr_r1_sampling"])
def test_a_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one command, in a folder where its data lie as it says."""
    monkeypatch.chdir(tmp_path)
    lay_out(name, tmp_path)
    groups = "--max-new-tokens 64" if name == "pebr_r1_warmup" else "--group-size 2"
    main(["train", "--recipe", name, *shlex.split(f"{SMALL} {groups} {WITHOUT_HUB.get(name, '')}")])
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    options = yaml.safe_load(Path("run/resolved.yaml").read_text())
    options |= options.pop(options["algo"], {})
    kept = {key: value for key, value in PUBLISHED[name].items() if f"--{key.replace('_', '-')} " not in SMALL}
    kept = {key: value for key, value in kept.items() if f"--{key.replace('_', '-')} " not in WITHOUT_HUB.get(name, "")}
    for key in kept.keys() - {"epochs", "warmup_share", "group_size", "rewards", "clip_model", "prompts_per_step"}:
        assert options[key] == PUBLISHED[name][key]
    assert {f"reward/{term}" for term in options["rewards"]} <= metrics[0].keys()
    assert (options["steps"], options["epochs"], options["warmup_share"]) == (2, None, None)


def test_referring_expressions_take_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With RefCOCO and COCO on disk: nothing but the recipe's name, and what makes it small enough for a test."""
    monkeypatch.chdir(tmp_path)
    lay_out("vlm_r1_rec", tmp_path)
    small = "--model builtin --device cpu --max-new-tokens 8 --group-size 2 --prompts-per-step 18 --output run"
    main(["train", "--recipe", "vlm_r1_rec", *small.split()])
    rollouts = [json.loads(line) for line in Path("run/rollouts.jsonl").read_text().splitlines()]
    assert len({row["index"] for row in rollouts}) == 3 * COUNT  # rows of all three files
    assert [row["step"] for row in rollouts] == [1] * 36 + [2] * 36  # two epochs
    assert {name for row in rollouts for name in row["rewards"]} == {"iou", "format"}
    assert "held-out samples" in capsys.readouterr().out  # refcoco_val.json


def test_the_warm_up_leaves_rows_out_and_imitates_the_reasoning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out("pebr_r1_warmup", tmp_path)
    small = "--model builtin --device cpu --prompts-per-step 2 --max-new-tokens 64 --output run"
    main(["train", "--recipe", "pebr_r1_warmup", *small.split()])
    out = " ".join(capsys.readouterr().out.split())
    assert f"1 of {COUNT} rows are left out: the answer says 'let me rethink it'" in out
    assert f"1 of {COUNT} rows are left out: an image is under 28 pixels wide or high" in out
    options = yaml.safe_load(Path("run/resolved.yaml").read_text())
    options |= options.pop(options["algo"], {})
    assert options["steps"] == 2 * (COUNT - 2) / 2
    assert options["warmup_steps"] == 0  # a tenth of 4, rounded
    rollouts = [json.loads(line) for line in Path("run/rollouts.jsonl").read_text().splitlines()]
    assert all("I look at it." in row["completion"] and row["rewards"]["accuracy"] == 1 for row in rollouts)
    assert not any("rethink" in row["completion"] for row in rollouts)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--epochs", "2"], "epochs are passes over a data set"),
        (["--epochs", "0"], "epochs must be above 0"),
        (["--epochs", "2", "--steps", "3"], "steps and epochs were both given"),
        (["--warmup-share", "1"], "from 0 to below 1"),
        (["--recipe", "vlm_r2_rec"], "unknown recipe 'vlm_r2_rec'. Did you mean 'vlm_r1_rec'?"),
        (["--recipe", "pebr_r1_sampling"], "unknown option 'n'"),
        (["--min-image-side", "28"], "are for a data set"),
    ],
)
def test_wrong_lengths_and_names_are_told(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "--eval-limit", "0", "--device", "cpu", *args])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_another_model_scores_descriptions_by_its_name(tmp_path: Path) -> None:
    """A folder in the layout of a published CLIP: a copy of the built-in one, which gives its scores."""
    copied = tmp_path / "another-clip"
    shutil.copytree(ROOT / "envs" / "rewards" / "builtin_clip", copied)
    small = "--env VLM-Caption-v0 --steps 1 --prompts-per-step 1 --group-size 2 --eval-limit 0 --device cpu"
    scores = []
    for name, model in {"a": [], "b": ["--clip-model", str(copied)]}.items():
        main(["train", *small.split(), "--rewards", "clip", "1", *model, "--output", str(tmp_path / name)])
        rows = [json.loads(line) for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]
        scores.append([row["rewards"]["clip"] for row in rows])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert max(scores[0]) > 0
    with pytest.raises(SystemExit):
        main(
            [
                "train",
                *small.split(),
                "--rewards",
                "clip",
                "1",
                "--clip-model",
                "./none",
                "--output",
                str(tmp_path / "c"),
            ]
        )

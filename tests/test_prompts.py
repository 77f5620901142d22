"""Images in their places, system prompts and template switches through whole commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from vlmenv.agents.families import weightless_family
from vlmenv.agents.vlm import find_model
from vlmenv.cli import main
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.sampling import Sampling
from vlmenv.doctor import examine
from vlmenv.envs.making import make_envs
from vlmenv.options.doctor import DoctorConfig
from vlmenv.options.task import DataOptions, PromptOptions
from vlmenv.showing import show_sample

pytestmark = pytest.mark.usefixtures("without_pictures")

SWITCH = "{%- if hint is defined -%}Hint {{ hint }}{%- endif -%}\n"
SYSTEM = "Answer in one word."
OPTIONS = ["--env", "VLM-VQA-v0", "--system-prompt", SYSTEM, "--chat-template-kwargs", "hint", "7"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    questions = ["Compare <image> with <image>.", "<image><image>Which is red?", "Is this red: <image> or <image>"]
    rows = [
        {"qid": str(i), "images": ["a.png", "b.png"], "problem": question, "answer": "yes"}
        for i, question in enumerate(questions)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The built-in model with a switch in its chat template."""
    folder = tmp_path / "model"
    shutil.copytree(find_model("builtin"), folder)
    text, asks = (folder / "chat_template.jinja").read_text(), "{%- if add_generation_prompt -%}"
    assert asks in text
    (folder / "chat_template.jinja").write_text(text.replace(asks, SWITCH + asks))
    return folder


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_they_reach_training_measuring_and_sampling_and_are_recorded(
    dataset: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats: list[str] = []
    family = type(weightless_family(model))
    written = family.chat
    monkeypatch.setattr(family, "chat", lambda self, shown: chats.append(written(self, shown)) or chats[-1])
    common = ["--model", str(model), "--dataset", str(dataset), "--device", "cpu", "--max-new-tokens", "4", *OPTIONS]
    small = ["--prompts-per-step", "3", "--group-size", "2", "--eval-limit", "3", "--steps", "1"]
    main(["train", *common, *small, "--output", str(tmp_path / "run")])
    shown = records(tmp_path / "run" / "rollouts.jsonl")
    assert all(row["turns"] == [{"role": "system", "text": SYSTEM}] for row in shown)
    assert sum("Compare <image> with <image>." in row["prompt"] for row in shown) == 2
    assert sum("<image>" in row["prompt"] for row in shown) == 4
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (options["system_prompt"], options["chat_template_kwargs"]) == (SYSTEM, {"hint": "7"})
    main(["eval", *common, "--output", str(tmp_path / "eval")])
    main(["sample", *common, "--n", "2", "--output", str(tmp_path / "sample")])
    asked = [chat for chat in chats if f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n" in chat]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert len(asked) >= 3 * 4
    assert all(chat.endswith("Hint 7<|im_start|>assistant\n") and chat.count(image) == 2 for chat in asked)
    assert sum(f"Compare {image} with {image}." in chat for chat in set(asked)) == len(set(asked)) / 3 == 1


@pytest.mark.slow
def test_the_doctor_reads_them_as_the_published_processor_does(dataset: Path, model: Path) -> None:
    config = DoctorConfig(
        device="cpu",
        env="VLM-VQA-v0",
        model=str(model),
        data=DataOptions(dataset=(str(dataset),)),
        prompts=PromptOptions(system_prompt=SYSTEM, chat_template_kwargs={"hint": "7"}),
        sampling=Sampling(max_new_tokens=8),
    )
    findings = {one.check: one for one in examine(config, torch.device("cpu"))}
    assert findings["prompt text"].passed
    assert findings["prompt images"].passed


def test_a_model_without_system_turns_is_refused_at_the_start(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = model / "chat_template.jinja"
    file.write_text(file.read_text().replace("in messages -%}", "in messages if message.role != 'system' -%}"))
    with pytest.raises(SystemExit):
        main(["train", "--model", str(model), "--dataset", str(dataset), "--output", str(tmp_path / "run"), *OPTIONS])
    assert "chat template has no system turn" in capsys.readouterr().err
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "value"), [("false", False), ("3", 3), ("low", "low"), ("'false'", "false"), ("null", None)]
)
def test_switches_are_read_as_yaml(text: str, value: Any) -> None:
    assert PromptOptions(chat_template_kwargs={"a": text}).template_switches() == {"a": value}


@pytest.mark.parametrize("text", ["[1]", "{a: 1}", "'", "a: 1"])
def test_switches_of_other_kinds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="chat_template_kwargs: the value of 'a' is no"):
        PromptOptions(chat_template_kwargs={"a": text})


def test_a_sample_is_shown_as_the_model_takes_it_in(dataset: Path, model: Path) -> None:
    task = make_envs("VLM-VQA-v0", 1, dataset=dataset, system_prompt=SYSTEM).task
    shown = show_sample(task, 0, weightless_family(model, {"hint": 7}))
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"Compare {image} with {image}." in shown.prompt.text
    assert shown.prompt.text.endswith("Hint 7<|im_start|>assistant\n")
    assert shown.prompt.image_tokens == (4, 4)
    assert task.parse(shown.answer) == "yes"
    assert shown.picture.shape == (320, 648, 3)
    with pytest.raises(ConfigError, match="there is no sample 3"):
        show_sample(task, 3, weightless_family(model))


def test_a_question_with_a_control_token_is_named(dataset: Path) -> None:
    row = {"qid": "bad", "images": ["a.png"], "problem": "Is <|image_pad|> red?", "answer": "yes"}
    dataset.write_text(json.dumps(row) + "\n")
    task = make_envs("VLM-VQA-v0", 1, dataset=dataset).task
    with pytest.raises(DataError, match=r"sample bad: the prompt's own text must not contain control tokens: <\|image"):
        show_sample(task, 0, weightless_family(find_model("builtin")))


def test_true_boxes_are_in_the_picture() -> None:
    task = make_envs("VLM-REC-v0", 1).task
    shown = show_sample(task, 5, weightless_family(find_model("builtin")))
    blue = torch.from_numpy(shown.picture.copy()).eq(torch.tensor([0, 114, 178])).all(dim=-1)
    assert blue.sum() > 50

"""Options of a run on several tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmenv.core.errors import ConfigError
from vlmenv.options.fields import replaced
from vlmenv.options.mixing import parts_of
from vlmenv.options.train import TrainConfig, default_config

SECTIONS = """
VLM-REC-v0:
  rewards: {iou: 1.0}
  dataset: [rec.jsonl]
  eval_dataset: held.jsonl
questions:
  env: VLM-VQA-v0
  system_prompt: Be brief.
"""


def mixed(*mix: str, **options: object) -> TrainConfig:
    return replaced(default_config(), {"mix": mix, "eval_limit": 7, **options})


def test_each_task_has_the_runs_options_and_those_of_its_section(tmp_path: Path) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(SECTIONS)
    config = mixed("VLM-REC-v0:2", "questions:0.5", "my_task:VLM-My-v0", mix_file=file, answer_format="tags")
    parts = parts_of(config)
    assert {name: one.weight for name, one in parts.items()} == {"VLM-REC-v0": 2, "questions": 0.5, "VLM-My-v0": 1}
    assert config.task_name == "VLM-REC-v0+questions+VLM-My-v0"
    boxes, questions, own = (one.config for one in parts.values())
    assert (boxes.env, questions.env, own.env) == ("VLM-REC-v0", "VLM-VQA-v0", "my_task:VLM-My-v0")
    assert (boxes.prompts.rewards, questions.prompts.rewards) == ({"iou": 1.0}, None)
    assert (boxes.data.dataset, boxes.measuring.eval_dataset) == (("rec.jsonl",), ("held.jsonl",))
    assert (questions.prompts.system_prompt, own.prompts.system_prompt) == ("Be brief.", None)
    assert {one.prompts.answer_format for one in (boxes, questions, own)} == {"tags"}
    assert {(one.measuring.eval_limit, one.mixing.mix) for one in (boxes, questions, own)} == {(7, None)}
    assert parts_of(default_config()) == {}


@pytest.mark.parametrize(
    ("mix", "section", "options", "message"),
    [
        (["VLM-REC-v0:0"], "", {}, "the weight of VLM-REC-v0 must be finite and above 0, not 0"),
        (["VLM-REC-v0:nan"], "", {}, "the weight of VLM-REC-v0 must be finite"),
        (["VLM-REC-v0", "VLM-REC-v0:2"], "", {}, "mix names VLM-REC-v0 twice"),
        (["a/b:2"], "", {}, "'a/b' is no name"),
        ([], "", {}, "mix names tasks, as in"),
        (["a:1"], "b: {env: c}", {}, "mix does not name b"),
        (["a:1"], "a: 3", {}, "mix.yaml: a: a section has options by name, not 3"),
        (["a:1"], "a: {lr: 1}", {}, "a: lr is an option of the whole run"),
        (["a:1"], "a: {chat_template_kwargs: {b: c}}", {}, "a: chat_template_kwargs is an option of the whole run"),
        (["a:1"], "a: {rewardz: {b: 1}}", {}, "a: unknown option 'rewardz'. Did you mean 'rewards'"),
        (["a:1"], "a: {rewards: 3}", {}, "mix.yaml: a: rewards must be"),
        (["a:1"], "a: {split: train}", {}, "go with dataset"),
        (["a:1"], "", {"env": "VLM-OVD-v0"}, "name it in mix, or leave mix out"),
        (["a:1"], "", {"epochs": 2}, "a mix has several: give steps"),
        (None, "a: {}", {}, "mix_file goes with mix"),
    ],
)
def test_faulty_mixes_are_told(
    mix: list[str] | None, section: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(section)
    given = {"mix": mix, **options, **({"mix_file": file} if section else {})}
    with pytest.raises(ConfigError) as told:
        replaced(default_config(), {name: value for name, value in given.items() if value is not None})
    assert message in str(told.value)

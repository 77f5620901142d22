"""Answers about one's own pictures, by the built-in model."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_cli import fails

from vlmenv.agents.vlm import VLMAgent
from vlmenv.cli import find_command, main
from vlmenv.commands.answer import Answer, PlainEnv
from vlmenv.core.answers import Detection
from vlmenv.core.rollout import Rollout, Turns
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.rendering import ANSWERED, TRUE

QUESTION = "Locate the blue shape."
PROMPT = RECEnv().prompt(QUESTION)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A built-in scene as a file of one's own, and its index in the built-in samples is 199."""
    Image.fromarray(RECEnv(split="eval").source.get(199).images[0]).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def answers(*args: object) -> list[Answer]:
    command, rest = find_command(["answer", *map(str, args), "--device", "cpu"])
    found: list[Answer] = command.run(command.parse(rest, "vlmenv answer"))
    return found


def test_an_answer_is_printed_drawn_and_written_beside(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = answers(scene, "--prompt", QUESTION)
    assert one.text in capsys.readouterr().out
    assert one.picture == scene.with_name("scene.png.answer.png")
    drawn = np.asarray(Image.open(one.picture))
    places = np.argwhere((drawn == ANSWERED).all(axis=-1))
    wanted = np.array(one.prediction)[[1, 0, 3, 2]] * 4  # the picture is four times as large
    assert np.abs([*places.min(0), *places.max(0)] - wanted).max() <= 4
    assert not (drawn == TRUE).all(axis=-1).any()  # there is no truth


def test_the_same_prompt_as_it_is_gets_the_same_answer(scene: Path, tmp_path: Path) -> None:
    (asked,) = answers(scene, "--prompt", QUESTION)
    (plain,) = answers(scene, "--prompt", PROMPT, "--plain", "--output", tmp_path / "out")
    assert plain.text == asked.text
    assert plain.picture == tmp_path / "out" / "scene.png.answer.png"
    assert plain.prediction[0] == asked.prediction


TWICE = """
from vlmenv.envs import Reply, register_task
from vlmenv.envs.rec import RECEnv


class TwiceEnv(RECEnv):
    max_turns = 2

    def respond(self, sample, texts):
        return Reply("Look again.", (sample.images[0][:16],)) if len(texts) == 1 else None


register_task("VLM-Twice-v0", "twice:TwiceEnv")
"""


def test_a_task_of_several_turns_is_played(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the task replies is answered too; the prediction is that of the last answer."""
    (tmp_path / "twice.py").write_text(TWICE)
    monkeypatch.chdir(tmp_path)
    told: list[Rollout] = []
    proceed = VLMAgent.proceed

    def noted(agent: VLMAgent, rollout: Rollout, observations: Turns, **how: Any) -> Rollout:
        told.extend([rollout, proceed(agent, rollout, observations, **how)])
        assert observations[0] is not None
        assert (observations[0]["prompt"], len(observations[0]["images"])) == ("<image>Look again.", 2)
        return told[-1]

    monkeypatch.setattr(VLMAgent, "proceed", noted)
    (one,) = answers(scene, "--prompt", QUESTION, "--env", "twice:VLM-Twice-v0")
    first, last = (rollout.texts[0] for rollout in told)
    assert one.text == last
    out = capsys.readouterr().out
    assert out.count(first) == (2 if first == last else 1)
    assert last in out


def test_a_run_is_asked_as_in_training(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{question} Answer as {answer} in {coordinates}, or {none}."
    options = ["--steps", "1", "--prompts-per-step", "1", "--group-size", "2", "--eval-limit", "0", "--device", "cpu"]
    main(["train", *options, "--prompt-template", template, "--output", str(tmp_path / "run")])
    capsys.readouterr()
    by_run = answers(scene, "--prompt", QUESTION, "--model", tmp_path / "run")
    assert "asked by the prompt of VLM-REC-v0 as in" in capsys.readouterr().out
    prompt = RECEnv(prompt_template=template).prompt(QUESTION)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    plain = answers(scene, "--prompt", prompt, "--model", checkpoint, "--plain")
    assert by_run[0].text == answers(scene, "--prompt", QUESTION, "--model", checkpoint)[0].text == plain[0].text


def test_prompts_are_asked_for_until_an_empty_one(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "Locate the triangle."
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{other}\n<image><image> which?\n\nnever read\n"))
    found = answers(scene, "--prompt", QUESTION, "--interactive")
    assert [one.picture and one.picture.name for one in found] == ["scene.png.answer.png", "scene.png.answer-2.png"]


def test_several_pictures_are_asked_about_one_by_one(scene: Path, tmp_path: Path) -> None:
    Image.open(scene).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b.png")
    both = answers(scene, tmp_path / "b.png", "--prompt", QUESTION)
    assert len(both) == 2
    assert both[0] == answers(scene, "--prompt", QUESTION)[0]
    assert both[1].prediction != both[0].prediction


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is at [1, 2, 30, 40].", (Detection("It is at", (1, 2, 30, 40)),)),
        ("[1, 2, 30, 40]", ((1, 2, 30, 40),)),
        ("<answer>[[1,2],[3,4]]</answer>", ((1, 2), (3, 4))),
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]\n```', (Detection("cat", (1, 2, 3, 4)),)),
        ("There is nothing there.", None),
        ("[1, 2, 3", None),
        ("[" * 200_000, None),
        ("", None),
    ],
)
def test_places_are_found_in_any_text(text: str, found: object, scene: Path) -> None:
    assert PlainEnv(dataset=[{"image": str(scene), "question": "?", "answer": "[1,2,3,4]"}]).parse(text) == found


def test_what_is_wrong_is_told_before_a_model_is_loaded(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    assert "name a picture" in fails(capsys, "answer", "--prompt", "a")
    assert "give --prompt" in fails(capsys, "answer", str(scene))
    assert "there is no image" in fails(capsys, "answer", "none.png", "--prompt", "a")
    assert "cannot be read as an image" in fails(capsys, "answer", str(tmp_path / "text.png"), "--prompt", "a")
    assert "is no folder" in fails(capsys, "answer", str(scene), "--prompt", "a", "--output", str(scene))
    twice = fails(capsys, "answer", str(scene), str(scene), "--prompt", "a", "--output", str(tmp_path / "o"))
    assert "several pictures have the name scene.png" in twice
    assert "2 marks" in fails(capsys, "answer", str(scene), "--prompt", "<image><image>a")

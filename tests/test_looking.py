"""A model that answers without looking is found out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from vlmenv.agents.vlm import VLMAgent
from vlmenv.cli import main
from vlmenv.core.errors import ConfigError
from vlmenv.options.evaluate import EvalConfig


def run(folder: Path, model: str, *more: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    options = ["--env", "VLM-REC-v0", "--eval-limit", "8", "--batch-size", "4", "--device", "cpu", "--model", model]
    main(["eval", *options, "--visual-dependence", "--output", str(folder), *more])
    return json.loads((folder / "visual_dependence.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_model_that_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "builtin")
    assert list(found) == ["looks", "as shown", "masked", "shuffled", "blank"]
    assert found["looks"]
    for name in ("masked", "shuffled", "blank"):
        assert found[name]["change"]["logprob"]["high"] < 0
        assert (tmp_path / name / "answers.jsonl").is_file()
        fall = found[name]["metrics"]["reward"]["value"] - found["as shown"]["metrics"]["reward"]["value"]
        assert found[name]["change"]["reward"]["value"] == pytest.approx(fall)
    assert "the model looks at its images" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_that_does_not_look(tmp_path: Path, builtin: VLMAgent, capsys: pytest.CaptureFixture[str]) -> None:
    """Its projectors give nothing of the image away, so all measurements are the same."""
    for projector in builtin.family.projectors():
        for parameter in projector.parameters():
            torch.nn.init.zeros_(parameter)
    builtin.publish(tmp_path / "blind")
    found = run(tmp_path / "found", str(tmp_path / "blind"), "--max-new-tokens", "12")
    assert not found["looks"]
    for name in ("masked", "shuffled", "blank"):
        assert found[name]["change"]["logprob"]["value"] == pytest.approx(0, abs=1e-5)
        assert found[name]["change"]["iou/mean"]["value"] == 0
    assert "nothing shows that the model looks" in capsys.readouterr().out


@pytest.mark.slow
def test_a_long_question_gets_no_image_that_leaves_no_room(tmp_path: Path, builtin: VLMAgent) -> None:
    """The first question fits with its own small image, and not with those of the others."""
    rng = np.random.default_rng(0)
    sides, rows = (56, 224, 56, 224), []
    for i, side in enumerate(sides):
        PIL.Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "How many?" + " word" * 660 * (i == 0), "answer": str(i)})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--env", "VLM-VQA-v0", "--dataset", str(tmp_path / "rows.jsonl"), "--image-root", str(tmp_path)]
    found = run(tmp_path / "found", "builtin", *data, "--max-new-tokens", "16", "--skip-broken")
    assert found["shuffled"]["change"]["logprob"]["value"] != 0
    answers = [json.loads(line) for line in (tmp_path / "found/shuffled/answers.jsonl").read_text().splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
    assert not (tmp_path / "found/skipped.json").exists()


def test_what_has_no_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="goes with visual_dependence"):
        EvalConfig(mask_share=0.3)
    with pytest.raises(ConfigError, match="leave out suite"):
        EvalConfig(visual_dependence=True, suite="vlm_r1")

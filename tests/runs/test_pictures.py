from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from vlmenv.envs.rec import RECEnv
from vlmenv.runs.pictures import _panels, _wrapped_end, chosen, draw_curve

DRAW = """
from pathlib import Path
from vlmenv.runs.pictures import draw_curve
draw_curve(Path("curve.png"), [{"reward/mean": 0.1, "reward/iou": 0.1}, {"reward/mean": 0.2, "reward/iou": 0.2}])
"""


def test_a_foreign_backend_hinders_no_picture(tmp_path: Path) -> None:
    """matplotlib itself fails to import with it."""
    environment = os.environ | {"MPLBACKEND": "module://nowhere", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", DRAW], cwd=tmp_path, env=environment, check=True, timeout=300)
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 200


def test_a_curve_has_a_panel_for_what_the_run_has(tmp_path: Path) -> None:
    """Of SFT the loss; of a run with evaluations the held-out metric too."""
    sft = [{"loss": 1.0 / step, "policy/entropy": 1.0, "lr": 1e-4} for step in range(1, 50)]
    assert [label for label, names in _panels(sft[0]) if set(names) & sft[0].keys()] == [
        "loss",
        "entropy, nats per token",
    ]
    draw_curve(tmp_path / "sft.png", sft, title="a $x^2 run")
    whole = {"reward/mean": 0.1, "reward/iou": 0.1, "reward/std": 0.1, "eval/map": 0.2, "policy/kl": 0.0}
    labels = dict(_panels(whole))
    assert labels["reward terms, unweighted"] == ["reward/iou"]
    assert labels["held-out map"] == ["eval/map"]
    with Image.open(tmp_path / "sft.png") as picture:
        assert min(picture.size) > 200


def answer(index: int, score: float, prediction: object = (1.0, 2.0, 3.0, 4.0)) -> dict[str, Any]:
    return {
        "index": index,
        "measures": {"iou/mean": score},
        "prediction": prediction,
        "completion": "",
        "target": "None",
    }


def test_fixed_broken_and_unreadable_answers_are_shown_first() -> None:
    scores = {0: (0.9, 0.9), 1: (0.1, 0.2), 2: (0.1, 0.9), 3: (0.9, 0.1), 4: (0.2, 0.9), 5: (0.3, 0.9)}
    before = [answer(index, was) for index, (was, _) in scores.items()] + [answer(6, 0.0), answer(8, 0.0)]
    after = [answer(index, now) for index, (_, now) in reversed(scores.items())] + [
        answer(6, 0.0, None),
        answer(7, 1.0),
    ]
    found = [(kind, first["index"], last["index"]) for kind, first, last in chosen(RECEnv(), before, after)]
    assert found == [
        ("fixed", 5, 5),
        ("fixed", 4, 4),
        ("broken", 3, 3),
        ("unreadable", 6, 6),
        ("fixed", 2, 2),
        ("still wrong", 1, 1),
        ("right both times", 0, 0),
    ]


def test_long_questions_show_their_end() -> None:
    text = "Please provide the bounding box coordinate of the region this sentence describes: the left red cup"
    shown = _wrapped_end(text, 26, 3)
    assert shown.startswith("…\n")
    assert " ".join(shown.split()).endswith("describes: the left red cup")
    assert all(len(line) <= 26 for line in shown.split("\n"))
    assert _wrapped_end("short", 26, 3) == "short"

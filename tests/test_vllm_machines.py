"""The real vLLM on a machine of its own, and two others that train."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machines as several
import pytest
from machines import TINY, Machines
from servers import serve

from vlmenv.cli import main

pytestmark = pytest.mark.vllm
machines = several.machines
"""a fixture"""
CHANGING = ["--steps", "3", "--lr", "3e-3", "--warmup-steps", "0", "--eval-limit", "5"]


@pytest.fixture(scope="module")
def url(machines: Machines) -> Iterator[str]:
    """The address that the server tells of itself."""
    everywhere = ["--engine-length", "512", "--host", "0.0.0.0"]
    with serve("builtin", *everywhere, port=8000, before=machines.on("gpu-box")) as served:
        url = "http://gpu-box:8000"
        assert f"--server {url}" in served.told()
        yield url


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("way", ["direct", "file"])
def test_what_two_machines_sample_on_a_third_is_what_they_learn_and_save(
    way: str, machines: Machines, url: str, tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    how = ["--engine", "vllm-server", "--server", url, "--weight-transfer", way]
    if way == "file":
        how += ["--weights-folder", str(tmp_path / "weights")]
    machines.train(*TINY, *CHANGING, *how, cwd=tmp_path)
    lines = rows(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert max(line["policy/sampler_kl"] for line in lines) < 1e-9
    after = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]
    model = str(tmp_path / "run" / "checkpoints" / "step-3")
    main(["eval", "--model", model, "--eval-limit", "5", "--device", "cpu", "--output", str(tmp_path / "eval")])
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == after

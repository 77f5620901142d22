"""Runs what the README shows: its Python in order, and its commands at a small size."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from vlmenv.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {
    "train": ["--steps", "1", "--prompts-per-step", "1", "--group-size", "2", "--eval-limit", "2", "--device", "cpu"],
    "eval": ["--limit", "2", "--device", "cpu"],
    "envs": [],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("vlmenv ")]


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    snippets = [block.replace("range(20)", "range(2)") for block in blocks("python")]
    assert len(snippets) >= 2
    for snippet in snippets:
        name = re.match(r"# (\w+)\.py", snippet)
        if name:
            (tmp_path / f"{name[1]}.py").write_text(snippet)
            importlib.import_module(name[1])
        else:
            exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize("command", commands())
def test_the_commands_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for block in blocks("python"):
        if name := re.match(r"# (\w+)\.py", block):
            (tmp_path / f"{name[1]}.py").write_text(block)
    Path("images").mkdir()
    Image.new("RGB", (64, 64), "red").save("images/1.png")
    turns = [{"from": "human", "value": "<image>Where is it?"}, {"from": "gpt", "value": "[1, 2, 30, 40]"}]
    Path("rec.jsonl").write_text(json.dumps({"id": 1, "image": "1.png", "conversations": turns}))
    args = shlex.split(command)[1:]
    args = ["builtin" if arg.startswith("Qwen/") else arg for arg in args]
    if "runs/first/checkpoints/step-120" in args:
        args[args.index("runs/first/checkpoints/step-120")] = "builtin"
    main([*args, *SMALL[args[0]]])
    expected = {"train": "model, metrics and pictures are in", "eval": "metric", "envs": "VLM-REC-v0"}
    assert expected[args[0]] in capsys.readouterr().out


def test_the_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        with Image.open(ROOT / picture) as image:
            assert min(image.size) > 200


def test_the_tree_names_what_is_there() -> None:
    """Every line of the annotated tree is a path in the repository."""
    (tree,) = blocks("text")
    stack: list[str] = []
    for line in tree.splitlines():
        name = line.split("  #")[0].rstrip()
        depth = (len(name) - len(name.lstrip())) // 2
        stack[depth:] = [name.strip().rstrip("/")]
        assert (ROOT / Path(*stack)).exists(), name

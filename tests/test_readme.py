"""Runs what the README shows: its Python in order, and its commands at a small size."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, launch
from huggingface_hub import HfApi
from PIL import Image
from servers import Served, free_port, serving
from small_data import SMALL, WITHOUT_HUB, lay_out, lay_out_pipeline, lay_out_rows, small_pipeline

from vlmenv.cli import main

pytestmark = pytest.mark.usefixtures("without_pictures")

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
DOCS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
FILE = re.compile(r"# (\w+)\.py\n")
"""How a block begins that is a file."""


def lay_out_modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the modules that the pages show into a folder to work in, as if none had been imported yet."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for page in DOCS.values():
        for block in blocks("python", page):
            if name := FILE.match(block):
                (folder / f"{name[1]}.py").write_text(block, encoding="utf-8")
                monkeypatch.delitem(sys.modules, name[1], raising=False)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(program: str) -> list[str]:
    pages = [block for page in DOCS.values() for block in blocks("bash", page)]
    lines = [line for block in pages for line in block.replace("\\\n", " ").splitlines()]
    shown = [" ".join(line.partition("#")[0].split()) for line in lines if line.startswith(f"{program} ")]
    return list(dict.fromkeys(shown))  # a command that several pages show runs once


AT_OTHER_ADDRESSES = re.compile(r" --socket | --tls-cert | unix:")
"""Commands at sockets and with certificates; `agents/test_vllm_addresses.py` starts such servers."""


def with_vllm(shown: str) -> Any:
    """A parameter whose test runs vLLM where that is what it shows."""
    return pytest.param(shown, marks=[pytest.mark.vllm] if "vllm" in shown or " serve" in shown else [])


def small(args: list[str]) -> list[str]:
    """A command's arguments with the built-in model in place of what would be downloaded or has to be trained first."""
    large = ("Qwen/", "runs/first", "runs/mine")
    return [
        "builtin" if arg.startswith(large) and before in ("--model", "--published") else arg
        for before, arg in zip(["", *args], args, strict=False)
    ]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Served]]:
    """The servers that the pages start, each by the port that is shown for it, at other ports."""
    every = [command for command in commands("vlmenv") if re.match(r"vlmenv serve( |$)", command)]
    shown = [small(shlex.split(command)[2:]) for command in every if not AT_OTHER_ADDRESSES.search(command)]
    with ExitStack() as opened:
        started = {}
        for args in shown:
            args, port = (args, "8000") if "--port" not in args else (args[: args.index("--port")], args[-1])
            started[port] = opened.enter_context(serving(free_port(), *args))
        for server in started.values():
            server.wait_until_ready()
        yield started


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Puts the addresses of servers that are there into what is shown; without any where it shows none."""

    def put(shown: str) -> str:
        ports = set(re.findall(r"http://127\.0\.0\.1:(\d+)", shown))
        served = request.getfixturevalue("servers") if ports else {}
        return re.sub(r"http://127\.0\.0\.1:(\d+)", lambda found: served[found[1]].url, shown)

    return put


@pytest.mark.slow
@pytest.mark.parametrize("page", [with_vllm(page) for page in DOCS if blocks("python", DOCS[page])])
def test_the_python_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[[str], str]
) -> None:
    lay_out_modules(tmp_path, monkeypatch)
    lay_out_rows(tmp_path)
    snippets = [block.replace("range(20)", "range(2)") for block in blocks("python", DOCS[page])]
    assert snippets
    for snippet in snippets:
        if name := FILE.match(snippet):
            importlib.import_module(name[1])
        else:
            exec(compile(place(snippet), page, "exec"), {})


def test_the_example_of_a_task_is_the_file() -> None:
    (shown,) = [block for block in blocks("python") if block.startswith("# new_task.py")]
    file = (ROOT / "examples" / "new_task.py").read_text(encoding="utf-8")
    assert file.endswith(shown.removeprefix("# new_task.py\n"))
    assert len(file.splitlines()) < 80


def of_recipe(name: str, folder: Path) -> list[str]:
    """Lays out what a recipe reads; the options that make it small, and do without the Hugging Face hub."""
    lay_out(name, folder)
    warmup = name == "pebr_r1_warmup"  # which imitates whole answers
    small = ["--model", "builtin", "--max-new-tokens", "96" if warmup else "8"]
    return [*small, *(["--group-size", "1"] if warmup else []), *shlex.split(WITHOUT_HUB.get(name, ""))]


SERVERS = re.compile(r" serve| --serve")
SHOWN = dict.fromkeys(commands("vlmenv"))  # each once, however often the pages show it
COMMANDS = [one for one in SHOWN if not SERVERS.search(one) and not AT_OTHER_ADDRESSES.search(one)]


@pytest.mark.parametrize("command", [with_vllm(one) for one in COMMANDS])
def test_the_commands_run(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: Callable[[str], str],
) -> None:
    lay_out_modules(tmp_path, monkeypatch)
    lay_out_rows(tmp_path)
    args = small(shlex.split(place(command))[1:])
    if "--resume" in args:
        main(["train", *SMALL["train"], "--output", "runs/first"])
        (Path("runs/first/evaluation.json")).unlink()
        main(args)
    elif args[0] == "export":
        monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: "https://huggingface.co/me/my-model")
        monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: None)
        main(["train", *SMALL["train"], "--output", args[1], *(["--lora-rank", "2"] if "lora" in args[1] else [])])
        main(["1" if before == "--step" else arg for before, arg in zip(["", *args], args, strict=False)])
    elif args[0] in ("report", "answer"):
        for run in {"/".join(arg.split("/")[:2]) for arg in args if arg.startswith("runs/")}:
            main(["train", *SMALL["train"], "--output", run])
        main(args)
    elif "--recipe" in args:
        main([*args, *SMALL[args[0]], *of_recipe(args[args.index("--recipe") + 1], tmp_path)])
    elif args[0] == "pipeline":
        lay_out_pipeline(tmp_path)
        main([args[0], str(small_pipeline(args[1], tmp_path)), *args[2:], *SMALL[args[0]]])
    else:
        sizes = SMALL[args[0]]
        main([*args, *(sizes[:4] + sizes[6:] if "--group-size" in args else sizes)])
    expected = {
        "train": "model, metrics and pictures are in",
        "eval": "metric",
        "doctor": "room for tensors" if "--card" in args else "everything adds up",
        "sample": "medium",
        "pipeline": "the stages and this table are in",
        "data": {"show": "sample 0", "export": "rows are in", "convert": "rows with"}.get("".join(args[1:2]), "good"),
        "envs": "VLM-REC-v0",
        "recipes": "vlm_r1_rec",
        "export": "holds",
        "report": "open it in a browser",
        "answer": "asked by the prompt of VLM-REC-v0",
    }
    assert expected[args[0]] in capsys.readouterr().out


@pytest.mark.vllm
def test_the_servers_say_what_to_type(servers: dict[str, Served]) -> None:
    """They are started by the pages' own commands."""
    assert len(servers) >= 2
    for server in servers.values():
        assert f"vlmenv train --engine vllm-server --server {server.url}\n" in server.told()


ON_ONE_MACHINE = [one for one in dict.fromkeys(commands("accelerate launch")) if "--num_machines" not in one]
"""`test_machines.py` launches on several."""


@pytest.mark.parametrize("command", [with_vllm(one) for one in ON_ONE_MACHINE])
def test_the_commands_run_in_two_processes(command: str, tmp_path: Path) -> None:
    launched = re.fullmatch(r"--config_file examples/accelerate/(\w+).yaml --num_processes \d (.*)", command[18:])
    assert launched
    options = [
        "--prompts-per-step",
        "2",
        "--group-size",
        "2",
        "--eval-limit",
        "2",
        "--device",
        "cpu",
        "--output",
        "run",
    ]
    if recipe := re.search(r"--recipe (\w+)", command):
        options += of_recipe(recipe[1], tmp_path)
    done = launch(launched[1], *small(shlex.split(launched[2])), "--steps", "2", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model, metrics and pictures are in" in done.stdout
    assert len((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()) == 2 * 2 * 2
    for name in ("evaluation.json", "curve.png", "checkpoints/step-2/model.safetensors"):
        assert (tmp_path / "run" / name).is_file()


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
        names = line.split("  #")[0].rstrip()
        depth = (len(names) - len(names.lstrip())) // 2
        for name in names.strip().split(", "):
            stack[depth:] = [name.rstrip("/")]
            assert (ROOT / Path(*stack)).exists(), name

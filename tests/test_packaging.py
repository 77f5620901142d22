from __future__ import annotations

import configparser
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from conftest import ROOT

from vlmenv import compat
from vlmenv.agents.vlm import find_model
from vlmenv.core.names import SHIPPED


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_listed() -> None:
    """One that is missing here would be missing from the wheel, and from nothing else."""
    listed = set(setup_cfg()["options"]["packages"].split())
    homes = {"vlmenv": "vlmenv", "agents": "vlmenv.agents", "algos": "vlmenv.algos", "envs": "vlmenv.envs"}
    found = set()
    for folder, package in homes.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.relative_to(ROOT / folder).parent.parts
            if not (folder == "vlmenv" and parts and parts[0] in homes):
                found.add(".".join((package, *parts)))
    assert listed == found


def test_every_recipe_is_in_the_wheel() -> None:
    patterns = setup_cfg()["options.package_data"]["vlmenv"].replace(",", " ").split()
    shipped = {file for pattern in patterns for file in (ROOT / "vlmenv").glob(pattern)}
    found = {file for folder in ("recipes", "pipelines") for file in (ROOT / "vlmenv" / folder).iterdir()}
    assert found
    assert found <= shipped


def can_build() -> bool:
    """Whether a distribution can be built here, without an environment of its own."""
    try:
        return importlib.util.find_spec("build") is not None and int(version("setuptools").partition(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason='needs the extra "dev", for build and a new setuptools')
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout, whose files are compared")
def test_the_sdist_has_every_file(tmp_path: Path) -> None:
    """Also those of tests, their helpers among them; all but the links to packages, which setup.cfg names."""
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = tmp_path.iterdir()
    with tarfile.open(file) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    tracked = [name for name in listed.splitlines() if not (ROOT / name).is_symlink()]
    assert len(tracked) > 500
    assert set(tracked) <= packed


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason='needs the extra "dev", for build and a new setuptools')
def test_a_release_links_to_the_repository(tmp_path: Path) -> None:
    """On the package page no link leads to a file beside the page."""
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "vlmenv/__init__.py"):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    for home in ("agents", "algos", "envs", "vlmenv"):
        shutil.copytree(ROOT / home, tmp_path / "copy" / home, symlinks=True, dirs_exist_ok=True)
    runpy.run_path(str(ROOT / ".ci" / "release.py"))["link"](tmp_path / "copy", "https://github.com/some/fork")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*command, str(tmp_path / "copy")], check=True, capture_output=True)
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        told = message_from_bytes(wheel.read(name))
    urls = dict(url.split(", ") for url in told.get_all("Project-URL") or [])
    assert set(urls) == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith("https://github.com/some/fork") for url in urls.values())
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", str(told.get_payload()))
    assert len(links) > 30
    assert not [link for _, link in links if not link.startswith(("https://", "#"))]
    (version,) = {told["Version"]}
    assert next(link for image, link in links if image).startswith(
        f"https://github.com/some/fork/raw/v{version}/docs/images"
    )
    for link in (link.partition("#")[0] for _, link in links if "/some/fork/" in link):
        assert (ROOT / link.partition(f"/v{version}/")[2]).is_file()


@pytest.mark.parametrize("address", ["github.com/some/fork", "https://github.com", "http://github.com/some/fork"])
def test_a_release_needs_an_address(address: str) -> None:
    done = subprocess.run([sys.executable, ROOT / ".ci" / "release.py", address], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is no address of a repository" in done.stderr


def test_other_systems_are_refused_by_name() -> None:
    """Before anything else is imported, which would fail with less clear words."""
    code = "import os, platform; os.name, platform.system = 'nt', lambda: 'Windows'; import vlmenv"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: vlmenv runs on Linux")
    assert done.stderr.rstrip().endswith("not on Windows: on Windows, use it in WSL")


def test_importing_is_light() -> None:
    """Environments can be used under another trainer, without the weight of ours."""
    heavy = ("torch", "transformers", "vllm", "accelerate", "matplotlib")
    code = (
        "import sys, vlmenv, gymnasium; env = gymnasium.make('VLM-REC-v0'); env.reset(seed=0); env.step('hello');"
        "gymnasium.make_vec('VLM-REC-v0', num_envs=2).reset(seed=0);"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path("/"))
    assert done.stdout.strip() == "[]"


def pins_of(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}


def test_the_constraints_of_gpu_machines_satisfy_the_requirements_and_vllms() -> None:
    from packaging.requirements import Requirement

    pins, options = pins_of("constraints-gpu.txt"), setup_cfg()
    lines = options["options"]["install_requires"].split("\n") + options["options.extras_require"]["vllm"].split("\n")
    wanted = {found.name.lower(): found.specifier for found in map(Requirement, filter(None, lines))}
    assert pins.keys() <= wanted.keys()
    assert all(wanted[name].contains(version) for name, version in pins.items())
    # what vLLM 0.33 requires, by its metadata
    assert (pins["vllm"], pins["torch"]) == ("0.33.0", "2.14.0")
    assert Requirement("transformers>=5.16.1,<5.21").specifier.contains(pins["transformers"])


def test_the_constraints_satisfy_the_requirements() -> None:
    from packaging.requirements import Requirement

    pins = pins_of("constraints.txt")
    options = setup_cfg()
    lines = options["options"]["install_requires"].split("\n") + options["options.extras_require"]["test"].split("\n")
    for requirement in (Requirement(line) for line in lines if line):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_libraries_whose_private_parts_are_used_have_upper_bounds() -> None:
    """And the schedule tries what is beyond. Torchvision is no requirement: vlmenv mends what others installed."""
    from packaging.requirements import Requirement

    options = setup_cfg()
    lines = "\n".join([options["options"]["install_requires"], *options["options.extras_require"].values()])
    bounds: dict[str, list[bool]] = {}
    for found in (Requirement(line) for line in lines.splitlines() if line):
        bounds.setdefault(found.name, []).append(any(one.operator in ("<", "==") for one in found.specifier))
    modules = {file.stem for file in (ROOT / "vlmenv" / "compat").glob("[!_]*.py")} - {"torchvision"}
    assert modules == set(compat.MODULES.values())
    bounded = {*modules, "math-verify", "bitsandbytes"}
    for name in bounded:
        assert all(bounds[name]), name
    (newest,) = re.findall(r'^libraries="(.+)"$', (ROOT / ".ci" / "newest").read_text(), re.MULTILINE)
    assert set(newest.split()) == bounded - {"vllm"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_small(name: str) -> None:
    files = list(find_model(name).iterdir())
    assert {file.name for file in files} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    }
    assert sum(file.stat().st_size for file in files) < 5 * 2**20

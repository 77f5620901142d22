"""What starting takes: counted in modules, not in seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "accelerate", "datasets", "matplotlib")


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["envs"], ["recipes"], ["data", "check", "--help"], ["data", "convert", "--help"]],
)
def test_commands_that_need_no_model_load_none(arguments: list[str]) -> None:
    code = f"""
import sys
from vlmenv.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
print("loaded", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded []\n")


def test_help_into_a_closed_pipe_ends_in_silence() -> None:
    command = f"{sys.executable} -m vlmenv --help | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.startswith("usage: vlmenv")
    assert done.stderr == ""


def test_the_version_is_the_packages() -> None:
    import vlmenv

    done = subprocess.run([sys.executable, "-m", "vlmenv", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"vlmenv {vlmenv.__version__}\n"

"""What starting takes: counted in modules, not in seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "accelerate", "datasets", "matplotlib")


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["envs"], ["recipes"], ["data", "check", "--help"], ["data", "convert", "--help"]],
)
def test_commands_that_need_no_model_load_none(arguments: list[str]) -> None:
    code = f"""
import sys
from pathlib import Path
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


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_stream_that_was_closed_at_the_start_ends_nothing(closed: str, tmp_path: Path) -> None:
    """Nor is what goes there written into a file that has been opened since."""
    code = (
        "import sys; from vlmenv.cli import main\n"
        "with open('kept', 'w') as stream: main(['recipes']); stream.write('whole')\n"
    )
    command = f'exec "{sys.executable}" -c "$0" {closed}'
    done = subprocess.run(["bash", "-c", command, code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kept").read_text() == "whole"
    assert "Traceback" not in done.stderr

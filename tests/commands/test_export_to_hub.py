"""`vlmenv export --hub` by the hub's own client, to a hub on this machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import Hub, Repository, hub

from vlmenv.agents.vlm import VLMAgent
from vlmenv.cli import main

pytestmark = pytest.mark.slow

TOKEN = "of-me"
WAYS = {"lfs": "1", "xet": "0"}


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub({TOKEN: "me"}) as made:
        yield made


@pytest.fixture
def connected(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Lets this process's client speak to the hub; by LFS, unless a test says otherwise."""
    for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    return server


def call(server: Hub, home: Path, way: str, *command: str) -> str:
    """What a process prints whose client speaks to the hub."""
    settings = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    own = {"HF_HUB_DISABLE_XET": WAYS[way], "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | settings | own, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fails(capsys: pytest.CaptureFixture[str], out: Path, name: str) -> str:
    """The message of an upload that fails after the export."""
    with pytest.raises(SystemExit):
        main(["export", "builtin", str(out), "--hub", name])
    told = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in told
    assert f"{out} is written, but the upload to {name} failed" in told
    assert f"hf upload {name} {out} . --private" in told
    VLMAgent.from_pretrained(out)
    return told


@pytest.mark.parametrize("way", WAYS)
def test_what_is_uploaded_is_the_folder_and_loads_from_there(way: str, server: Hub, tmp_path: Path) -> None:
    """By LFS, and by Xet, which is the client's default."""
    out = tmp_path / "out"
    told = call(server, tmp_path / "home", way, "-m", "vlmenv", "export", "builtin", str(out), "--hub", "me/model")
    assert f"uploaded to {server.url}/me/model" in told
    made = server.repositories["me/model"]
    assert made.private
    assert made.files == contents(out)
    assert yaml.safe_load(made.files["README.md"].decode().split("---")[1])["library_name"] == "transformers"
    assert [asked for asked in server.asked if asked.startswith("PUT /large/")] or way == "xet"
    load = "from vlmenv.agents.vlm import VLMAgent; print(VLMAgent.from_pretrained('me/model').folder)"
    folder = Path(call(server, tmp_path / "other home", way, "-c", load).strip())
    assert folder.is_relative_to(tmp_path / "other home")
    assert contents(folder) == contents(out)


def test_an_earlier_uploads_weights_are_not_left_beside_the_new_ones(connected: Hub, tmp_path: Path) -> None:
    """Who loads the model would take adapters or parts of another model for its own."""
    earlier = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json"]
    kept = {"picture.png": b"a picture", ".gitattributes": b"*.safetensors"}
    connected.repositories["me/model"] = Repository(False, kept | dict.fromkeys(earlier, b"old"))
    main(["export", "builtin", str(tmp_path / "out"), "--hub", "me/model"])
    assert connected.repositories["me/model"].files == contents(tmp_path / "out") | kept


def test_adapters_of_a_model_that_others_do_not_have(
    connected: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    agent = VLMAgent.from_pretrained("builtin")
    agent.save(base)
    for folder, others_have_it in ((base, False), ("builtin", True)):
        agent = VLMAgent.from_pretrained(folder)
        agent.add_lora(rank=2, alpha=2)
        agent.save(adapters / str(others_have_it))
        name = f"me/{others_have_it}"
        main(["export", str(adapters / str(others_have_it)), str(tmp_path / name), "--hub", name])
        assert (f"base model is {base}, which others do not have" in capsys.readouterr().out) != others_have_it
        assert connected.repositories[name].files == contents(tmp_path / name)


@pytest.mark.parametrize("token", ["", "of-nobody"])
def test_without_a_token(
    token: str, connected: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    told = fails(capsys, tmp_path / "out", "me/model")
    assert "401" in told
    assert "Log in by `hf auth login`, or set HF_TOKEN" in told
    assert not connected.repositories


@pytest.mark.parametrize("is_there", [True, False])
def test_a_name_of_somebody_else(
    is_there: bool, connected: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = {"README.md": b"theirs"}
    connected.repositories |= {"you/model": Repository(False, dict(theirs))} if is_there else {}
    told = fails(capsys, tmp_path / "out", "you/model")
    assert "403" in told
    assert "Name a repository of your own, or take a token that may write to you/model" in told
    assert {name: one.files for name, one in connected.repositories.items()} == (
        {"you/model": theirs} if is_there else {}
    )


@pytest.mark.parametrize(("way", "place"), [("lfs", "/large/"), ("xet", "/v1/"), ("lfs", "/commit/")])
def test_a_connection_that_ends_midway(
    way: str,
    place: str,
    connected: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The client tries again, for half a minute by LFS and for minutes by Xet, which is told to do so once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", way == "lfs")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    connected.breaks_at = place
    told = fails(capsys, tmp_path / "out", "me/model")
    assert "Check the connection, then upload it by" in told
    assert connected.repositories["me/model"].files == {}
    connected.breaks_at, connected.broken = "never", False
    named = shlex.split(told[told.index("hf upload") :])
    call(connected, tmp_path / "home", way, str(Path(sys.executable).parent / "hf"), *named[1:])
    assert connected.repositories["me/model"].files == contents(tmp_path / "out")

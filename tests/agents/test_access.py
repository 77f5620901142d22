"""Where the token of servers comes from, and who can read it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vlmenv.agents.engines.access import VARIABLE, open_own, server_token, server_token_or_new, token_file
from vlmenv.core.errors import ConfigError


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_the_first_server_writes_it_and_all_others_read_it(state: Path) -> None:
    with pytest.raises(ConfigError, match=f"no token for servers: set {VARIABLE} to the content of {state}"):
        server_token()
    former = os.umask(0)
    try:
        token = server_token_or_new()
    finally:
        os.umask(former)
    assert len(token) >= 40
    assert server_token_or_new() == server_token() == token
    file = token_file()
    assert file == state / "vlmenv" / "server-token"
    assert [stat.S_IMODE(one.stat().st_mode) for one in (file, file.parent)] == [0o600, 0o700]
    assert list(file.parent.iterdir()) == [file]
    file.unlink()
    assert server_token_or_new() != token


def test_without_another_folder_it_is_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_file() == tmp_path / ".local" / "state" / "vlmenv" / "server-token"


def test_that_of_the_environment_goes_first_and_is_not_written(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server_token_or_new()
    token_file().unlink()
    monkeypatch.setenv(VARIABLE, "sixteen-letters!")
    assert server_token() == server_token_or_new() == "sixteen-letters!"
    assert not token_file().exists()


@pytest.mark.parametrize(
    "token", ["", "fifteen-letters", "one two three four", "öööööööööööööööö", "a" * 20 + "\r\nX-A: b"]
)
def test_what_is_no_token_is_refused(token: str, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, token)
    for ask in (server_token, server_token_or_new):
        with pytest.raises(ConfigError, match=f"{VARIABLE} holds no token: .*16 printable characters"):
            ask()


def test_a_file_that_others_can_read_is_refused(state: Path) -> None:
    server_token_or_new()
    token_file().chmod(0o640)
    with pytest.raises(ConfigError, match=f"{token_file()} is not private .*remove it"):
        server_token()


def test_a_link_is_refused(state: Path, tmp_path: Path) -> None:
    server_token_or_new()
    token_file().rename(tmp_path / "elsewhere")
    token_file().symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is not private"):
        server_token_or_new()


def test_two_that_write_it_at_once_have_the_same(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds none, and there is one when it has written its own."""
    first = server_token_or_new()
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert server_token_or_new() == first
    assert list(token_file().parent.iterdir()) == [token_file()]


def test_a_home_that_cannot_be_written_is_told(state: Path) -> None:
    state.write_text("a file")
    with pytest.raises(ConfigError, match=f"cannot be written .*set {VARIABLE} to a secret"):
        server_token_or_new()


def test_only_own_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    file.write_bytes(b"content")
    link.symlink_to(file)
    os.mkfifo(pipe)
    with open_own(file) as stream:
        assert stream.read() == b"content"
    with pytest.raises(PermissionError, match="is a link"):
        open_own(link)
    for other in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(PermissionError, match="not a regular file of this account"):
            open_own(other)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="not a regular file of this account"):
        open_own(file)

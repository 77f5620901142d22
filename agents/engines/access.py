"""The token: the secret that servers (`vlmenv serve`, `vlmenv serve-env`) and their users share.

It is the value of VLMENV_SERVER_TOKEN. Without that variable it is in a file that only its account can read. The
first server of an account writes it, with a random token.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from io import BufferedReader
from pathlib import Path
from typing import Final

from vlmenv.core.errors import ConfigError

VARIABLE: Final = "VLMENV_SERVER_TOKEN"
"""Environment variable of the token."""
_FORM: Final = re.compile(r"[!-~]{16,}")
"""At least 16 printable characters, as a header can hold them."""
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def token_file() -> Path:
    """The account's file of its token: `vlmenv/server-token` in the folder for state, by default `~/.local/state`."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "vlmenv" / "server-token"


def server_token() -> str:
    """The token of the environment, else of the account's file.

    Raises:
        ConfigError: There is none, it is malformed, or others can read the file.
    """
    if (given := os.environ.get(VARIABLE)) is not None:
        return _checked(given, VARIABLE)
    try:
        return _read(token_file())
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no token for servers: set {VARIABLE} to the content of {token_file()} on the server's machine"
        ) from error


def server_token_or_new() -> str:
    """As `server_token`, but writes the account's file with a random token if there is none.

    Raises:
        ConfigError: The token is malformed, others can read the file, or it cannot be written.
    """
    if VARIABLE not in os.environ and not (file := token_file()).exists():
        try:
            _write(file, secrets.token_urlsafe())
        except OSError as error:
            raise ConfigError(f"{file} cannot be written ({error.strerror}): set {VARIABLE} to a secret") from error
    return server_token()


def whose_token(users: str) -> str:
    """What the users of a server need, as a sentence without the token itself."""
    if VARIABLE in os.environ:
        return f"{users} need the same {VARIABLE} as this command."
    return f"{users} of this account read the token from {token_file()}; others need it as {VARIABLE}."


def _write(file: Path, token: str) -> None:
    """Writes a token, unless another process has just written one."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.parent.chmod(0o700)
    partial = file.with_name(f".{secrets.token_hex(8)}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
        stream.write(f"{token}\n")
    try:
        os.link(partial, file)  # whole or not at all, and never over another's
    except FileExistsError:
        pass
    finally:
        partial.unlink()


def _read(file: Path) -> str:
    try:
        require_private(file)
        with open_own(file) as stream:
            return _checked(stream.read(4096).decode("ascii", "replace").strip(), str(file))
    except PermissionError as error:
        raise ConfigError(f"{error}, so its token is not secret: remove it, and start `vlmenv serve` again") from error


def _checked(token: str, place: str) -> str:
    if not _FORM.fullmatch(token):
        raise ConfigError(f"{place} holds no token: a token has at least 16 printable characters and no spaces")
    return token


def open_own(file: Path) -> BufferedReader:
    """Opens a regular file of this account for reading, without following a link, and without waiting for a pipe.

    Raises:
        PermissionError: It is another account's, a link, or no regular file.
        OSError: It cannot be opened.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise PermissionError(f"{file} is a link") from error
        raise
    found = os.fstat(handle)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise PermissionError(f"{file} is not a regular file of this account")


def require_private(path: Path) -> None:
    """Raises PermissionError unless a file or folder is this account's and closed to others, and no link."""
    found = path.lstat()
    if found.st_uid != os.geteuid() or stat.S_ISLNK(found.st_mode) or found.st_mode & _OTHERS:
        raise PermissionError(f"{path} is not private to this account")

"""Serves the report of runs that go on, to this machine alone."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from vlmenv.core.errors import ConfigError
from vlmenv.runs.report import make_report

ADDRESS: Final = "127.0.0.1"
_WATCHED: Final = ("metrics.jsonl", "warnings.jsonl", "evaluation.json", "before/metrics.json", "after/metrics.json")
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

Signature = tuple[tuple[str, int, int], ...]


class ReportServer(ThreadingHTTPServer):
    """A server of a report at a path that nobody can guess.

    It answers GET alone, of requests that name it by 127.0.0.1 or localhost, so that no web page reaches it by a name
    of its own. The report is made anew if a file of the runs has changed since.

    Args:
        runs: Folders of runs.
        port: Port to listen on. 0: a free one.

    Raises:
        ConfigError: A folder holds no run, or the port cannot be listened on.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[Path], port: int = 0) -> None:
        self._runs = runs
        self._making = threading.Lock()
        self._made: tuple[Signature, bytes] | None = None
        self._path = secrets.token_urlsafe(24)
        self.report()  # raises now what is wrong with the folders
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise ConfigError(f"port {port} cannot be listened on ({error.strerror}): give another --port") from error

    @property
    def url(self) -> str:
        """The address of the report."""
        return f"http://{ADDRESS}:{self.server_port}/{self._path}/"

    def report(self) -> bytes:
        """The page, as of now."""
        with self._making:
            now = self._signature()
            if self._made is None or self._made[0] != now:
                self._made = now, make_report(self._runs, live=True).encode()
            return self._made[1]

    def version(self) -> bytes:
        """A text that changes when a run has new results."""
        return format(hash(self._signature()) & (2**64 - 1), "x").encode()

    def content(self, path: str, host: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, media type and body of an answer.

        Args:
            path: Path of the request.
            host: Its Host header.
        """
        if host not in (f"{ADDRESS}:{self.server_port}", f"localhost:{self.server_port}"):
            return HTTPStatus.FORBIDDEN, "text/plain", b"unknown Host: use 127.0.0.1 or localhost\n"
        token, _, name = path.removeprefix("/").partition("/")
        known = secrets.compare_digest(token.encode("utf-8", "replace"), self._path.encode())
        if known and name == "":
            return HTTPStatus.OK, "text/html; charset=utf-8", self.report()
        if known and name == "version":
            return HTTPStatus.OK, "text/plain", self.version()
        return HTTPStatus.NOT_FOUND, "text/plain", b"no such page\n"

    def _signature(self) -> Signature:
        return tuple(_stamps(self._runs))


def _stamps(runs: Sequence[Path]) -> Iterator[tuple[str, int, int]]:
    """Name, time and size of each file whose change makes a new report."""
    for run in runs:
        for file in [*(run / name for name in _WATCHED), *sorted(run.glob("evaluations/*/metrics.json"))]:
            try:
                found = file.stat()
            except OSError:
                continue
            yield str(file), found.st_mtime_ns, found.st_size


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version, sys_version = "vlmenv", ""
    timeout = 30  # seconds, after which a silent client is left

    def do_GET(self) -> None:
        try:
            status, kind, body = self.server.content(self.path, self.headers.get("Host", ""))
        except (ConfigError, OSError) as error:  # the run's files are gone
            status, kind, body = HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", f"{error}\n".encode()
        self.send_response(status)
        for name, value in (_HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: the page asks every few seconds."""

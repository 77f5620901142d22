"""How servers are reached: by host and port, by https with verification, and by a Unix socket in a private folder."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest
from servers import self_signed
from test_cli import fails

from vlmenv.agents.engines.addresses import check_address, host_of, tls_context
from vlmenv.agents.engines.background import BackgroundLoop
from vlmenv.agents.engines.remote import RetryPolicy, Server
from vlmenv.agents.engines.replies import ServerFault
from vlmenv.core.errors import ConfigError

ONCE = RetryPolicy(answer=5, greeting=5, attempts=1)


class Handler(BaseHTTPRequestHandler):
    """Answers with a checksum, and notes the requests."""

    protocol_version = "HTTP/1.1"
    seen: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(self.headers["Authorization"])
        body = b'{"checksums": {"a": "here"}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "a socket"

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def running(server: Any) -> Iterator[None]:
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def handler() -> type[Handler]:
    return type("Noting", (Handler,), {"seen": []})


def ask(url: str, ca: Path | None = None) -> dict[str, str]:
    loop = BackgroundLoop()
    server = Server(url, "a-token-of-16-letters", ONCE, ca)
    try:
        return loop.run(server.checksums())
    finally:
        loop.run(server.close())
        loop.close()


def test_a_socket_in_a_private_folder_is_asked_and_in_an_open_one_gets_no_token(
    tmp_path: Path, handler: type[Handler]
) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "a server.sock"
    with running(ThreadingUnixStreamServer(str(path), handler)):
        assert ask(f"unix:{path}") == {"a": "here"}
        assert handler.seen == ["Bearer a-token-of-16-letters"]
        tmp_path.chmod(0o711)
        with pytest.raises(ServerFault, match=f"{tmp_path} is not private to this account"):
            ask(f"unix:{path}")
        assert len(handler.seen) == 1
    tmp_path.chmod(0o700)
    path.unlink()
    with pytest.raises(ServerFault, match="ConnectError"):
        ask(f"unix:{path}")


def test_certificates_and_names_are_verified(tmp_path: Path, handler: type[Handler]) -> None:
    cert, key = self_signed(tmp_path, "127.0.0.1")
    other, _ = self_signed(tmp_path / "other", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    port = server.server_address[1]
    with running(server):
        assert ask(f"https://127.0.0.1:{port}", cert) == {"a": "here"}
        for url, ca in (
            (f"https://127.0.0.1:{port}", None),
            (f"https://127.0.0.1:{port}", other),
            (f"https://localhost:{port}", cert),  # another name than the certificate's
        ):
            with pytest.raises(ServerFault, match="CERTIFICATE_VERIFY_FAILED"):
                ask(url, ca)
    assert len(handler.seen) == 1


def test_forms_of_addresses() -> None:
    for url in ("http://a:1", "https://a.b:443", "unix:/a/b.sock", "unix:b.sock"):
        check_address(url)
    for url in ("unix:", "unix://a/b", "https://a/b", "ftp://a", "a:1"):
        with pytest.raises(ConfigError, match="is not the address of a server"):
            check_address(url)
    assert [host_of(url) for url in ("http://a:1", "https://[::1]:2", "unix:/a")] == ["a", "::1", "127.0.0.1"]


def test_authorities_are_read_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("ca.pem", "none.pem"):
        with pytest.raises(ConfigError, match=f"server_ca {tmp_path / name} holds no certificates"):
            tls_context(tmp_path / name)
    asked = ["eval", "--engine", "vllm-server", "--server"]
    assert "holds no certificates" in fails(capsys, *asked, "https://a:1", "--server-ca", str(tmp_path / "ca.pem"))
    assert "none is named" in fails(capsys, *asked, "http://a:1", "--server-ca", str(tmp_path / "ca.pem"))

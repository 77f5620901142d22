"""A server in place of a language model's, which replies as a test wants it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, bytes]


class Server(ThreadingHTTPServer):
    """A server whose replies are a function of how often it was asked, and of the request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Callable[[int, dict[str, Any]], Reply] = lambda turn, request: "yes"
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.trickles = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send(200, json.dumps({"data": [{"id": "tester"}]}).encode())

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path.partition("?")[0] == "/v1/chat/completions"
        with self.server.lock:
            turn = len(self.server.requests)
            self.server.requests.append(request)
            self.server.keys.append(self.headers["Authorization"])
        reply = self.server.reply(turn, request)
        content = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
        self.send(*((200, json.dumps(content).encode()) if isinstance(reply, str) else reply))

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            for part in [body[i : i + 1] for i in range(len(body))] if self.server.trickles else [body]:
                self.wfile.write(part)
                time.sleep(0.02 if self.server.trickles else 0)
        except OSError:
            pass  # the other side has had enough

    def log_message(self, *args: Any) -> None:
        pass

"""A Hugging Face hub on this machine: what `huggingface_hub` calls to upload a folder, and to download it again.

It keeps the bytes that reach it. Large files come as to the hub: by LFS, a PUT per file, or by Xet, cut into compressed
chunks (https://huggingface.co/docs/xet), which are put together here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from xet_storage import Chunks, files_of_shard

COMMIT = "c0" * 20


@dataclass
class Repository:
    """A repository of models with one branch."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **content: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, "X-Error-Code": code}
        self.content = {"error": message} | content


class Hub(ThreadingHTTPServer):
    """Repositories, and the bytes that wait to be committed."""

    daemon_threads = True

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users
        """names by token"""
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        """large files by SHA-256"""
        self.chunks: dict[str, Chunks] = {}
        """chunks of Xet by the hash of their block"""
        self.asked: list[str] = []
        self.breaks_at = "never"
        """part of a path: from the first request to it on, nothing is answered"""
        self.broken = False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub(users: dict[str, str]) -> Iterator[Hub]:
    """A hub that serves."""
    with Hub(users) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        self.server.asked.append(f"{self.command} {path}")
        self.server.broken |= self.server.breaks_at in path
        if self.server.broken:
            self.close_connection = True
            return
        try:
            for method, pattern, answer in ROUTES:
                if self.command in method and (found := re.fullmatch(pattern, path)) is not None:
                    with self.server.lock:
                        self._send(200, *answer(self, body, *found.groups()))
                    return
            raise Refused(404, f"there is no {path}")
        except Refused as refused:
            self._send(refused.status, json.dumps(refused.content).encode(), refused.headers)

    do_POST = do_PUT = do_HEAD = do_GET

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass

    def user(self) -> str:
        """Whose token it is."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token not in self.server.users:
            raise Refused(401, "Invalid username or password.")
        return self.server.users[token]

    def written(self, name: str) -> Repository:
        """A repository that the user may write."""
        if self.user() != name.partition("/")[0]:
            raise Refused(403, "You don't have the required permissions.")
        return self.read(name)

    def read(self, name: str) -> Repository:
        """A repository that the user may read."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and self.user() != name.partition("/")[0]):
            raise Refused(404, "Repository not found", "RepoNotFound")
        return found


Answer = tuple[bytes, dict[str, str]]


def _json(content: Any) -> Answer:
    return json.dumps(content).encode(), {"Content-Type": "application/json"}


def _create(asked: Handler, body: bytes) -> Answer:
    given, user = json.loads(body), asked.user()
    if user != given["organization"]:
        raise Refused(403, "You don't have the rights to create a model under this namespace")
    name = f"{user}/{given['name']}"
    url = f"{asked.server.url}/{name}"
    if name in asked.server.repositories:
        raise Refused(409, "You already created this model repo", url=url)
    asked.server.repositories[name] = Repository(given.get("visibility") == "private")
    return _json({"url": url})


def _info(asked: Handler, body: bytes, name: str) -> Answer:
    return _json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": one} for one in asked.read(name).files]})


def _check_card(asked: Handler, body: bytes) -> Answer:
    return _json({"errors": [], "warnings": []})


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _preupload(asked: Handler, body: bytes, name: str) -> Answer:
    files = asked.written(name).files
    return _json(
        {
            "files": [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if _is_large(one["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(files[one["path"]]) if one["path"] in files else None,
                }
                for one in json.loads(body)["files"]
            ]
        }
    )


def _oid(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _lfs_batch(asked: Handler, body: bytes, name: str) -> Answer:
    asked.written(name)
    url = asked.server.url
    actions = [{"upload": {"href": f"{url}/large/{one['oid']}"}} for one in json.loads(body)["objects"]]
    objects = [one | {"actions": action} for one, action in zip(json.loads(body)["objects"], actions, strict=True)]
    return _json({"transfer": "basic", "objects": objects})


def _lfs_put(asked: Handler, body: bytes, oid: str) -> Answer:
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refused(400, "other bytes than were announced")
    asked.server.large[oid] = body
    return b"", {}


def _xet_token(asked: Handler, body: bytes, name: str) -> Answer:
    asked.written(name)
    return _json({"casUrl": asked.server.url, "accessToken": "of-xet", "exp": 4_000_000_000})


def _xet_block(asked: Handler, body: bytes, named: str) -> Answer:
    asked.server.chunks[named] = Chunks(body)
    return _json({"was_inserted": True})


def _xet_shard(asked: Handler, body: bytes) -> Answer:
    for content in files_of_shard(body, asked.server.chunks):
        asked.server.large[hashlib.sha256(content).hexdigest()] = content
    return _json({"result": 1})


def _commit(asked: Handler, body: bytes, name: str) -> Answer:
    files = asked.written(name).files
    for line in body.splitlines():
        one = json.loads(line)
        value = one["value"]
        match one["key"]:
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                files[value["path"]] = asked.server.large[value["oid"]]
            case "deletedFile":
                del files[value["path"]]
    return _json({"commitUrl": f"{asked.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})


def _tree(asked: Handler, body: bytes, name: str) -> Answer:
    rows: list[dict[str, Any]] = []
    for path, content in asked.read(name).files.items():
        rows.append({"type": "file", "path": path, "size": len(content), "oid": _oid(content)})
        if _is_large(path):
            rows[-1]["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return _json(rows)


def _resolve(asked: Handler, body: bytes, name: str, path: str) -> Answer:
    files = asked.read(name).files
    if path not in files:
        raise Refused(404, "Entry not found", "EntryNotFound")
    tag = hashlib.sha256(files[path]).hexdigest() if _is_large(path) else _oid(files[path])
    return files[path], {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _check_card),
    ("GET", f"/api/models/{_NAME}(?:/revision/[^/]+)?", _info),
    ("POST", f"/api/models/{_NAME}/preupload/main", _preupload),
    ("POST", f"/{_NAME}.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", "/large/([0-9a-f]{64})", _lfs_put),
    ("GET", f"/api/models/{_NAME}/xet-write-token/main", _xet_token),
    ("POST", "/v1/xorbs/default/([0-9a-f]{64})", _xet_block),
    ("POST", "/v1/shards", _xet_shard),
    ("POST", f"/api/models/{_NAME}/commit/main", _commit),
    ("GET", f"/api/models/{_NAME}/tree/[^/]+", _tree),
    ("GET HEAD", f"/{_NAME}/resolve/[^/]+/(.+)", _resolve),
]

"""A hub that serves a folder as `owner/name` from this machine, and can be told to fail; enough for a model to load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c0" * 20
NAME = "owner/name"


class ModelHub(ThreadingHTTPServer):
    """The files of one repository by huggingface_hub's documented interface."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.breaks: str | None = None
        """A file that a connection breaks before; every other comes whole."""
        self.gated = False
        self.status: int | None = None
        """An answer to every request."""
        self.asked: list[str] = []
        """The path of every request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: ModelHub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        tree = path.removeprefix(f"/api/models/{NAME}/tree/")
        if self.server.status is not None:
            self._send(b"{}", body, self.server.status)
        elif tree != path and "/" in tree:  # transformers looks for a folder of chat templates
            self._send(b"", body, 404, {"X-Error-Code": "EntryNotFound"})
        elif tree != path:  # huggingface_hub lists a revision before it takes several files of it
            found = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _etag(p.read_bytes())}
                     for p in sorted(self.server.folder.iterdir())]  # fmt: skip
            self._send(json.dumps(found).encode(), body)
        elif path.startswith(f"/api/models/{NAME}"):
            files = [{"rfilename": p.name} for p in sorted(self.server.folder.iterdir())]
            self._send(json.dumps({"id": NAME, "sha": COMMIT, "siblings": files, "private": False}).encode(), body)
        elif not path.startswith(f"/{NAME}/resolve/"):
            self._send(b"", body, 404, {"X-Error-Code": "RepoNotFound"})
        elif self.server.gated:
            self._send(b"", body, 403, {"X-Error-Code": "GatedRepo"})
        else:
            self._send_file(self.server.folder / path.rpartition("/")[2], body)

    def _send_file(self, file: Path, body: bool) -> None:
        if not file.is_file():
            self._send(b"", body, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        if body and file.name == self.server.breaks:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.close_connection = True
            return
        self._send(content, body, headers={"ETag": f'"{_etag(content)}"'})

    def _send(self, content: bytes, body: bool, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_args: Any) -> None:
        pass


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def serving(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub that huggingface_hub asks in this block, with a cache of its own."""
    server = ModelHub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(cache))
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

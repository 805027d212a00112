"""A server of this machine that answers as huggingface.co does what a download of a repository asks."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse


class FakeHub:
    """Models by name, each with commits (hash: directory) and refs (name: hash); `asked` has every request.

    The names of data sets begin with "datasets/".
    """

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Path]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.endpoint = ""

    def publish(self, name: str, directory: Path, *refs: str) -> str:
        """Add a commit of what `directory` holds now; `refs` point to it. Returns its hash."""
        files = sorted((p.relative_to(directory).as_posix(), p) for p in directory.rglob("*") if p.is_file())
        commit = hashlib.sha1(b"".join(path.encode() + p.read_bytes() for path, p in files)).hexdigest()
        self.models.setdefault(name, {})[commit] = directory
        self.refs.setdefault(name, {}).update(dict.fromkeys(refs or ("main",), commit))
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request."""
        api = re.fullmatch(r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None or found[1] not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        name, revision = found[1], (api[2] if api else file[2]) or "main"  # type: ignore[index]
        commit = self.refs[name].get(revision, revision)
        if commit not in self.models[name]:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Revision not found"}, b"{}"
        if file and name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"{}"
        directory = self.models[name][commit]
        files = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
        if file:
            if file[3] not in files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
            content = files[file[3]].read_bytes()
            return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}, content
        body: dict[str, Any] = {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": False, "tags": []}
        body["siblings"] = [{"rfilename": path, "size": file.stat().st_size} for path, file in files.items()]
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve a hub without models at `endpoint` until the end of the body."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

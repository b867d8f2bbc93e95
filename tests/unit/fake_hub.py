"""A stand-in for the Hugging Face hub on this machine: one dataset repository, with connections that break."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote, urlsplit


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repository = "allenai/c4"
    commit = "a" * 40
    root: ClassVar[Path]
    """Folder with the repository's files."""
    requests: ClassVar[list[str]] = []
    breaks: ClassVar[dict[str, int]] = {}
    """How many more times the connection breaks in the middle of a file."""

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(path)
        api = f"/api/datasets/{self.repository}"
        if path.startswith(f"{api}/tree/{self.commit}"):
            self._list(path.removeprefix(f"{api}/tree/{self.commit}").strip("/"))
        elif path in (api, f"{api}/revision/{self.commit}", f"{api}/revision/main"):
            self._json({"id": self.repository, "sha": self.commit, "siblings": []})
        elif path.startswith(f"/datasets/{self.repository}/resolve/{self.commit}/"):
            self._file(path.split(f"/resolve/{self.commit}/")[1])
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _list(self, folder: str) -> None:
        entries = []
        for path in sorted((self.root / folder).iterdir()):
            kind = "directory" if path.is_dir() else "file"
            name = path.relative_to(self.root).as_posix()
            entries.append({"type": kind, "path": name, "size": path.stat().st_size, "oid": "b" * 40})
        self._json(entries)

    def _file(self, name: str) -> None:
        if not (self.root / name).is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = (self.root / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.commit}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._answer(200, content, headers)
            return
        start, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        broken = self.breaks.get(name, 0) > 0
        self._answer(206, content[start : end + 1], headers, half=broken)
        if broken:
            self.breaks[name] -= 1
            self.close_connection = True

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, body: bytes, headers: dict[str, str], half: bool = False) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)


def serve(root: Path) -> str:
    """Start the hub in a thread; returns its address."""
    Hub.root = root
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"

"""A package index and a model hub on this machine, whose files break off or change on request.

Lengths and hashes are announced as they should be; only what is sent goes wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Literal
from urllib.parse import urlsplit

COMMIT = "1" * 40
Break = Literal["connection cut", "wrong length", "wrong hash", "server error"]


@dataclass
class Broken:
    """What goes wrong with the files whose names match: where in the file, as a share of it."""

    kind: Break
    files: str
    place: float


@dataclass
class Site:
    """What the server has: pages by their path, files by theirs."""

    pages: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    broken: Broken | None = None
    address: str = ""

    def add_wheels(self, folder: Path) -> None:
        """Each wheel of a folder, with a page of its own in the index."""
        for wheel in folder.glob("*.whl"):
            content = wheel.read_bytes()
            name = wheel.name.partition("-1.0-")[0].replace("_", "-")
            link = f"/wheels/{wheel.name}#sha256={hashlib.sha256(content).hexdigest()}"
            page = f'<!DOCTYPE html><a href="{link}">{wheel.name}</a>'
            self.pages[f"/simple/{name}"] = ("text/html", page.encode())
            self.files[f"/wheels/{wheel.name}"] = content

    def add_repository(self, repo: str, files: Mapping[str, bytes]) -> None:
        """A repository of the hub."""
        card = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [],
                "gated": False, "disabled": False, "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": name} for name in files]}  # fmt: skip
        tree = [
            {"type": "file", "path": name, "size": len(content), "oid": etag(name, content)}
            for name, content in files.items()
        ]
        for path, found in (("", card), ("/revision/main", card), (f"/tree/{COMMIT}", tree)):
            page = json.dumps(found).encode()
            self.pages[f"/api/models/{repo}{path}"] = ("application/json", page)
        for name, content in files.items():
            for revision in ("main", COMMIT):
                self.files[f"/{repo}/resolve/{revision}/{name}"] = content


def etag(name: str, content: bytes) -> str:
    """As the hub has it: SHA-256 of large files, for small ones the SHA-1 of git."""
    if name.endswith((".safetensors", ".gguf")):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = urlsplit(self.path).path.rstrip("/")
        if path in self.site.pages:
            kind, content = self.site.pages[path]
            return self._answer(200, {"Content-Type": kind}, content, body)
        if path not in self.site.files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
        content, broken = self.site.files[path], self.site.broken
        tag = {"ETag": f'"{etag(path, content)}"', "X-Repo-Commit": COMMIT}
        if not body or broken is None or not re.search(broken.files, path):
            return self._answer(200, tag, content, body)
        place = int(broken.place * len(content))
        if broken.kind == "server error":
            return self._answer(500, {}, b"", body)
        if broken.kind == "wrong length":
            return self._answer(200, tag, content[:place], body)
        if broken.kind == "wrong hash":
            changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            return self._answer(200, tag, changed, body)
        # Cut at the same place each time, for whoever goes on from where it broke off too.
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        tag["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        tag["Content-Length"] = str(len(content) - first)
        return self._answer(206 if asked else 200, tag, content[first:place], body)

    def _answer(self, code: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        return


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """The site at an address of its own while the block runs."""
    handler = type("Handler", (_Handler,), {"site": site})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        site.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()

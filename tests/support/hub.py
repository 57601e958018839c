"""A stand-in for the model hub on localhost: the part of its protocol that downloads need.

Large files live on a second host, as on the real one: the hub answers with their size, their hash
and a redirect. Knows nothing about this project.
"""

import hashlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LARGE = (".safetensors", ".bin", ".pth")
CHUNK_BYTES = 16 * 1024


@dataclass
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    name: str  # of the file asked for, "" for lists
    range: str | None
    token: str | None
    body_bytes: int = 0  # what was sent of the answer's body


@dataclass
class Repo:
    """A model's files at one commit."""

    folder: Path
    commit: str
    revisions: frozenset[str]
    etags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        for file in files:
            name = file.relative_to(self.folder).as_posix()
            self.etags[name] = _sha256(file) if is_large(name) else _git_sha1(file)

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size


class StandInHub:
    """Serves published folders and counts what it serves.

    ``gated``: status for the files of these repositories, unless the request has a token.
    ``cuts``: the connection breaks after so many bytes of these files' bodies, once for each
    entry of the list. ``ignores_ranges``: as it says, for large files.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.gated: dict[str, int] = {}
        self.cuts: dict[str, list[int]] = {}
        self.ignores_ranges = False
        self.anonymous_404 = True  # else 401, as for people who have not logged in
        self.requests: list[Request] = []
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def publish(self, repo: str, folder: Path, *revisions: str) -> str:
        """Offer a folder under a name, as main and other revisions; returns the commit."""
        commit = hashlib.sha1(f"{repo} {folder}".encode()).hexdigest()
        self.repos[repo] = Repo(folder, commit, frozenset({"main", commit, *revisions}))
        return commit

    def asked(self, name: str, method: str = "GET") -> list[Request]:
        """The requests for a file's content so far; ``.suffix`` stands for all such files."""
        found = [r for r in self.requests if r.method == method and _matches(r.name, name)]
        return [r for r in found if not (is_large(r.name) and "/resolve/" in r.path)]

    def body_bytes(self, name: str = "") -> int:
        """Bytes of bodies sent, of all requests or of those for some files."""
        return sum(r.body_bytes for r in self.requests if not name or _matches(r.name, name))

    def forget(self) -> None:
        self.requests.clear()

    def close(self) -> None:
        """Go away: from now on nobody answers."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.hang_up()
            self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What makes huggingface_hub in another process use this hub and that cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }

    def install(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """The same in this process, where huggingface_hub has read its environment already."""
        from huggingface_hub import constants

        values: dict[str, Any] = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "*")


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[StandInHub]:
    """A stand-in that this process's huggingface_hub talks to, and nothing else."""
    from huggingface_hub.utils import close_session

    hub = StandInHub()
    hub.install(monkeypatch, home)
    close_session()  # connections of earlier tests
    try:
        yield hub
    finally:
        close_session()
        hub.close()


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or (wanted.startswith(".") and name.endswith(wanted))


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # all connections of a download come at once

    def __init__(self, hub: StandInHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def hang_up(self) -> None:
        """End the connections that clients keep open for later."""
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave when they please; anything else is a fault of the stand-in."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        self.server.connections.add(self.request)
        # Little may be under way when a client leaves, or counting what it took means nothing.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK_BYTES)
        super().setup()

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub = self.server.hub
        path = urlsplit(self.path).path
        token = self.headers.get("Authorization")
        self.seen = Request(self.command, path, "", self.headers.get("Range"), token)
        self.hub.requests.append(self.seen)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "content":
            self._send_content("/".join(parts[1:3]), "/".join(parts[3:]))
        elif parts[:2] == ["api", "models"]:
            self._list(parts[2:])
        elif "resolve" in parts[2:3]:
            self._resolve(parts)
        else:
            self._refuse(404, "NotFound")

    def _find(self, name: str, revision: str) -> Repo | None:
        """The repository at a revision, or None after a refusal."""
        repo = self.hub.repos.get(name)
        if repo is None and self.hub.anonymous_404:
            self._refuse(404, "RepoNotFound")
        elif repo is None:
            self._refuse(401, None)
        elif revision not in repo.revisions:
            self._refuse(404, "RevisionNotFound")
            return None
        return repo

    def _list(self, parts: list[str]) -> None:
        """/api/models/ORG/NAME, .../revision/REVISION, .../tree/REVISION."""
        repo = self._find("/".join(parts[:2]), parts[3] if len(parts) > 3 else "main")
        if repo is None:
            return
        if parts[2:3] == ["tree"]:
            self._json([_tree_entry(repo, name) for name in repo.etags])
        else:
            blobs = "blobs" in parse_qs(urlsplit(self.path).query)
            siblings = [_sibling(repo, name, blobs) for name in repo.etags]
            name = "/".join(parts[:2])
            self._json({"id": name, "modelId": name, "sha": repo.commit, "siblings": siblings})

    def _resolve(self, parts: list[str]) -> None:
        """/ORG/NAME/resolve/REVISION/FILE: small files themselves, a redirect for large ones."""
        owner, name = "/".join(parts[:2]), "/".join(parts[4:])
        self.seen.name = name
        repo = self._find(owner, parts[3])
        if repo is None:
            return
        if owner in self.hub.gated and not self.seen.token:
            self._refuse(self.hub.gated[owner], "GatedRepo")
        elif name not in repo.etags:
            self._refuse(404, "EntryNotFound")
        elif is_large(name):
            self.send_response(302)
            self._describe(repo, name)
            self.send_header("Location", f"http://localhost:{self.hub.port}/content/{owner}/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send_file(repo, name, 0, repo.size(name), 200)

    def _send_content(self, owner: str, name: str) -> None:
        self.seen.name = name
        repo = self.hub.repos[owner]
        begin, end, status = 0, repo.size(name), 200
        if self.seen.range and not self.hub.ignores_ranges:
            first, last = self.seen.range.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last) + 1 if last else end, end)
            status = 206
        self._send_file(repo, name, begin, end, status)

    def _send_file(self, repo: Repo, name: str, begin: int, end: int, status: int) -> None:
        self.send_response(status)
        self._describe(repo, name)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{repo.size(name)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cuts.get(name)
        cut = cuts.pop(0) if cuts else None
        self._send_bytes(repo.folder / name, begin, end if cut is None else begin + cut)
        if cut is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send_bytes(self, file: Path, begin: int, end: int) -> None:
        with file.open("rb") as opened:
            opened.seek(begin)
            while data := opened.read(min(CHUNK_BYTES, end - opened.tell())):
                self.seen.body_bytes += len(data)  # before whoever reads it can look
                try:
                    self.wfile.write(data)
                except OSError:  # the client has left
                    self.close_connection = True
                    return

    def _describe(self, repo: Repo, name: str) -> None:
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("ETag", f'"{repo.etags[name]}"')
        self.send_header("Accept-Ranges", "bytes")
        if is_large(name):
            self.send_header("X-Linked-Size", str(repo.size(name)))
            self.send_header("X-Linked-Etag", f'"{repo.etags[name]}"')

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.seen.body_bytes += len(body)

    def _refuse(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code or "Invalid username or password.")
        self.send_header("Content-Length", "0")
        self.end_headers()


def _sibling(repo: Repo, name: str, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": name}
    entry: dict[str, Any] = {"rfilename": name, "size": repo.size(name), "blobId": "0" * 40}
    if is_large(name):
        lfs = {"sha256": repo.etags[name], "size": repo.size(name), "pointerSize": 135}
        return entry | {"lfs": lfs}
    return entry | {"blobId": repo.etags[name]}


def _tree_entry(repo: Repo, name: str) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": repo.size(name), "oid": repo.etags[name]}
    if is_large(name):
        lfs = {"oid": repo.etags[name], "size": repo.size(name), "pointerSize": 135}
        return entry | {"oid": "0" * 40, "lfs": lfs}
    return entry


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _git_sha1(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

"""A hub on the loopback: speaks the part of the hub's protocol that huggingface_hub's downloads need.

It serves folders under repository names, large files the LFS way (a redirect to another host, with Range),
and can be told to cut a connection, to hold a file half-way, to gate a repository, or to go away.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

LFS_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".npz", ".onnx", ".h5"}
HOLD_LIMIT = 20.0  # seconds; a test that forgets to release a file must not hang the server


@dataclass(frozen=True)
class Asked:
    """One request that was answered."""

    method: str
    path: str
    range: str  # the Range header, or ""
    sent: int  # bytes of content


@dataclass
class LoopbackHub:
    """The hub's contents, what went over it, and the faults it was told to have."""

    address: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)  # plain downloads at /files/<name>
    gated: set[str] = field(default_factory=set)
    cut: dict[str, list[int]] = field(
        default_factory=dict
    )  # file name -> bytes after which to hang up, per GET
    hold: dict[str, threading.Event] = field(
        default_factory=dict
    )  # file name -> sends half, then waits for it
    asked: list[Asked] = field(default_factory=list)

    def gets(self, ending: str) -> list[Asked]:
        """The GET requests for content whose path ends so."""
        return [a for a in self.asked if a.method == "GET" and a.path.endswith(ending) and a.sent]

    def commit(self, repository: str) -> str:
        return _commit(self.repositories[repository])


@cache
def _commit(folder: Path) -> str:
    """A folder's commit, and so its content, stays as at the first request."""
    listing = [(f.relative_to(folder).as_posix(), sha256(f)) for f in _files(folder)]
    return hashlib.sha1(json.dumps(listing).encode()).hexdigest()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """Serve on a free port of 127.0.0.1 until the block ends."""
    hub = LoopbackHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        for event in hub.hold.values():
            event.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def point_at(hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process take the loopback hub for the hub, with its cache under `home`.

    huggingface_hub reads the environment once, at its import; so its constants are set as well.
    """
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


class _Handler(BaseHTTPRequestHandler):
    state: LoopbackHub
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case [""]:
                self._send(b"hub")
            case ["api", "models", org, name, *rest] if f"{org}/{name}" in self.state.repositories:
                self._api(f"{org}/{name}", rest)
            case ["files", name] if name in self.state.files:
                self._content(name, self.state.files[name], {"ETag": '"1"'})
            case ["lfs", org, name, *file]:
                place = self.state.repositories[f"{org}/{name}"].joinpath(*file)
                self._content(place.name, place.read_bytes(), {"ETag": f'"{sha256(place)}"'})
            case [org, name, "resolve", _, *file] if f"{org}/{name}" in self.state.repositories:
                self._resolve(f"{org}/{name}", "/".join(file))
            case ["files", _]:
                self._refuse(404, "", "Not Found")
            case _:
                # The real hub does not tell a missing repository from a private one.
                self._refuse(401, "RepoNotFound", "Repository not found")

    def _api(self, repository: str, rest: list[str]) -> None:
        folder, commit = self.state.repositories[repository], self.state.commit(repository)
        if len(rest) == 2 and rest[1] not in ("main", commit):
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if rest and rest[0] == "tree":
            return self._json([_tree_entry(folder, file) for file in _files(folder)])
        return self._json(
            {
                "id": repository,
                "sha": commit,
                "gated": "manual" if repository in self.state.gated else False,
                "siblings": [_sibling(folder, file) for file in _files(folder)],
            }
        )

    def _resolve(self, repository: str, name: str) -> None:
        if repository in self.state.gated:
            return self._refuse(401, "GatedRepo", "Access to model is restricted")
        place = self.state.repositories[repository] / name
        if not place.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        data = place.read_bytes()
        headers = {"X-Repo-Commit": self.state.commit(repository)}
        if place.suffix not in LFS_SUFFIXES:
            return self._content(place.name, data, {**headers, "ETag": f'"{_git_oid(data)}"'})
        linked = {
            **headers,
            "Location": f"{self.state.address.replace('127.0.0.1', 'localhost')}/lfs/{repository}/{name}",
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{sha256(place)}"',
        }
        return self._send(b"", linked, HTTPStatus.FOUND)

    def _content(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the part asked for, with the faults it was told to have."""
        start, wanted = 0, self.headers.get("Range", "")
        status = HTTPStatus.OK
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            status = HTTPStatus.PARTIAL_CONTENT
        body = data[start:]
        if self.command == "HEAD":
            return self._send(body, headers, status)
        cuts = self.state.cut.get(name, [])
        limit = cuts.pop(0) if cuts else len(body)
        self._send(body, headers, status, limit, self.state.hold.get(name))
        return None

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(message.encode(), {"X-Error-Code": code, "X-Error-Message": message}, HTTPStatus(status))

    def _send(
        self,
        body: bytes,
        headers: dict[str, str] | None = None,
        status: HTTPStatus = HTTPStatus.OK,
        limit: int | None = None,
        hold: threading.Event | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = b"" if self.command == "HEAD" else body[:limit]
        # Noted first: who reads the list after the download must find the request in it.
        self.state.asked.append(
            Asked(self.command, urlsplit(self.path).path, self.headers.get("Range", ""), len(sent))
        )
        try:
            if hold is not None:
                half = len(sent) // 2
                self.wfile.write(sent[:half])
                self.wfile.flush()
                hold.wait(HOLD_LIMIT)
                sent = sent[half:]
            self.wfile.write(sent)
        except ConnectionError:
            self.close_connection = True
        if limit is not None and limit < len(body):
            self.close_connection = True


def _sibling(folder: Path, file: Path) -> dict[str, object]:
    data = file.read_bytes()
    entry = {"rfilename": file.relative_to(folder).as_posix(), "size": len(data), "blobId": _git_oid(data)}
    if file.suffix in LFS_SUFFIXES:
        entry["lfs"] = {"size": len(data), "sha256": sha256(file), "pointerSize": 134}
    return entry


def _tree_entry(folder: Path, file: Path) -> dict[str, object]:
    data = file.read_bytes()
    entry = {
        "type": "file",
        "path": file.relative_to(folder).as_posix(),
        "size": len(data),
        "oid": _git_oid(data),
    }
    if file.suffix in LFS_SUFFIXES:
        entry["lfs"] = {"size": len(data), "oid": sha256(file), "pointerSize": 134}
    return entry

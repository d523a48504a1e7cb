"""A Hub on loopback for tests: the wire protocol of huggingface.co for repositories, commits, LFS and Xet, in memory.

    hub = start(folder)                       # hub.url goes into HF_ENDPOINT
    python tests/minihub.py PORT FOLDER       # by hand; prints every request

Files above `lfs_threshold` and weights go through LFS, or, with `xet="local:///dir"`, through Xet's local store. Faults are
set on the hub: `quota`, `read_only`, `cut_upload_after`, `hold_uploads`.
"""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".zip", ".png", ".jpg", ".jpeg", ".model")
FAR_FUTURE = 4102444800


@dataclass(frozen=True)
class Entry:
    """A file of a commit: git's id, its size, and the SHA-256 of its content if that lies in LFS."""

    oid: str
    size: int
    lfs: str | None = None

    def describe(self, path: str) -> dict[str, Any]:
        shown: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.lfs:
            shown["lfs"] = {"oid": self.lfs, "size": self.size, "pointerSize": 134}
        return shown


@dataclass
class Repository:
    """Branches point to commits; a commit is the whole list of its files."""

    kind: str
    id: str
    meta: dict[str, Any]
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    history: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_private(self) -> bool:
        return bool(self.meta.get("private"))

    @property
    def path(self) -> str:
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def files(self, revision: str = "main") -> dict[str, Entry] | None:
        return self.commits.get(self.branches.get(revision, revision))


class Hub:
    """All repositories, what was asked of the server, and the faults it is told to have."""

    def __init__(
        self,
        root: Path,
        *,
        user: str = "user",
        token: str = "hf_test",
        xet: str | None = None,
        lfs_threshold: int = 10 * 2**20,
    ) -> None:
        self.user, self.token, self.xet, self.lfs_threshold = user, token, xet, lfs_threshold
        self.lfs_folder = Path(root) / "lfs"
        self.lfs_folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = ""
        self.quota: int | None = None  # bytes of LFS one account may hold
        self.read_only = False  # the token may read, not write
        self.cut_upload_after: int | None = None  # bytes of the next upload, then the line is cut
        self.uploads_before_cut = 0
        self.hold_uploads = threading.Event()  # while set, uploads after `uploads_before_cut` wait

    def create(self, kind: str, name: str, **meta: Any) -> Repository:
        repository = Repository(kind, name, meta)
        self.repositories[kind, name] = repository
        self.commit(repository, "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, [])
        return repository

    def commit(
        self,
        repository: Repository,
        branch: str,
        title: str,
        added: Mapping[str, bytes | dict[str, Any]],
        removed: list[str],
    ) -> str:
        """Add a commit; what is added is a file's bytes, or the `lfsFile` line that names what lies in LFS."""
        files = dict(repository.files(branch) or {})
        for gone in removed:
            files = {
                path: e for path, e in files.items() if path != gone and not path.startswith(gone.rstrip("/") + "/")
            }
        for path, content in added.items():
            if isinstance(content, bytes):
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.blobs[oid] = content
                files[path] = Entry(oid, len(content))
            else:
                oid = hashlib.sha1(content["oid"].encode()).hexdigest()
                files[path] = Entry(oid, content["size"], content["oid"])
        listing = [title, sorted((path, entry.oid) for path, entry in files.items()), time.time_ns()]
        sha = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        repository.commits[sha] = files
        repository.branches[branch] = sha
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        repository.history.append({"id": sha, "title": title, "date": date})
        return sha

    def lfs_path(self, sha256: str) -> Path:
        return self.lfs_folder / sha256

    def read(self, repository: Repository, path: str, revision: str = "main") -> bytes:
        entry = (repository.files(revision) or {})[path]
        return self.lfs_path(entry.lfs).read_bytes() if entry.lfs else self.blobs[entry.oid]


def xet_hashes(folder: str) -> dict[str, str]:
    """Return SHA-256 -> Xet hash of every file in a local Xet store, from its shards' table of files."""

    def hexed(raw: bytes) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))

    found = {}
    for name in glob.glob(folder + "/**/*.mdb", recursive=True):
        data, position = Path(name).read_bytes(), 48
        while position + 48 <= len(data) and data[position : position + 32] != b"\xff" * 32:
            xet_hash = data[position : position + 32]
            flags, num_segments = struct.unpack("<II", data[position + 32 : position + 40])
            has_verification, has_metadata = flags >> 31, flags >> 30 & 1
            position += 48 + 48 * num_segments * (2 if has_verification else 1)
            if has_metadata:
                found[hexed(data[position : position + 32])] = hexed(xet_hash)
                position += 48
    return found


class Handler(BaseHTTPRequestHandler):
    """One connection. Every verb goes through `answer`, which finds the route."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, code: int, body: Any = b"", headers: Any = (), content_type: str = "application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in [*headers, ("Content-Type", content_type), ("Content-Length", str(len(data)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: int, message: str, word: str = "") -> None:
        self.send(code, {"error": message}, [("X-Error-Code", word), ("X-Error-Message", message)])

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.query = {key: values[0] for key, values in parse_qs(address.query).items()}
        self.base = f"http://{self.headers['Host']}"
        self.hub.requests.append((self.command, path))
        if path.startswith("/_lfs/"):
            return self.lfs_object(path.rsplit("/", 1)[1])
        body = self.read_body() if self.command in ("POST", "PUT", "DELETE", "PATCH") else b""
        self.is_known = self.headers.get("Authorization", "").removeprefix("Bearer ") == self.hub.token
        is_question = any(word in path for word in ("paths-info", "validate-yaml"))
        if self.command in ("POST", "DELETE", "PATCH") and not is_question:
            if not self.is_known:
                return self.refuse(401, "Invalid username or password.")
            if self.hub.read_only:
                return self.refuse(403, "Forbidden: you must use a write token to upload to a repository.")
        with self.hub.lock:
            self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            return self.who_am_i()
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create_repository(json.loads(body))
        secret = re.fullmatch(r"/api/spaces/([^/]+/[^/]+)/(secrets|hardware)", path)
        if secret and self.command == "POST":
            repository = self.hub.repositories["space", secret[1]]
            repository.meta.setdefault(secret[2], []).append(json.loads(body))
            return self.send(200, {"stage": "BUILDING", "hardware": {"current": None, "requested": "cpu-basic"}})
        api = re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+))?(?:/(.*))?)?", path)
        if api:
            repository = self.find(KINDS[api[1]], api[2])
            return repository and self.repository_api(repository, api[3], api[4] or "main", api[5] or "", body)
        if re.fullmatch(r"/(datasets/|spaces/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(json.loads(body))
        file = re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)", path)
        if file:
            repository = self.find((file[1] or "models/")[:-2], file[2])
            return repository and self.send_file(repository, file[3], file[4])
        self.refuse(404, f"no route {self.command} {path}")

    def find(self, kind: str, name: str) -> Any:
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.is_private and not self.is_known):
            return self.refuse(404 if self.is_known else 401, "Repository not found", "RepoNotFound")
        return repository

    def who_am_i(self) -> None:
        if not self.is_known:
            return self.refuse(401, "Invalid username or password.")
        role = "read" if self.hub.read_only else "write"
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        name = self.hub.user
        self.send(
            200, {"type": "user", "id": "0", "name": name, "fullname": name, "orgs": [], "isPro": False, "auth": token}
        )

    def create_repository(self, given: dict[str, Any]) -> None:
        kind, owner = given.pop("type", None) or "model", given.pop("organization", None) or self.hub.user
        name = f"{owner}/{given.pop('name')}"
        if owner != self.hub.user:
            return self.refuse(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        if kind == "space" and not given.get("sdk"):
            return self.refuse(400, "sdk is required for spaces")
        url = f"{self.base}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repositories:
            return self.send(409, {"error": "You already created this repo", "url": url})
        self.hub.create(kind, name, **given)
        self.send(200, {"url": url, "name": name, "id": name})

    def repository_api(self, repository: Repository, verb: str | None, revision: str, rest: str, body: bytes) -> None:
        files = repository.files(revision)
        if verb == "commit":
            return self.make_commit(repository, revision, body)
        if verb in ("xet-write-token", "xet-read-token"):
            return self.xet_token()
        if verb == "refs":
            found = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repository.branches.items()
            ]
            return self.send(200, {"branches": found, "converts": [], "tags": []})
        if verb == "commits":
            authors = [{"user": self.hub.user}]
            return self.send(200, [{**c, "authors": authors, "message": ""} for c in reversed(repository.history)])
        if files is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if verb == "preupload":
            return self.preupload(files, json.loads(body)["files"])
        if verb == "tree":
            return self.tree(files, rest, self.query.get("recursive", "").lower() in ("true", "1"))
        if verb == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            return self.send(200, [files[path].describe(path) for path in wanted if path in files])
        if verb in (None, "revision"):
            return self.describe_repository(repository, revision, files)
        self.refuse(404, f"no verb {verb}")

    def describe_repository(self, repository: Repository, revision: str, files: dict[str, Entry]) -> None:
        self.send(
            200,
            {
                "_id": "0",
                "id": repository.id,
                "modelId": repository.id,
                "author": repository.id.split("/")[0],
                "sha": repository.branches.get(revision, revision),
                "private": repository.is_private,
                "disabled": False,
                "gated": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "sdk": repository.meta.get("sdk"),
                "createdAt": repository.history[0]["date"],
                "lastModified": repository.history[-1]["date"],
                "siblings": [{"rfilename": path} for path in sorted(files)],
            },
        )

    def make_commit(self, repository: Repository, branch: str, body: bytes) -> None:
        added: dict[str, bytes | dict[str, Any]] = {}
        removed: list[str] = []
        header: dict[str, Any] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                header = value
            elif kind == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if not self.hub.xet and not self.hub.lfs_path(value["oid"]).exists():
                    return self.refuse(400, f"LFS object missing: {value['oid']}")
                added[value["path"]] = value
            else:
                removed.append(value["path"])
        if header.get("parentCommit") not in (None, repository.branches.get(branch)):
            return self.refuse(412, "A commit has happened since. Please refresh and try again.")
        sha = self.hub.commit(repository, branch, header.get("summary", ""), added, removed)
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.base}/{repository.path}/commit/{sha}"})

    def preupload(self, files: dict[str, Entry], asked: list[dict[str, Any]]) -> None:
        answers = []
        for file in asked:
            is_large = file["size"] > self.hub.lfs_threshold or file["path"].lower().endswith(LFS_SUFFIXES)
            known = files[file["path"]].oid if file["path"] in files else None
            mode = "lfs" if is_large else "regular"
            answers.append({"path": file["path"], "shouldIgnore": False, "oid": known, "uploadMode": mode})
        self.send(200, {"files": answers})

    def tree(self, files: dict[str, Entry], folder: str, is_recursive: bool) -> None:
        prefix = folder.rstrip("/") + "/" if folder else ""
        items: list[dict[str, Any]] = []
        folders = set()
        for path, entry in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parents = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1 if is_recursive else min(len(parents), 1) + 1):
                name = prefix + "/".join(parents[:depth])
                if name not in folders:
                    folders.add(name)
                    oid = hashlib.sha1(name.encode()).hexdigest()
                    items.append({"type": "directory", "oid": oid, "size": 0, "path": name})
            if is_recursive or not parents:
                items.append(entry.describe(path))
        if folder and not items:
            return self.refuse(404, f"{folder} does not exist", "EntryNotFound")
        self.send(200, items)

    def xet_token(self) -> None:
        if not self.hub.xet:
            return self.refuse(404, "xet is not enabled")
        values = {"casUrl": self.hub.xet, "exp": FAR_FUTURE, "accessToken": "x"}
        names = {"casUrl": "X-Xet-Cas-Url", "exp": "X-Xet-Token-Expiration", "accessToken": "X-Xet-Access-Token"}
        self.send(200, values, [(names[key], str(value)) for key, value in values.items()])

    def lfs_batch(self, asked: dict[str, Any]) -> None:
        stored = sum(path.stat().st_size for path in self.hub.lfs_folder.iterdir())
        objects = []
        for wanted in asked["objects"]:
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.lfs_path(wanted["oid"]).exists():
                stored += wanted["size"]
                if self.hub.quota is not None and stored > self.hub.quota:
                    return self.refuse(413, "Storage quota exceeded for this account.")
                href = f"{self.base}/_lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": href}}
            objects.append(answer)
        self.send(200, {"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def lfs_object(self, sha256: str) -> None:
        path = self.hub.lfs_path(sha256)
        if self.command == "PUT":
            with self.hub.lock:
                is_late = self.hub.uploads_before_cut <= 0
                self.hub.uploads_before_cut -= 1
            is_held = is_late and self.hub.hold_uploads.is_set()
            while is_held and self.hub.hold_uploads.is_set():
                time.sleep(0.02)
            if is_held or (is_late and self.hub.cut_upload_after is not None):
                self.rfile.read(min(self.hub.cut_upload_after or 0, int(self.headers.get("Content-Length") or 0)))
                with contextlib.suppress(OSError):  # the client may have hung up first
                    self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            data = self.read_body()
            if hashlib.sha256(data).hexdigest() != sha256:
                return self.refuse(422, "sha256 mismatch")
            partial = path.with_suffix(f".{threading.get_ident()}")
            partial.write_bytes(data)
            os.replace(partial, path)
        elif self.command == "POST":
            self.read_body()
        self.send(200 if path.exists() else 404)

    def send_file(self, repository: Repository, revision: str, path: str) -> None:
        files = repository.files(revision)
        if files is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if path not in files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        entry, sha = files[path], repository.branches.get(revision, revision)
        headers = [("X-Repo-Commit", sha), ("Accept-Ranges", "bytes"), ("ETag", f'"{entry.lfs or entry.oid}"')]
        if entry.lfs:
            headers += [("X-Linked-Etag", f'"{entry.lfs}"'), ("X-Linked-Size", str(entry.size))]
        if entry.lfs and self.hub.xet and not self.hub.lfs_path(entry.lfs).exists():
            xet_hash = xet_hashes(self.hub.xet.removeprefix("local://")).get(entry.lfs)
            if xet_hash is None:
                return self.refuse(404, "not in the Xet store", "EntryNotFound")
            route = f"{self.base}/api/{repository.kind}s/{repository.id}/xet-read-token/{sha}"
            return self.send(200, b"", [*headers, ("X-Xet-Hash", xet_hash), ("X-Xet-Refresh-Route", route)])
        data = self.hub.read(repository, path, revision)
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers.append(("Content-Range", f"bytes {first}-{last}/{len(data)}"))
            return self.send(206, data[first : last + 1], headers, "application/octet-stream")
        self.send(200, data, headers, "application/octet-stream")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:  # a client that went away is no news
        pass


def start(root: Path, port: int = 0, **options: Any) -> tuple[Hub, _Server]:
    """Start a hub in a thread; end it with `server.shutdown()`."""
    hub = Hub(root, **options)
    server = _Server(("127.0.0.1", port), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, name="minihub", daemon=True).start()
    return hub, server


if __name__ == "__main__":
    running, _ = start(Path(sys.argv[2]), int(sys.argv[1]))
    print(running.url, flush=True)
    shown = 0
    while True:
        time.sleep(0.2)
        for request in running.requests[shown:]:
            print(*request, flush=True)
        shown = len(running.requests)

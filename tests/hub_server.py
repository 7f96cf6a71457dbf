"""A Hugging Face Hub for tests: one process, in memory, on the loopback interface, standard library only.

It speaks the part of the HTTP API that huggingface_hub needs to create repositories, commit files (small ones inline,
weights through LFS), list and download them with ranges, and ask who a token belongs to. Tokens have roles,
repositories can be private or gated, every request is logged, and `fail` breaks chosen ones. Clients must run without
Xet, which needs a storage service of its own, or with `lfs` off, so that every file is committed inline.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".onnx", ".data", ".png")
REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"


@dataclass(frozen=True)
class Blob:
    """Content and how git keeps it; `oid` is sha256 for LFS files and git's sha1 for others."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A snapshot: message, changed paths, and all files."""

    sha: str
    message: str
    changed: tuple[str, ...]
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def commit(self, message: str, files: dict[str, Blob], changed: tuple[str, ...]) -> Commit:
        state = [len(self.commits), *sorted((path, blob.oid) for path, blob in files.items())]
        self.commits.append(Commit(hashlib.sha1(repr(state).encode()).hexdigest(), message, changed, files))
        return self.head

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit.sha == revision), None)


@dataclass(frozen=True)
class Account:
    """A token's user, its role ("read", "write" or "fineGrained"), organisations {name: role in it} and fine-grained
    scopes.
    """

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)
    scoped: tuple[dict[str, Any], ...] = ()

    def writes(self, repo: str) -> bool:
        return self.role != "read" and repo.split("/")[0] in (
            self.name,
            *(org for org, role in self.orgs.items() if role != "read"),
        )


class HubServer:
    """Serve until the `with` block ends; `url` is the endpoint."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.accounts: dict[str, Account] = {}
        self.uploads: dict[str, bytes] = {}
        self.log: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.faults: list[tuple[str, int]] = []
        self.lfs = True
        self.after: Callable[[Commit], None] | None = None
        self.lock = threading.RLock()
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(self, repo_id: str, files: dict[str, bytes], private: bool = False, gated: bool = False) -> Repo:
        repo = Repo(private, gated)
        repo.commit(
            "initial commit",
            {path: Blob(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()},
            tuple(files),
        )
        self.repos[repo_id] = repo
        return repo

    def fail(self, pattern: str, status: int) -> None:
        """Answer the next request whose `METHOD /path` matches `pattern` with `status`."""
        self.faults.append((pattern, status))


class _Refusal(Exception):
    """An HTTP error with the Hub's own error code and message headers."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet; otherwise every answer waits for the client's delayed ACK
    disable_nagle_algorithm = True
    hub: HubServer

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests go to `HubServer.log`, nothing to the terminal."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        body = self._body()
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.log.append(request)
            try:
                fault = next((fault for fault in self.hub.faults if re.search(fault[0], request)), None)
                if fault:
                    self.hub.faults.remove(fault)
                    raise _Refusal(fault[1], message="injected fault")
                for method, pattern, action in ROUTES:
                    found = re.fullmatch(pattern, path)
                    if found and self.command in method:
                        self._send(*action(self, body, **found.groupdict()))
                        return
                raise _Refusal(404, "EntryNotFound", f"no route for {request}")
            except _Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                self._send(
                    refusal.status,
                    {"error": refusal.message},
                    {name: value for name, value in headers.items() if value},
                )

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(
        self, status: int, content: bytes | dict[str, Any] | list[Any], headers: dict[str, str] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def account(self) -> Account | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        account = self.hub.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return account

    def repo(self, repo_id: str, write: bool = False, content: bool = False) -> Repo:
        account, repo = self.account(), self.hub.repos.get(repo_id)
        owner = account is not None and repo_id.split("/")[0] in (account.name, *account.orgs)
        if repo is None or (repo.private and not owner):
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        if repo.gated and content and not owner:
            raise _Refusal(403, "GatedRepo", "Access to this model is restricted")
        if write and (account is None or not account.writes(repo_id)):
            raise _Refusal(403, message="You don't have the rights to write here")
        return repo


def _commit_of(repo: Repo, revision: str) -> Commit:
    commit = repo.at(revision)
    if commit is None:
        raise _Refusal(404, "RevisionNotFound", "Invalid rev id")
    return commit


def whoami(request: _Handler, body: bytes) -> tuple[int, Any]:
    account = request.account()
    if account is None:
        raise _Refusal(401, message="Invalid username or password.")
    access = {"displayName": "test", "role": account.role, "fineGrained": {"scoped": list(account.scoped)}}
    orgs = [{"name": name, "roleInOrg": role} for name, role in account.orgs.items()]
    return 200, {"type": "user", "name": account.name, "orgs": orgs, "auth": {"accessToken": access}}


def create(request: _Handler, body: bytes) -> tuple[int, Any]:
    wish, account = json.loads(body), request.account()
    if account is None:
        raise _Refusal(401, message="Authentication required")
    repo_id = f"{wish.get('organization') or account.name}/{wish['name']}"
    if not account.writes(repo_id):
        raise _Refusal(403, message="You don't have the rights to create a model under this namespace")
    reply = {"url": f"{request.hub.url}/{repo_id}", "name": repo_id}
    if repo_id in request.hub.repos:
        return 409, {"error": "You already created this model repo", **reply}
    request.hub.created.append(wish)
    repo = request.hub.add_repo(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
    repo.private = wish.get("visibility") == "private" or bool(wish.get("private"))
    return 200, reply


def info(request: _Handler, body: bytes, repo: str, revision: str | None = None) -> tuple[int, Any]:
    found = request.repo(repo)
    commit = _commit_of(found, revision or "main")
    sizes = "blobs" in request.query
    siblings = [{"rfilename": path, **(_details(blob) if sizes else {})} for path, blob in commit.files.items()]
    return 200, {
        "id": repo,
        "sha": commit.sha,
        "private": found.private,
        "gated": "manual" if found.gated else False,
        "siblings": siblings,
        "tags": [],
    }


def _details(blob: Blob) -> dict[str, Any]:
    """Size and hashes of a file; the git id of one in LFS is that of its pointer."""
    if not blob.lfs:
        return {"size": len(blob.data), "blobId": blob.oid}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob.oid}\nsize {len(blob.data)}\n".encode()
    details = {"sha256": blob.oid, "size": len(blob.data), "pointerSize": len(pointer)}
    return {"size": len(blob.data), "blobId": Blob(pointer, False).oid, "lfs": details}


def tree(request: _Handler, body: bytes, repo: str, revision: str) -> tuple[int, Any]:
    rows = []
    for path, blob in _commit_of(request.repo(repo), revision).files.items():
        row: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid[:40]}
        if blob.lfs:
            row["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}
        rows.append(row)
    return 200, rows


def resolve(request: _Handler, body: bytes, repo: str, revision: str, path: str) -> tuple[int, Any, dict[str, str]]:
    commit = _commit_of(request.repo(repo, content=True), revision)
    blob = commit.files.get(path)
    if blob is None:
        raise _Refusal(404, "EntryNotFound", "Entry not found")
    headers = {
        "ETag": f'"{blob.oid}"',
        "X-Repo-Commit": commit.sha,
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not span:
        return 200, blob.data, headers
    start, stop = int(span[1]), min(int(span[2] or len(blob.data) - 1), len(blob.data) - 1) + 1
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(blob.data)}"
    return 206, blob.data[start:stop], headers


def preupload(request: _Handler, body: bytes, repo: str, revision: str) -> tuple[int, Any]:
    files = request.repo(repo, write=True).head.files
    rows = []
    for wish in json.loads(body)["files"]:
        path = wish["path"]
        mode = "lfs" if request.hub.lfs and path.endswith(LFS_SUFFIXES) else "regular"
        rows.append(
            {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": files[path].oid if path in files else None}
        )
    return 200, {"files": rows}


def lfs_batch(request: _Handler, body: bytes, repo: str) -> tuple[int, Any]:
    request.repo(repo, write=True)
    rows = []
    for wish in json.loads(body)["objects"]:
        row = {"oid": wish["oid"], "size": wish["size"]}
        if wish["oid"] not in request.hub.uploads:
            row["actions"] = {"upload": {"href": f"{request.hub.url}/_lfs/{wish['oid']}", "header": {}}}
        rows.append(row)
    return 200, {"transfer": "basic", "objects": rows}


def lfs_put(request: _Handler, body: bytes, oid: str) -> tuple[int, Any]:
    if hashlib.sha256(body).hexdigest() != oid:
        raise _Refusal(400, message="the content does not match its sha256")
    request.hub.uploads[oid] = body
    return 200, {}


def commit(request: _Handler, body: bytes, repo: str, revision: str) -> tuple[int, Any]:
    target = request.repo(repo, write=True)
    files, changed, message = dict(target.head.files), [], ""
    for line in body.decode().splitlines():
        row = json.loads(line)
        kind, value = row["key"], row["value"]
        if kind == "header":
            message = value["summary"]
            continue
        changed.append(value["path"])
        if kind == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif kind == "lfsFile":
            files[value["path"]] = Blob(request.hub.uploads[value["oid"]], True)
        elif kind == "deletedFile":
            del files[value["path"]]
    made = target.commit(message, files, tuple(changed))
    if request.hub.after:
        request.hub.after(made)
    return 200, {
        "success": True,
        "commitOid": made.sha,
        "commitUrl": f"{request.hub.url}/{repo}/commit/{made.sha}",
        "hookOutput": "",
    }


def validate_yaml(request: _Handler, body: bytes) -> tuple[int, Any]:
    return 200, {"errors": [], "warnings": []}


ROUTES = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", r"/api/repos/create", create),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", commit),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", tree),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", info),
    ("GET", rf"/api/models/{REPO}", info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]

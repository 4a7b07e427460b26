"""A Hugging Face Hub on 127.0.0.1 for tests: model repositories with commits, branches, pull requests and large files.

It speaks what the client `huggingface_hub` speaks with HF_HUB_DISABLE_XET=1, on the standard library alone:

    with MiniHub(folder, tokens={"hf_ann": "ann"}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}  # set before huggingface_hub is imported
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_FILES = ("*.safetensors", "*.png", "*.bin")
_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILES)
_POINTER_SIZE = 128


@dataclass(frozen=True)
class File:
    """A file of a commit: its git id, its size and, for a large one, the SHA-256 that it is stored under."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def lfs(self) -> dict[str, Any]:
        pointer = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": _POINTER_SIZE}
        return {"lfs": pointer} if self.sha256 else {}


@dataclass
class Commit:
    files: dict[str, File]
    title: str
    parent: str | None


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, files: dict[str, File], title: str) -> str:
        """Commit files to a branch, or to a new reference."""
        commit = Commit(files, title, self.refs.get(ref))
        sha = hashlib.sha1(repr((len(self.commits), commit)).encode()).hexdigest()
        self.commits[sha] = commit
        self.refs[ref] = sha
        return sha


class RefusalError(Exception):
    """An answer other than success, with the headers that the client tells errors by."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class MiniHub:
    """
    The server; a context manager.

    Args:
        root: a folder for what is stored.
        tokens: user names by token.

    Attributes:
        url: the endpoint.
        repositories: by id.
        requests: (method, path) of all that was asked.
        cut: files, as USER/NAME/PATH, whose downloads break off half-way.
    """

    def __init__(self, root: Path, tokens: dict[str, str]):
        self.root, self.tokens = root, tokens
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut: set[str] = set()
        self.lock = threading.RLock()
        root.mkdir(parents=True, exist_ok=True)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "MiniHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def store(self, data: bytes) -> File:
        """Store a small file."""
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (self.root / oid).write_bytes(data)
        return File(oid, len(data))

    def store_large(self, path: str, sha256: str) -> File:
        """Refer to a large file that was uploaded before."""
        if not (self.root / sha256).exists():
            raise RefusalError(400, f"{path}: was not uploaded")
        return File(sha256[:40], (self.root / sha256).stat().st_size, sha256)

    def read(self, repo_id: str, path: str, ref: str = "main") -> bytes:
        """The content of a repository's file."""
        repository = self.repositories[repo_id]
        file = repository.commits[repository.refs[ref]].files[path]
        return (self.root / (file.sha256 or file.oid)).read_bytes()

    def names(self, repo_id: str, ref: str = "main") -> set[str]:
        """Of a repository's files, without the one that every repository begins with."""
        repository = self.repositories[repo_id]
        return set(repository.commits[repository.refs[ref]].files) - {".gitattributes"}


class Handler(BaseHTTPRequestHandler):
    """Answers requests: finds the route of `ROUTES`, and calls its method with the body and the parts of the path."""

    hub: MiniHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for methods, pattern, route in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods.split():
                    with self.hub.lock:
                        route(self, body, **{name: unquote(part or "") for name, part in match.groupdict().items()})
                    return
            raise RefusalError(404, f"no route for {self.command} {url.path}")
        except RefusalError as refusal:
            self.send({"error": str(refusal)}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 (the base class's names)

    def send(self, body: Any = b"", status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in (defaults | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self) -> str | None:
        """Whose token the request carries; `None` without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        user, repository = self.user(), self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            raise RefusalError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != repo_id.split("/")[0]:
            raise RefusalError(403, "You don't have write access to this repository" if user else "Log in first")
        return repository

    def commit(self, repo_id: str, revision: str = "main") -> tuple[str, Commit]:
        repository = self.repository(repo_id)
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    def whoami(self, body: bytes) -> None:
        if (name := self.user()) is None:
            raise RefusalError(401, "Invalid username or password.")
        self.send({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": {}})

    def create(self, body: bytes) -> None:
        user, wanted = self.user(), json.loads(body)
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        owner = wanted.get("organization") or user
        repo_id = f"{owner}/{wanted['name']}"
        if owner != user:
            raise RefusalError(403, f"You don't have the rights to create a model under the namespace {owner}")
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repositories:
            return self.send({"error": "You already created this model repo", **url}, 409)
        repository = self.hub.repositories[repo_id] = Repository(wanted.get("visibility") == "private")
        repository.add("main", {".gitattributes": self.hub.store(_ATTRIBUTES.encode())}, "initial commit")
        self.send(url)

    def validate_card(self, body: bytes) -> None:
        has_metadata = json.loads(body)["content"].startswith("---\n")
        self.send({"errors": [] if has_metadata else [{"message": "no metadata"}], "warnings": []})

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        sha, commit = self.commit(repo_id, revision or "main")
        private = self.hub.repositories[repo_id].private
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.send({"id": repo_id, "sha": sha, "private": private, "tags": [], "siblings": siblings})

    def entries(self, repo_id: str, revision: str) -> list[dict[str, Any]]:
        files = self.commit(repo_id, revision)[1].files
        return [
            {"type": "file", "path": path, "oid": file.oid, "size": file.size, **file.lfs}
            for path, file in sorted(files.items())
        ]

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        self.send(self.entries(repo_id, revision))

    def paths_info(self, body: bytes, repo_id: str, revision: str) -> None:
        wanted = parse_qs(body.decode()).get("paths", [])
        self.send([entry for entry in self.entries(repo_id, revision) if entry["path"] in wanted])

    def create_branch(self, body: bytes, repo_id: str, name: str) -> None:
        repository = self.repository(repo_id, write=True)
        if name in repository.refs:
            raise RefusalError(409, f"Reference already exists: {name}")
        repository.refs[name] = self.commit(repo_id, json.loads(body or b"{}").get("startingPoint") or "main")[0]
        self.send({})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        self.repository(repo_id, write="create_pr" not in self.query)

        def mode(path: str) -> str:
            return "lfs" if any(fnmatch.fnmatch(path, pattern) for pattern in LARGE_FILES) else "regular"

        files = [
            {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.send({"files": files})

    def large_files(self, body: bytes, repo_id: str) -> None:
        self.repository(repo_id)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(body)["objects"]]
        for wanted in objects:
            href = f"{self.hub.url}/large-files/{wanted['oid']}"
            wanted["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        self.send({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def upload(self, body: bytes, sha256: str) -> None:
        if hashlib.sha256(body).hexdigest() != sha256:
            raise RefusalError(400, "these are other bytes")
        (self.hub.root / sha256).write_bytes(body)
        self.send()

    def verify(self, body: bytes, sha256: str) -> None:
        path = self.hub.root / sha256
        if not path.exists() or path.stat().st_size != json.loads(body)["size"]:
            raise RefusalError(404, "missing, or of another size")
        self.send({})

    def change(self, body: bytes, repo_id: str, revision: str) -> None:
        """Commit: a line of JSON an operation, to a branch or as a pull request."""
        as_request = "create_pr" in self.query
        repository = self.repository(repo_id, write=not as_request)
        if revision not in repository.refs:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head, commit = self.commit(repo_id, revision)
        files, title = dict(commit.files), ""
        for operation in map(json.loads, body.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if not as_request and value.get("parentCommit", head) != head:
                    raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = self.hub.store_large(value["path"], value["oid"])
            elif files.pop(value["path"], None) is None:
                raise RefusalError(404, f"There is no {value['path']}", "EntryNotFound")
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        sha = repository.add(f"refs/pr/{number}" if as_request else revision, files, title)
        url = f"{self.hub.url}/{repo_id}"
        request = {"pullRequestUrl": f"{url}/discussions/{number}"} if as_request else {}
        self.send({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **request})

    def download(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        sha, commit = self.commit(repo_id, revision)
        if (file := commit.files.get(path)) is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        data = (self.hub.root / (file.sha256 or file.oid)).read_bytes()
        headers = {"ETag": f'"{file.sha256 or file.oid}"', "X-Repo-Commit": sha}
        if file.sha256:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(file.size)}
        status, first = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, first = 206, int(match[1])
            headers["Content-Range"] = f"bytes {first}-{file.size - 1}/{file.size}"
        data = data[first:]
        headers |= {"Content-Length": str(len(data)), "Content-Type": "application/octet-stream"}
        if f"{repo_id}/{path}" in self.hub.cut and self.command == "GET":
            self.close_connection = True
            data = data[: len(data) // 2]
        self.send(data, status, headers)


def _routes() -> Iterator[tuple[str, str, Any]]:
    api, revision = r"/api/models/(?P<repo_id>[^/]+/[^/]+)", r"/(?P<revision>[^/]+)"
    yield "GET", r"/api/whoami-v2", Handler.whoami
    yield "POST", r"/api/repos/create", Handler.create
    yield "POST", r"/api/validate-yaml", Handler.validate_card
    yield "GET", rf"{api}(/revision{revision})?", Handler.info
    yield "GET", rf"{api}/tree{revision}", Handler.tree
    yield "POST", rf"{api}/paths-info{revision}", Handler.paths_info
    yield "POST", rf"{api}/branch/(?P<name>[^/]+)", Handler.create_branch
    yield "POST", rf"{api}/preupload{revision}", Handler.preupload
    yield "POST", rf"{api}/commit{revision}", Handler.change
    yield "POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.large_files
    yield "PUT", r"/large-files/(?P<sha256>[0-9a-f]{64})", Handler.upload
    yield "POST", r"/large-files/(?P<sha256>[0-9a-f]{64})/verify", Handler.verify
    yield "GET HEAD", rf"/(?P<repo_id>[^/]+/[^/]+)/resolve{revision}/(?P<path>.+)", Handler.download


ROUTES = list(_routes())

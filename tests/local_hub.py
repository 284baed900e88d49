# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""A Hub on this machine: what huggingface_hub's client uses of its HTTP API for models and Spaces, and such clients.

In memory; the ids of Spaces begin with `spaces/`; LFS by its "basic" transfer (clients run with
`HF_HUB_DISABLE_XET=1`). It answers refusals as the Hub does: 401 to strangers for what is private or missing, 404 to
others, 403 to who may not write. Connections can be made to break.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from .processes import Processes

TOKENS = {"hf_owner_token": "org", "hf_other_token": "somebody"}  # whose they are
LFS_SUFFIXES = (".safetensors", ".pt", ".pth", ".png")


def blob_id(content: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


@dataclass
class Repo:
    """A repository: commits in order, by their id, each with all its files."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        return sha

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the last commit."""
        return self.commits[self.head]

    def resolve(self, revision: str) -> str | None:
        return self.head if revision == "main" else (revision if revision in self.commits else None)


@dataclass
class Fault:
    """`times` requests whose `METHOD /path` matches are cut: before any answer, or after `after` bytes of the body."""

    pattern: str
    times: int = 1
    after: int | None = None


class LocalHub:
    """The server; `with LocalHub() as hub`.

    Attributes:
        url: For `HF_ENDPOINT`.
        repos: By their ids.
        requests: `METHOD /path` of each, and its `Range` header if it had one.
        faults: Breaks to come.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS uploads by their SHA-256
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, request: str) -> Fault | None:
        """The break that this request meets, used up by it."""
        fault = next((fault for fault in self.faults if re.search(fault.pattern, request)), None)
        if fault is not None:
            fault.times -= 1
            self.faults = [fault for fault in self.faults if fault.times > 0]
        return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_: Any) -> None:
        pass

    # -- wire -----------------------------------------------------------------------------------------------------

    def _body(self) -> bytes:
        if (length := self.headers.get("Content-Length")) is not None:
            return self.rfile.read(int(length))
        chunks = []
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline() or b"0", 16)):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        if chunks:
            self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: Any = b"", type_: str = "application/json", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": type_, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if self.cut is None else data[: self.cut])
        if self.cut is not None:
            self.close_connection = True

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self._send(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def _answer(self) -> None:
        parsed = urlparse(self.path)
        path, data = unquote(parsed.path), self._body()
        path = path.replace("/api/spaces/", "/api/models/spaces/")
        request = f"{self.command} {path}"
        with self.hub.lock:
            span = self.headers.get("Range")
            self.hub.requests.append(f"{request} {span}" if span else request)
            fault = self.hub.fault(request)
            if fault is not None and fault.after is None:
                self.close_connection = True
                return
            self.cut = None if fault is None else fault.after
            self.user = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            self._route(path, data)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _answer

    # -- routes ---------------------------------------------------------------------------------------------------

    def _route(self, path: str, data: bytes) -> None:
        if path == "/api/whoami-v2":
            known = {"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            self._send(200, known) if self.user else self._refuse(401, "Unauthorized", "Invalid credentials")
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(data))
        elif match := re.fullmatch(r"/objects/(\w+)", path):
            self._store(match[1], data)
        elif match := re.fullmatch(r"/((?:spaces/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._with_repo(match[1], True, lambda repo: self._batch(json.loads(data)))
        elif match := re.fullmatch(r"/api/models/((?:spaces/)?[^/]+/[^/]+)/(preupload|commit)/[^/]+", path):
            act = self._preupload if match[2] == "preupload" else self._commit
            self._with_repo(match[1], True, lambda repo: act(match[1], repo, data))
        elif match := re.fullmatch(r"/api/models/((?:spaces/)?[^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._with_revision(match[1], match[2] or "main", self._info)
        elif match := re.fullmatch(r"/api/models/((?:spaces/)?[^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self._with_revision(match[1], match[2], lambda *repo: self._tree(*repo, match[3] or ""))
        elif match := re.fullmatch(r"/((?:spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._with_revision(match[1], match[2], lambda *repo: self._file(*repo, match[3]))
        else:
            self._refuse(404, "NotFound")

    def _with_repo(self, repo_id: str, write: bool, then: Any) -> None:
        repo = self.hub.repos.get(repo_id)
        owner = self.user == repo_id.split("/")[-2]
        if repo is None or (repo.private and not owner):
            self._refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
        elif write and not owner:
            self._refuse(403 if self.user else 401, "Forbidden", "You have no write access to this repository")
        else:
            then(repo)

    def _with_revision(self, repo_id: str, revision: str, then: Any) -> None:
        def find(repo: Repo) -> None:
            sha = repo.resolve(revision)
            self._refuse(404, "RevisionNotFound") if sha is None else then(repo_id, repo, sha)

        self._with_repo(repo_id, False, find)

    def _create(self, request: dict[str, Any]) -> None:
        owner = request.get("organization") or self.user
        repo_id = f"{'spaces/' * (request.get('type') == 'space')}{owner}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id}
        if self.user is None:
            self._refuse(401, "Unauthorized", "Invalid username or password.")
        elif owner != self.user:
            self._refuse(403, "Forbidden", f"You have no rights to create a model under {owner}")
        elif repo_id in self.hub.repos:
            self._send(409, {"error": "You already created this model repo", **answer})
        else:
            private = bool(request.get("private")) or request.get("visibility") == "private"
            repo = self.hub.repos[repo_id] = Repo(private)
            repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
            self._send(200, answer)

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self._refuse(400, "BadRequest", "The checksum is wrong")
            return
        self.hub.objects[oid] = data
        self._send(200)

    def _batch(self, request: dict[str, Any]) -> None:
        objects = []
        for one in request["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}
            known = one["oid"] in self.hub.objects
            objects.append({"oid": one["oid"], "size": one["size"], **({} if known else {"actions": upload})})
        self._send(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def _preupload(self, repo_id: str, repo: Repo, data: bytes) -> None:
        def describe(path: str) -> dict[str, Any]:
            content, lfs = repo.files.get(path), is_lfs(path)
            oid = None if content is None else hashlib.sha256(content).hexdigest() if lfs else blob_id(content)
            return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

        self._send(200, {"files": [describe(one["path"]) for one in json.loads(data)["files"]]})

    def _commit(self, repo_id: str, repo: Repo, data: bytes) -> None:
        files = dict(repo.files)
        for line in map(json.loads, data.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self._refuse(400, "BadRequest", f"{value['path']} was not uploaded")
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        self._send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _info(self, repo_id: str, repo: Repo, sha: str) -> None:
        date = "2026-01-01T00:00:00.000Z"
        info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "tags": []}
        info |= {"downloads": 0, "likes": 0, "gated": False, "disabled": False, "lastModified": date, "createdAt": date}
        self._send(200, {**info, "siblings": [{"rfilename": name} for name in repo.commits[sha]]})

    def _tree(self, repo_id: str, repo: Repo, sha: str, folder: str) -> None:
        def describe(path: str, content: bytes) -> dict[str, Any]:
            entry = {"type": "file", "oid": blob_id(content), "size": len(content), "path": path}
            oid = hashlib.sha256(content).hexdigest()
            return {**entry, "lfs": {"oid": oid, "size": len(content), "pointerSize": 134}} if is_lfs(path) else entry

        files = [(path, content) for path, content in sorted(repo.commits[sha].items()) if path.startswith(folder)]
        self._send(200, [describe(*one) for one in files])

    def _file(self, repo_id: str, repo: Repo, sha: str, path: str) -> None:
        content = repo.commits[sha].get(path)
        if content is None:
            headers = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": sha}
            self._send(404, {"error": "Entry not found"}, **headers)
            return
        headers = {"X_Repo_Commit": sha, "Accept_Ranges": "bytes", "ETag": f'"{blob_id(content)}"'}
        if is_lfs(path):
            headers |= {"X_Linked_Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Linked_Size": str(len(content))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], "application/octet-stream", **headers)
        else:
            self._send(200, content, "application/octet-stream", **headers)


# -- clients --------------------------------------------------------------------------------------------------------


def _answer(connection: Any) -> None:
    """Runs the code it is sent in one namespace, until nobody is left to send it."""
    namespace: dict[str, Any] = {}
    while True:
        try:
            code, token = connection.recv()
        except EOFError:
            return
        os.environ.pop("HF_TOKEN", None)
        os.environ.update({"HF_TOKEN": token} if token else {})
        output, answer = io.StringIO(), {"result": None, "error": ""}
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                exec(code, namespace)
                answer["result"] = namespace.pop("result", None)
            except BaseException as error:
                traceback.print_exc()
                answer["error"] = f"{type(error).__name__}: {error}"
        connection.send({**answer, "output": output.getvalue()})


class Client:
    """A process that talks to the Hub: huggingface_hub reads its address at import, so that a test cannot do it itself.

    Args:
        folder: Where it works.
        clmae: Whether `clmae` can be imported there.
    """

    def __init__(self, processes: Processes, folder: Path, clmae: bool = True):
        self._connection, there = multiprocessing.Pipe()
        processes.start(_answer, there, folder=folder, clmae=clmae)
        there.close()

    def attempt(self, code: str, token: str | None = None) -> dict[str, Any]:
        """Runs code as the user of a token, one of `TOKENS`, or as a stranger.

        Returns `result` (what the code put there), `output` (all that it printed) and `error`.
        """
        self._connection.send((code, token))
        return self._connection.recv()

    def run(self, code: str, token: str | None = None) -> Any:
        """The `result` of code that must not fail."""
        answer = self.attempt(code, token)
        assert not answer["error"], answer["output"]
        return answer["result"]

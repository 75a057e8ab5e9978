"""A local server that speaks as much of the Hugging Face Hub's API as uploading and reading a dataset take.

It keeps what it is given as the Hub does: LFS objects by their sha256, commits as trees of paths, branches and tags.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"


def oid_of(data: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """What the server holds: one dataset repository."""

    repo: str
    exists: bool = False
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256
    commits: dict[str, dict[str, tuple[str, bytes]]] = field(default_factory=dict)  # path: lfs or regular, content
    refs: dict[str, str] = field(default_factory=lambda: {"main": hashlib.sha1(b"first").hexdigest()})
    tags: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)  # method and path of each request
    uploads_until_broken: int | None = None  # so many uploads are taken, then connections break

    def __post_init__(self) -> None:
        self.commits[self.refs["main"]] = {".gitattributes": ("regular", b"*.parquet filter=lfs\n")}

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit's name stands for."""
        found = self.refs.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None

    def entries(self, commit: str) -> list[dict[str, Any]]:
        """A tree as the API lists it."""
        found = []
        for path, (mode, data) in sorted(self.commits[commit].items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid_of(data)}
            if mode == "lfs":
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            found.append(entry)
        return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _any(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.log.append(f"{self.command} {path}")
        body = self._body()
        api, git = f"/api/datasets/{hub.repo}", f"/datasets/{hub.repo}"
        if path.startswith("/lfs/"):
            return self._upload(path.removeprefix("/lfs/"), body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "who are you?"}, 401)
        if path == "/api/repos/create":
            known, hub.exists = hub.exists, True
            return self._answer({"url": f"{self._address()}{git}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if not hub.exists:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if path == f"{git}.git/info/lfs/objects/batch":
            return self._batch(json.loads(body))
        if path == f"{api}/refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in hub.refs.items()]
            tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in hub.tags.items()]
            return self._answer({"branches": branches, "tags": tags, "converts": []})
        found = re.fullmatch(
            rf"{re.escape(api)}/(preupload|commit|tag|tree|paths-info|revision)/([^/]+)(?:/(.*))?", path
        )
        if found is not None:
            return self._of_revision(found[1], found[2], found[3] or "", body)
        if path == api:
            return self._of_revision("revision", "main", "", body)
        found = re.fullmatch(rf"{re.escape(git)}/resolve/([^/]+)/(.+)", path)
        if found is not None:
            return self._resolve(found[1], found[2])
        self._answer({"error": f"nothing at {path}"}, 404, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _address(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"

    def _upload(self, oid: str, body: bytes) -> None:
        if self.hub.uploads_until_broken is not None:
            if self.hub.uploads_until_broken == 0:
                self.close_connection = True
                self.connection.close()
                return
            self.hub.uploads_until_broken -= 1
        assert hashlib.sha256(body).hexdigest() == oid, "what was uploaded is not what was announced"
        self.hub.objects[oid] = body
        self._answer({})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            known = one["oid"] in self.hub.objects
            actions = {} if known else {"actions": {"upload": {"href": f"{self._address()}/lfs/{one['oid']}"}}}
            objects.append({**one, **actions})
        self._answer({"transfer": "basic", "objects": objects})

    def _of_revision(self, what: str, revision: str, path: str, body: bytes) -> None:
        hub = self.hub
        commit = hub.commit_of(revision)
        if commit is None:
            return self._answer({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        tree = hub.commits[commit]
        if what == "preupload":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".parquet") else "regular",
                    "shouldIgnore": False,
                    **({"oid": oid_of(tree[one["path"]][1])} if one["path"] in tree else {}),
                }
                for one in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if what == "commit":
            return self._commit(revision, tree, [json.loads(line) for line in body.splitlines()])
        if what == "tag":
            hub.tags[json.loads(body)["tag"]] = commit
            return self._answer({})
        if what == "paths-info":
            wanted = dict(_form(body)) if not body.startswith(b"{") else json.loads(body)
            paths = wanted["paths"] if isinstance(wanted["paths"], list) else [wanted["paths"]]
            return self._answer([one for one in hub.entries(commit) if one["path"] in paths])
        entries = hub.entries(commit)
        if what == "tree":
            inside = [one for one in entries if not path or one["path"].startswith(f"{path}/")]
            if path and not inside:
                return self._answer({"error": "no such path"}, 404, X_Error_Code="EntryNotFound")
            if "recursive=true" not in self.path.lower():
                inside = _directly_below(inside, path)
            return self._answer(inside)
        siblings = [{"rfilename": one["path"]} for one in entries]
        self._answer(
            {"id": hub.repo, "sha": commit, "siblings": siblings, "private": True, "disabled": False, "downloads": 0}
            | {"likes": 0, "tags": [], "gated": False, "author": hub.repo.split("/")[0]}
        )

    def _commit(self, branch: str, tree: dict[str, tuple[str, bytes]], lines: list[dict[str, Any]]) -> None:
        hub, made = self.hub, dict(tree)
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != hub.refs[branch]:
            return self._answer({"error": "A commit has happened since"}, 412)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                made[value["path"]] = ("regular", base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                made[value["path"]] = ("lfs", hub.objects[value["oid"]])
            else:
                del made[value["path"]]
        commit = hashlib.sha1(json.dumps([hub.refs[branch], sorted(made)]).encode()).hexdigest()
        hub.commits[commit], hub.refs[branch] = made, commit
        self._answer({"commitOid": commit, "commitUrl": f"{self._address()}/datasets/{hub.repo}/commit/{commit}"})

    def _resolve(self, revision: str, path: str) -> None:
        commit = self.hub.commit_of(revision)
        if commit is None or path not in self.hub.commits[commit]:
            return self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        data = self.hub.commits[commit][path][1]
        headers = {"ETag": f'"{oid_of(data)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._answer(data, **headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        self._answer(data[start : end + 1], 206, Content_Range=f"bytes {start}-{end}/{len(data)}", **headers)


def _form(body: bytes) -> dict[str, list[str]]:
    from urllib.parse import parse_qs

    return parse_qs(body.decode())


def _directly_below(entries: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """Files of a folder, and its folders, once each."""
    found: dict[str, dict[str, Any]] = {}
    for one in entries:
        rest = one["path"][len(path) + 1 if path else 0 :]
        first, slash, _ = rest.partition("/")
        name = f"{path}/{first}" if path else first
        found[name] = {"type": "directory", "path": name, "oid": oid_of(name.encode()), "size": 0} if slash else one
    return list(found.values())


@contextlib.contextmanager
def running_hub(repo: str) -> Iterator[tuple[str, Hub]]:
    """The address of a server with an empty Hub, and what it holds."""
    hub = Hub(repo)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        server.server_close()

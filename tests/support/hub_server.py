"""A Hub on loopback: what huggingface_hub asks of the Hub, answered from memory, failing when told to.

The real client runs against it over HTTP, so tests of publishing mock nothing. It knows models and datasets, branches,
tags, Git LFS, private and gated repositories, and three callers: one who may write, one who may read, one unknown.
Nothing is paged, signed or kept; pull requests, Spaces and multipart uploads are answered with an error.
Calls and headers are those of the client's source, huggingface_hub 2.4.0 (hf_api.py, _commit_api.py, lfs.py,
file_download.py, utils/_http.py); `private` beside `visibility`, and xet in LFS batches, are for clients from 1.5 on.

Xet: with hf_xet installed and HF_HUB_DISABLE_XET not set, the client does not fall back, whatever the answer (measured
with huggingface_hub 2.4.0 and hf_xet 1.8.0). It asks for a token for the first file that preupload calls `lfs`, changed
or not, never calls the LFS batch, and where there is no token nothing is committed:
- `xet="off"` knows no Xet, as older or private Hubs: the token is answered 404;
- `xet="refused"` has it (X-Xet-Hash with every LFS file, "xet" for LFS batches that offer it) and answers 403.
An upload ends in the builtin ConnectionError, an OSError and no HfHubHTTPError: "Network error: Request error: HTTP
status client error (403 Forbidden), domain: http://.../xet-write-token/main". A storage that refuses in place of the
token gives the same. Of 429 and 5xx there are six tries first: 67 s where the token is so answered, 335 s where the
storage is. A download from "refused" ends in HfHubHTTPError 403. huggingface_hub 1.5.0 asks the LFS batch first: it is
content with "off", and of "refused" it raises HfHubHTTPError. HF_HUB_DISABLE_XET=1 is the way out for all of them.

Run it by hand: python tests/support/hub_server.py
"""

import base64
import hashlib
import http.server
import json
import re
import secrets
import socket
import string
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "tester"
LICENCES = ["apache-2.0", "mit", "cc-by-4.0", "cc0-1.0", "unknown", "other"]
# The Hub's default .gitattributes names these and more; larger files go to LFS whatever they are called.
LFS_SUFFIXES = (".safetensors", ".parquet", ".pt", ".onnx", ".bin")
LFS_FROM_BYTES = 1_000_000
NO_SUCH_REPO = "Repository not found"
FAULT_TEXTS = {
    401: ("Invalid credentials in Authorization header", None),
    403: ("You don't have the required permissions to perform this action", None),
    404: (NO_SUCH_REPO, "RepoNotFound"),
    409: ("Conflict: another operation on this repository is in progress", None),
    412: ("A commit has happened since. Please refresh and try again.", None),
    429: ("We had to rate limit you", None),
    500: ("Internal Error - We're working hard to fix this as soon as possible!", None),
    503: ("Service Temporarily Unavailable", None),
}


@dataclass(frozen=True)
class Pointer:
    """A file in LFS: a commit holds this, the store holds the bytes."""

    sha256: str
    size: int

    @property
    def text(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


Files = Mapping[str, bytes | Pointer]


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    message: str
    date: str
    parent: "Commit | None"
    files: Files

    def history(self) -> "Iterator[Commit]":
        commit: Commit | None = self
        while commit:
            yield commit
            commit = commit.parent

    def last_change_of(self, path: str) -> "Commit":
        def has_changed(commit: Commit) -> bool:
            return not commit.parent or commit.parent.files.get(path) != commit.files.get(path)

        return next(commit for commit in self.history() if has_changed(commit))


@dataclass
class Repository:
    """Commits are never altered: what a branch or a tag points at changes in one assignment, or not at all."""

    repo_type: str
    repo_id: str
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def url(self, hub: "HubServer") -> str:
        return f"{hub.url}/{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"

    def add_commit(self, branch: str, files: Files, title: str, message: str = "") -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(secrets.token_hex(20), title, message, date, self.branches.get(branch), dict(files))
        self.commits[commit.sha] = commit
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> Commit:
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        found = self.branches.get(name) or self.tags.get(name)
        if not found and re.fullmatch("[0-9a-f]{7,40}", revision):
            found = next((commit for sha, commit in self.commits.items() if sha.startswith(revision)), None)
        if not found:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


@dataclass
class Fault:
    """What goes wrong, with the next `times` calls of this method whose path has `path` in it.

    status       the call is answered with `status`, and `Retry-After: retry_after` if that is given
    drop         the connection breaks after half of the body: of the request, or of the answer to a GET
    lose_answer  the call is done, and the connection breaks before the answer
    slow         the call is done, and answered `seconds` later
    overtake     somebody else commits to main first; then the call is done
    echo_token   as status, by a rude proxy that repeats the request's Authorization header in its answer
    """

    status: int = 500
    method: str = "POST"
    path: str = "/commit/"
    times: int = 1
    retry_after: int | None = None
    kind: Literal["status", "drop", "lose_answer", "slow", "overtake", "echo_token"] = "status"
    seconds: float = 0.2


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class RefusalError(Exception):
    """An answer other than success, with the headers from which the client tells what it is."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any):
        super().__init__(message)
        codes = {"X-Error-Code": code} if code else {}
        headers = {"X-Error-Message": message, **codes, "Content-Type": "application/json"}
        self.answer = Answer(json.dumps({"error": message, **more}).encode(), status, headers)


def json_answer(value: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


@dataclass
class Call:
    """One request: the parts of its path by name, and what its token allows."""

    hub: "HubServer"
    parts: dict[str, str]
    query: dict[str, list[str]]
    headers: Message
    body: bytes
    may: Literal["write", "read", "nothing"]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def key(self) -> tuple[str, str]:
        return self.parts.get("kind", "models").removesuffix("s"), self.parts["id"]

    def repository(self, to: Literal["read", "write"] = "read") -> Repository:
        """Without a token the Hub says 401 and not whether there is such a repository, with one it says 404."""
        repository = self.hub.repositories.get(self.key)
        if repository is None or (repository.private and self.may == "nothing"):
            # With the code, because the client takes a bare 401 for a missing repository at https:// addresses only.
            raise RefusalError(401 if self.may == "nothing" else 404, NO_SUCH_REPO, "RepoNotFound")
        if to == "write":
            self.must_write()
        return repository

    def must_write(self) -> None:
        if self.may == "nothing":
            raise RefusalError(401, "Invalid username or password.")
        if self.may == "read":
            raise RefusalError(403, "You don't have the rights to do this: your token has no write permission")

    def commit(self) -> Commit:
        return self.repository().find(self.parts.get("revision", "main"))


def git_sha1(content: bytes | Pointer) -> str:
    data = content.text if isinstance(content, Pointer) else content
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def whoami(call: Call) -> Answer:
    if call.may == "nothing":
        raise RefusalError(401, "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": call.may}}
    return json_answer({"type": "user", "id": "1", "name": OWNER, "fullname": OWNER, "orgs": [], "auth": token})


def validate_yaml(call: Call) -> Answer:
    """Of the front matter only the licence is looked at."""
    found = re.search(r"(?m)^license: *(.*)$", call.json["content"])
    licence = found.group(1).strip("\"' ") if found else "unknown"
    if licence in LICENCES:
        return json_answer({"errors": [], "warnings": []})
    return json_answer({"error": f'Invalid metadata in README.md. "license" must be one of {LICENCES}'}, 400)


def auth_check(call: Call) -> Answer:
    call.repository("write" if call.parts.get("write") else "read")
    return json_answer({})


def wants_private(payload: dict[str, Any], otherwise: bool) -> bool:
    if "visibility" in payload:
        return payload["visibility"] == "private"
    return bool(payload.get("private", otherwise))


def create_repo(call: Call) -> Answer:
    call.must_write()
    wanted = call.json
    repo_type, repo_id = wanted.get("type") or "model", f"{wanted.get('organization') or OWNER}/{wanted['name']}"
    repository = Repository(repo_type, repo_id, wants_private(wanted, otherwise=False))
    if repo_type not in ("model", "dataset"):
        raise RefusalError(400, f"This server has models and datasets only, not {repo_type}")
    if (repo_type, repo_id) in call.hub.repositories:
        raise RefusalError(409, f"You already created this {repo_type} repo: {repo_id}", url=repository.url(call.hub))
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
    repository.add_commit("main", {".gitattributes": attributes.encode()}, "initial commit")
    call.hub.repositories[repo_type, repo_id] = repository
    return json_answer({"url": repository.url(call.hub), "name": repo_id, "id": secrets.token_hex(12)})


def delete_repo(call: Call) -> Answer:
    call.must_write()
    wanted = call.json
    call.parts = {
        "kind": wanted.get("type") or "model",
        "id": f"{wanted.get('organization') or OWNER}/{wanted['name']}",
    }
    call.repository("write")
    del call.hub.repositories[call.key]
    return json_answer("OK")


def change_settings(call: Call) -> Answer:
    repository, wanted = call.repository("write"), call.json
    repository.private = wants_private(wanted, otherwise=repository.private)
    repository.gated = bool(wanted.get("gated", repository.gated))
    return json_answer({"private": repository.private, "gated": repository.gated})


def preupload(call: Call) -> Answer:
    """Which files go to LFS, and the hash of those that are there: the client leaves out what has not changed."""
    files = call.repository("write").find(call.parts["revision"]).files

    def describe(path: str, size: int) -> dict[str, Any]:
        mode = "lfs" if path.endswith(LFS_SUFFIXES) or size > LFS_FROM_BYTES else "regular"
        found = files.get(path)
        oid = found.sha256 if isinstance(found, Pointer) else found if found is None else git_sha1(found)
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    return json_answer({"files": [describe(file["path"], file["size"]) for file in call.json["files"]]})


def lfs_batch(call: Call) -> Answer:
    """An object that the store has gets no upload action: that is all there is to resuming an upload."""
    repository = call.repository("write")
    if call.hub.xet == "refused" and "xet" in call.json.get("transfers", []):
        return json_answer({"transfer": "xet", "objects": call.json["objects"]})
    verify = {"href": f"{repository.url(call.hub)}.git/info/lfs/verify"}
    objects = []
    for wanted in call.json["objects"]:
        if wanted["oid"] not in call.hub.store:
            upload = {"href": f"{call.hub.url}/lfs/{wanted['oid']}", "header": {}}
            call.hub.awaited.add(wanted["oid"])
            wanted = {**wanted, "actions": {"upload": upload, "verify": verify}}
        objects.append(wanted)
    return json_answer({"transfer": "basic", "objects": objects})


def lfs_put(call: Call) -> Answer:
    """No token here: the address was given to one who had it, as the Hub gives a signed one of its storage."""
    sha256 = call.parts["sha256"]
    if sha256 not in call.hub.awaited:
        raise RefusalError(403, "AccessDenied")
    if hashlib.sha256(call.body).hexdigest() != sha256:
        raise RefusalError(400, "XAmzContentSHA256Mismatch")
    call.hub.store[sha256] = call.body
    return Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


def lfs_verify(call: Call) -> Answer:
    call.repository("write")
    if len(call.hub.store.get(call.json["oid"], b"")) != call.json["size"]:
        raise RefusalError(404, "The object is not in the store")
    return json_answer({})


def commit(call: Call) -> Answer:
    """All the operations, or an answer that says why not; nothing is seen of them until the branch moves."""
    repository, branch = call.repository("write"), call.parts["revision"]
    head = repository.branches.get(branch)
    if "create_pr" in call.query:
        raise RefusalError(400, "This server has no pull requests")
    if head is None:
        raise RefusalError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    files, header = dict(head.files), {"summary": "", "description": ""}
    for line in call.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            header = value
            if not head.sha.startswith(header.get("parentCommit") or ""):
                raise RefusalError(412, FAULT_TEXTS[412][0])
        elif item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            if value["oid"] not in call.hub.store:
                raise RefusalError(400, "LFS pointer pointed to a file that does not exist")
            files[value["path"]] = Pointer(value["oid"], len(call.hub.store[value["oid"]]))
        elif item["key"] in ("deletedFile", "deletedFolder"):
            path = value["path"].rstrip("/")
            folder = item["key"] == "deletedFolder"
            gone = [name for name in files if name == path or (folder and name.startswith(path + "/"))]
            if not gone:
                raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise RefusalError(400, f"Unknown operation: {item['key']}")
    made = repository.add_commit(branch, files, header["summary"], header["description"])
    return json_answer(
        {"success": True, "commitOid": made.sha, "commitUrl": f"{repository.url(call.hub)}/commit/{made.sha}"}
    )


def describe_ref(name: str, kind: str, target: Commit) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": target.sha}


def refs(call: Call) -> Answer:
    repository = call.repository()
    branches = [describe_ref(name, "heads", target) for name, target in repository.branches.items()]
    tags = [describe_ref(name, "tags", target) for name, target in repository.tags.items()]
    return json_answer({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def create_ref(call: Call) -> Answer:
    """POST branch/NAME with where it starts, or tag/REVISION with its name: so the two calls are."""
    repository = call.repository("write")
    is_tag = call.parts["ref"] == "tag"
    name = call.json["tag"] if is_tag else call.parts["name"]
    known = repository.tags if is_tag else repository.branches
    if name in known:
        raise RefusalError(409, f"Reference already exists: {name}")
    known[name] = repository.find(call.parts["name"] if is_tag else call.json.get("startingPoint", "main"))
    return json_answer({})


def delete_ref(call: Call) -> Answer:
    repository, name = call.repository("write"), call.parts["name"]
    known = repository.tags if call.parts["ref"] == "tag" else repository.branches
    if name not in known:
        raise RefusalError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    if known is repository.branches and name == "main":
        raise RefusalError(403, "The main branch cannot be deleted")
    del known[name]
    return json_answer({})


def size_and_lfs(content: bytes | Pointer, oid_key: str) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"size": len(content)}
    lfs = {oid_key: content.sha256, "size": content.size, "pointerSize": len(content.text)}
    return {"size": content.size, "lfs": lfs}


def repo_info(call: Call) -> Answer:
    """`expand` and `securityStatus` change nothing: the client takes what it knows of all that is sent."""
    repository, found = call.repository(), call.commit()
    details = (
        {path: {} for path in found.files}
        if "blobs" not in call.query
        else {
            path: {"blobId": git_sha1(content), **size_and_lfs(content, "sha256")}
            for path, content in found.files.items()
        }
    )
    first = list(found.history())[-1]
    return json_answer(
        {
            "id": repository.repo_id,
            "author": repository.repo_id.split("/")[0],
            "sha": found.sha,
            "lastModified": found.date,
            "createdAt": first.date,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path, **detail} for path, detail in details.items()],
        }
    )


def describe_path(found: Commit, path: str, expand: bool) -> dict[str, Any] | None:
    """A file, a folder, or None: folders are there through what is in them, as in git."""
    content = found.files.get(path)
    if content is not None:
        entry = {"type": "file", "path": path, "oid": git_sha1(content), **size_and_lfs(content, "oid")}
    elif any(name.startswith(path + "/") for name in found.files):
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    else:
        return None
    if expand:
        change = found.last_change_of(path)
        entry["lastCommit"] = {"id": change.sha, "title": change.title, "date": change.date}
    return entry


def tree(call: Call) -> Answer:
    found, folder = call.commit(), call.parts.get("path", "")
    prefix = f"{folder}/" if folder else ""
    below = [name.removeprefix(prefix).split("/") for name in found.files if name.startswith(prefix)]
    if folder and not below:
        raise RefusalError(404, f'{folder} does not exist on "{found.sha}"', "EntryNotFound")
    deepest = max(map(len, below), default=1) if call.query.get("recursive", ["false"])[0].lower() == "true" else 1
    paths = {prefix + "/".join(names[:depth]) for names in below for depth in range(1, min(deepest, len(names)) + 1)}
    expand = call.query.get("expand", ["false"])[0].lower() == "true"
    return json_answer([describe_path(found, path, expand) for path in sorted(paths)])


def paths_info(call: Call) -> Answer:
    wanted = parse_qs(call.body.decode())
    expand = wanted.get("expand", ["false"])[0].lower() == "true"
    entries = [describe_path(call.commit(), path.rstrip("/"), expand) for path in wanted.get("paths", [])]
    return json_answer([entry for entry in entries if entry])


def list_commits(call: Call) -> Answer:
    return json_answer(
        [
            {
                "id": made.sha,
                "title": made.title,
                "message": made.message,
                "date": made.date,
                "authors": [{"user": OWNER}],
            }
            for made in call.commit().history()
        ]
    )


def resolve(call: Call) -> Answer:
    """A file or a part of it. The Hub redirects to its storage for LFS; here the storage is the same place."""
    repository = call.repository()
    if repository.gated and call.may != "write":
        raise RefusalError(
            401 if call.may == "nothing" else 403, "Access to this repository is restricted", "GatedRepo"
        )
    found = call.commit()
    content = found.files.get(call.parts["path"])
    headers = {"X-Repo-Commit": found.sha, "Accept-Ranges": "bytes"}
    if content is None:
        headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Answer(b"Entry not found", 404, headers)
    data = content if isinstance(content, bytes) else call.hub.store[content.sha256]
    headers |= {"ETag": f'"{git_sha1(content)}"', "Content-Type": "application/octet-stream"}
    if isinstance(content, Pointer):
        headers |= {"X-Linked-Etag": f'"{content.sha256}"', "X-Linked-Size": str(content.size)}
        if call.hub.xet == "refused":
            route = f"{call.hub.url}/api/{repository.repo_type}s/{repository.repo_id}/xet-read-token/{found.sha}"
            headers |= {"X-Xet-Hash": content.sha256, "X-Xet-Refresh-Route": route}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range") or "")
    if not wanted:
        return Answer(data, 200, headers)
    first, last = wanted.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{len(data)}"})
    return Answer(data[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def xet_token(call: Call) -> Answer:
    call.repository("write" if call.parts["right"] == "write" else "read")
    if call.hub.xet == "off":
        raise RefusalError(404, "Not Found")
    raise RefusalError(403, "Xet is not available to you")


API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
GIT = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"
CALLS: list[tuple[str, str, Callable[[Call], Answer]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", API + "/auth-check(?P<write>/write)?", auth_check),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("PUT", API + "/settings", change_settings),
    ("POST", API + "/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", API + "/commit/(?P<revision>[^/]+)", commit),
    ("GET", API + "/xet-(?P<right>read|write)-token/[^/]+", xet_token),
    ("GET", API + "/refs", refs),
    ("POST", API + "/(?P<ref>branch|tag)/(?P<name>[^/]+)", create_ref),
    ("DELETE", API + "/(?P<ref>branch|tag)/(?P<name>[^/]+)", delete_ref),
    ("GET", API + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", tree),
    ("POST", API + "/paths-info/(?P<revision>[^/]+)", paths_info),
    ("GET", API + "/commits/(?P<revision>[^/]+)", list_commits),
    ("GET", API + "(?:/revision/(?P<revision>[^/]+))?", repo_info),
    ("POST", GIT + r"\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", GIT + r"\.git/info/lfs/verify", lfs_verify),
    ("PUT", "/lfs/(?P<sha256>[0-9a-f]{64})", lfs_put),
    ("GET", GIT + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    hub: "HubServer"

    def handle_call(self) -> None:
        path = urlsplit(self.path).path
        fault = self.hub.fault_for(self.command, path) or Fault(kind="slow", seconds=0)
        if fault.kind == "drop" and self.command != "GET":
            self.read_body(half=True)
            return self.hang_up(path)
        body = self.read_body()
        if fault.kind in ("status", "echo_token"):
            return self.send(path, self.faulty_answer(fault))
        answer = self.answer(path, body, overtake=fault.kind == "overtake")
        if fault.kind == "lose_answer":
            return self.hang_up(path)
        time.sleep(fault.seconds if fault.kind == "slow" else 0)
        return self.send(path, answer, half=fault.kind == "drop")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_call

    def answer(self, path: str, body: bytes, overtake: bool) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for known_method, pattern, function in CALLS:
            if known_method == method and (match := re.fullmatch(pattern, path)):
                parts = {name: unquote(part) for name, part in match.groupdict().items() if part}
                query = parse_qs(urlsplit(self.path).query)
                try:
                    call = Call(self.hub, parts, query, self.headers, body, self.hub.rights(self.headers))
                    with self.hub.lock:
                        if overtake:
                            self.hub.commit_by_somebody_else(*call.key)
                        return function(call)
                except RefusalError as refusal:
                    return refusal.answer
        return RefusalError(404, f"This server does not know {method} {path}").answer

    def faulty_answer(self, fault: Fault) -> Answer:
        message, code = FAULT_TEXTS.get(fault.status, ("Failing as told", None))
        if fault.kind == "echo_token":
            message = f"{message} [proxy: request headers were Authorization: {self.headers.get('Authorization')}]"
        answer = RefusalError(fault.status, message, code).answer
        retry_after = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        return Answer(answer.body, answer.status, {**answer.headers, **retry_after})

    def read_body(self, half: bool = False) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length // 2 if half else length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
            if half:
                return chunks[0]
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, path: str, answer: Answer, half: bool = False) -> None:
        self.hub.note(self.command, path, answer.status)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if half else answer.body)
        self.wfile.flush()
        if half:
            self.close_connection = True

    def hang_up(self, path: str) -> None:
        """A reset and not a tidy end, so that a client still sending learns of it at once."""
        self.hub.note(self.command, path, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        """Nothing: what was asked is in `HubServer.requests`."""


class Listener(http.server.ThreadingHTTPServer):
    """Knows its connections, so that a client that keeps one open cannot go on talking to a server that is gone."""

    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[Handler]):
        self.connections: set[Any] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        # No shutdown() before close(): it would turn the reset of `hang_up` into a tidy end.
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away in the middle are part of the tests; any other error is a mistake in here."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def hang_up_on_all(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url` until the block ends. All of its state is in memory.

    `home` is where processes that `environment` is given to keep what they download.
    """

    def __init__(self, port: int = 0, xet: Literal["off", "refused"] = "off", home: Path | None = None):
        self.port, self.xet, self.home = port, xet, home
        self.token, self.read_token = new_token(), new_token()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.store: dict[str, bytes] = {}
        self.awaited: set[str] = set()
        self.requests: list[tuple[str, str, int]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        self.listener = Listener(("127.0.0.1", self.port), type("HandlerOfOneHub", (Handler,), {"hub": self}))
        self.port = self.listener.server_port
        self.thread = threading.Thread(target=self.listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listener.shutdown()
        self.listener.server_close()
        self.listener.hang_up_on_all()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process has to be started with to use this server and nothing outside."""
        return {
            **({"HF_HOME": str(self.home)} if self.home else {}),
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }

    def play(self, *faults: Fault) -> None:
        """The faults to come; of two that fit a call, the first is taken until it is used up."""
        with self.lock:
            self.faults += [replace(fault) for fault in faults]

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and method == fault.method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    def note(self, method: str, path: str, status: int) -> None:
        """`requests` has every call: method, path without its query, and status, or 0 where the connection broke."""
        with self.lock:
            self.requests.append((method, path, status))

    def rights(self, headers: Message) -> Literal["write", "read", "nothing"]:
        token = headers.get("Authorization")
        if not token:
            return "nothing"
        if token == f"Bearer {self.token}":
            return "write"
        if token == f"Bearer {self.read_token}":
            return "read"
        raise RefusalError(401, FAULT_TEXTS[401][0])

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """What somebody who downloads this revision gets."""
        files = self.repositories[repo_type, repo_id].find(revision).files
        return {
            path: self.store[content.sha256] if isinstance(content, Pointer) else content
            for path, content in files.items()
        }

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[tuple[str, str]]:
        """Hash and title, last commit first; the oldest is the Hub's own, with .gitattributes."""
        history = self.repositories[repo_type, repo_id].find(revision).history()
        return [(made.sha, made.title) for made in history]

    def is_private(self, repo_id: str, repo_type: str = "model") -> bool:
        return self.repositories[repo_type, repo_id].private

    def commit_by_somebody_else(self, repo_type: str, repo_id: str) -> Commit:
        repository = self.repositories[repo_type, repo_id]
        note = b"somebody else was here\n"
        files = {**repository.branches["main"].files, "notes.txt": note}
        if "vocab.txt" in files:
            files["vocab.txt"] = note
        return repository.add_commit("main", files, "A commit by somebody else")


def free_port() -> int:
    """Below the ports that systems hand out by themselves, so that nothing takes it before a server does."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def new_token() -> str:
    return "hf_" + "".join(secrets.choice(string.ascii_letters) for _ in range(34))


if __name__ == "__main__":
    with HubServer() as hub:
        print("\n".join(f"export {name}={value}" for name, value in hub.environment.items()), flush=True)
        with suppress(KeyboardInterrupt):
            hub.thread.join()

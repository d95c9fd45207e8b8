"""What the loopback Hub keeps: repositories with their branches, commits, pull requests and large objects.

Sums are computed as git and git-lfs do (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects,
https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md); a Xet store's index is read as its page lays it out
(https://huggingface.co/docs/xet/shard). Nothing here knows of HTTP but `Refusal`, which names the status to answer.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".gguf", ".model", ".bin", ".pth", ".png")
REGULAR_LIMIT = 10 * 1024 * 1024  # bytes; a file above it must be a large object
WHEN = "2026-01-02T03:04:05.000Z"
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()


class Refusal(Exception):
    """The request is answered with this status; `code` is the Hub's own word for it (X-Error-Code)."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


def is_large(path: str, size: int) -> bool:
    """Whether the Hub wants this file as a large object; an empty one never is."""
    return size > 0 and (path.endswith(LARGE) or size > REGULAR_LIMIT)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The small file that git keeps in place of a large object."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Blob:
    """A file as stored. `oid` is git's sum of what git keeps: the content, or the pointer to a large object."""

    size: int
    oid: str
    sha256: str | None
    content: bytes | Path
    commit: str = ""  # the commit that brought it
    xet: str | None = None  # its name in the Xet store

    @classmethod
    def of(cls, path: str, content: bytes, *, large: bool | None = None, xet: str | None = None) -> Blob:
        if is_large(path, len(content)) if large is None else large:
            sha256 = hashlib.sha256(content).hexdigest()
            return cls(len(content), git_oid(pointer(sha256, len(content))), sha256, content, xet=xet)
        return cls(len(content), git_oid(content), None, content)

    def read(self) -> bytes:
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content

    def damaged(self) -> Blob:
        """The same file with its first byte changed and the sums that belong to that."""
        content = self.read()
        changed = bytes([content[0] ^ 0xFF]) + content[1:] if content else b"\0"
        return Blob.of("", changed, large=self.sha256 is not None)

    @property
    def etag(self) -> str:
        """What the Hub compares a file with: sha256 of a large object, git's sum of any other."""
        return self.sha256 or self.oid

    def listed(self, path: str) -> dict[str, Any]:
        """As a tree lists it."""
        entry: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.sha256:
            width = len(pointer(self.sha256, self.size))
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": width}
        if self.xet:
            entry["xetHash"] = self.xet
        return entry


@dataclass
class Commit:
    """One commit, with the paths that it added or changed and those that it deleted."""

    message: str
    branch: str
    added: list[str]
    deleted: list[str]
    oid: str
    parent: str | None
    author: str = "me"
    description: str = ""


@dataclass
class PullRequest:
    """A pull request; its files are the repository's branch `ref`."""

    number: int
    title: str
    status: str  # draft, open, closed, merged
    author: str
    events: list[dict[str, Any]] = field(default_factory=list)
    merged_as: str | None = None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"

    def happened(self, kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
        """Adds an event of `kind` (comment, commit, status-change) and returns it as the Hub shows it."""
        name = f"{self.number:04x}{len(self.events):08x}"
        self.events.append(
            {"id": name, "type": kind, "createdAt": WHEN, "author": {"name": author}, "data": data},
        )
        return self.events[-1]

    def listed(self, repository: str) -> dict[str, Any]:
        return {
            "num": self.number,
            "title": self.title,
            "status": self.status,
            "author": {"name": self.author},
            "createdAt": WHEN,
            "isPullRequest": True,
            "repo": {"name": repository, "type": "model"},
        }


@dataclass
class Repository:
    """One model repository. It starts as the Hub starts them: `main` with a commit that holds .gitattributes."""

    id: str
    private: bool = False
    branches: dict[str, dict[str, Blob]] = field(default_factory=dict)  # branch -> path -> file
    heads: dict[str, str] = field(default_factory=dict)  # branch -> commit
    tags: dict[str, str] = field(default_factory=dict)  # tag -> commit
    commits: list[Commit] = field(default_factory=list)
    pull_requests: list[PullRequest] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # sha256 -> large object, committed or not
    snapshots: dict[str, dict[str, Blob]] = field(default_factory=dict)  # commit -> path -> file

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {".gitattributes": ATTRIBUTES}, author="system")

    def commit(
        self,
        branch: str,
        message: str,
        added: Mapping[str, bytes | Blob],
        deleted: Collection[str] = (),
        *,
        author: str = "me",
        description: str = "",
    ) -> Commit:
        """Adds a commit to a branch; deletions come first, hence a path in both is there afterwards."""
        parent = self.heads.get(branch)
        words = f"{self.id}\n{parent}\n{message}\n{len(self.commits)}".encode()
        oid = hashlib.sha1(words).hexdigest()
        files = {path: blob for path, blob in self.branches.get(branch, {}).items() if path not in deleted}
        for path, content in added.items():
            blob = content if isinstance(content, Blob) else Blob.of(path, content)
            files[path] = replace(blob, commit=oid)
            if blob.sha256:
                self.objects.setdefault(blob.sha256, blob.read())
        self.heads[branch], self.branches[branch], self.snapshots[oid] = oid, files, dict(files)
        done = Commit(message, branch, sorted(added), sorted(deleted), oid, parent, author, description)
        self.commits.append(done)
        return done

    def resolve(self, revision: str) -> tuple[str, dict[str, Blob]]:
        """Commit and files of a branch, a tag, a pull request's ref, or a commit spelled in at least 7 digits."""
        oid = self.heads.get(revision) or self.tags.get(revision)
        if oid is None and len(revision) >= 7:
            oid = next((name for name in self.snapshots if name.startswith(revision)), None)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.branches[revision] if revision in self.heads else self.snapshots[oid]

    def branch_off(self, name: str, revision: str) -> None:
        self.heads[name], files = self.resolve(revision)
        self.branches[name] = dict(files)

    def propose(self, title: str, author: str, status: str, revision: str, description: str = "") -> PullRequest:
        """Opens a pull request that starts from a revision."""
        request = PullRequest(len(self.pull_requests) + 1, title, status, author)
        words = {"latest": {"raw": description, "html": description, "updatedAt": WHEN}, "history": []}
        request.happened("comment", author, {"edited": False, "hidden": False, **words})
        self.branch_off(request.ref, revision)
        self.pull_requests.append(request)
        return request

    def history(self, revision: str) -> Iterator[Commit]:
        """Commits of a revision, the last first."""
        known = {commit.oid: commit for commit in self.commits}
        oid: str | None = self.resolve(revision)[0]
        while oid:
            yield known[oid]
            oid = known[oid].parent

    def entries(self, files: Mapping[str, Blob], *, expand: bool = False) -> list[dict[str, Any]]:
        """Files and the folders above them, as a tree lists them, by path."""
        found: dict[str, dict[str, Any]] = {}
        for path, blob in files.items():
            found[path] = blob.listed(path)
            for folder in list(map(str, Path(path).parents))[:-1]:
                name = hashlib.sha1(folder.encode()).hexdigest()
                found.setdefault(folder, {"type": "directory", "oid": name, "size": 0, "path": folder})
        if expand:
            titles = {commit.oid: commit.message for commit in self.commits}
            for path, blob in files.items():
                found[path]["lastCommit"] = {"id": blob.commit, "title": titles[blob.commit], "date": WHEN}
        return [found[path] for path in sorted(found)]


def read_commit(
    body: bytes,
    repository: Repository,
    files: Mapping[str, Blob],
    fetch: Callable[[str], Blob | None],
    corrupt: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, Blob], set[str]]:
    """Header, files to add and paths to delete, of a commit sent as a JSON object a line.

    `files` is what the branch holds; `fetch` gives a large object that came another way than into
    `repository.objects`; files whose path is in `corrupt` are stored damaged. Raises Refusal.
    """
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    if not lines or lines[0]["key"] != "header":
        raise Refusal(400, "The first line must be the header")
    if not lines[0]["value"].get("summary"):
        raise Refusal(400, "A commit needs a summary")
    if len(lines) == 1:
        raise Refusal(400, "A commit needs at least one operation")
    added: dict[str, Blob] = {}
    deleted: set[str] = set()
    for line in lines[1:]:
        kind, value = line["key"], line["value"]
        path = value["path"]
        if kind == "file":
            added[path] = _regular(path, base64.b64decode(value["content"], validate=True))
        elif kind == "lfsFile":
            added[path] = _large(value, repository, fetch)
        elif kind in {"deletedFile", "deletedFolder"}:
            inside = path.rstrip("/") + "/"
            gone = {name for name in files if (name.startswith(inside) if kind == "deletedFolder" else name == path)}
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            deleted |= gone
        else:
            raise Refusal(400, f"Unknown operation {kind}")
    added = {path: blob.damaged() if path in corrupt else blob for path, blob in added.items()}
    return lines[0]["value"], added, deleted


def _regular(path: str, content: bytes) -> Blob:
    if len(content) > REGULAR_LIMIT:
        raise Refusal(400, f"{path}: files above {REGULAR_LIMIT} bytes must be large objects")
    return Blob.of(path, content, large=False)


def _large(value: Mapping[str, Any], repository: Repository, fetch: Callable[[str], Blob | None]) -> Blob:
    content = repository.objects.get(value["oid"])
    blob = Blob.of("", content, large=True) if content is not None else fetch(value["oid"])
    if blob is None:
        raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
    if value.get("size", blob.size) != blob.size:
        raise Refusal(400, f"{value['path']}: {value['size']} bytes announced, {blob.size} are there")
    return blob


def ignored(path: str, rules: str) -> bool:
    """Whether a line of a .gitignore names the path, one of its folders, or its last part."""
    names = [path, path.rpartition("/")[2], *(f"{folder}/" for folder in map(str, Path(path).parents))]
    return any(fnmatch.fnmatch(name, line.strip()) for line in rules.splitlines() for name in names)


class XetStore:
    """Reads a folder that hf_xet writes to as `local://FOLDER`: which files it holds, and their bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self, sha256: str) -> Blob | None:
        """The large object with this sum, or None where no upload finished; the sum of the bytes is proved."""
        for shard in self.folder.rglob("shards/*.mdb"):
            for name, size, stored in _files(shard.read_bytes()):
                if stored == sha256:
                    blob = Blob.of("", self._read(name, size), large=True, xet=name)
                    if blob.sha256 != sha256:
                        raise Refusal(400, f"The Xet store holds {blob.sha256} as {sha256}")
                    return blob
        return None

    def _read(self, name: str, size: int) -> bytes:
        import hf_xet

        with tempfile.TemporaryDirectory() as folder:
            # The client may still hold the store, whose index one process at a time can open.
            copy, target = Path(folder) / "store", Path(folder) / "file"
            shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns("shard-session", "shard-cache"))
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                group.start_download_file(hf_xet.XetFileInfo(name, size), str(target))
            return target.read_bytes()


def _files(shard: bytes) -> Iterable[tuple[str, int, str]]:
    """Name, size in bytes and sha256 of each file that a shard describes: 48-byte records after a 48-byte header."""
    at = 48
    while shard[at : at + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        segments = range(at + 48, at + 48 * (count + 1), 48)
        size = sum(struct.unpack_from("<I", shard, start + 36)[0] for start in segments)
        name, at = _digits(shard[at : at + 32]), segments.stop + 48 * count * (flags >> 31)
        if flags >> 30 & 1:  # a record with the sum follows
            yield name, size, _digits(shard[at : at + 32])
            at += 48


def _digits(raw: bytes) -> str:
    """Xet spells a sum as four numbers of 8 bytes, each with its last byte first."""
    return "".join(raw[start : start + 8][::-1].hex() for start in range(0, 32, 8))

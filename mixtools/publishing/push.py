"""From outputs to a repository: what goes where, in which commits, resumably, and read back.

    Branch ─► withdraw (config and index go, where weights change below them)
           ─► a commit for each weight file that is not there yet, by its SHA-256
           ─► the last commit: documents, index, card, records
           ─► the tree read back: every size and hash

A repository is never half of one: what a loader opens first is what comes last. What is there already is skipped, so a
push that was cut is continued by the same command.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import HubError, InputError
from ..progress import Progress
from ..storage import checked, manifest
from ..storage.manifest import File
from ..storage.sealed import BESIDE, CARD, PICTURE
from .client import TRIES, Client, LostError, Remote
from .outputs import Judged, Output, is_portable
from .theirs import placed

MAIN, RECIPE = "main", "recipe.yaml"
_OPENS = re.compile(r"config\.json|params\.json|.*\.index\.json")  # without it no loader opens the weights
_REPORTS = re.compile(r"(laser|(.*\.)?quantize)-report\.(html|json|csv)|(.*\.)?recipe\.yaml")
_LICENCES = re.compile(r"(LICEN[CS]E|NOTICE)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """A file to be there. `data`: where it lies, or what it holds."""

    path: str
    data: Path | bytes
    file: File

    @property
    def blob(self) -> str:
        """Its id in Git."""
        data = self.data if isinstance(self.data, bytes) else self.data.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    def is_there(self, remote: Mapping[str, Remote]) -> bool:
        """Whether the Hub has just this."""
        found = remote.get(self.path)
        if found is None or found.size != self.file.size:
            return False
        return found.sha256 == self.file.sha256 if found.sha256 is not None else found.blob == self.blob


@dataclass(frozen=True)
class Branch:
    """What a branch is to hold."""

    name: str
    weights: tuple[Item, ...]
    documents: tuple[Item, ...]
    left_out: tuple[str, ...] = ()  # the user's own files

    @property
    def items(self) -> tuple[Item, ...]:
        return (*self.weights, *self.documents)

    @property
    def bytes(self) -> int:
        return sum(item.file.size for item in self.items)


def branch_name(output: Output) -> str:
    """What the configuration says: gptq-4bit-128g, gptq-4bit-128g-actorder_True, awq-4bit-32g, nf4, main."""
    found = output.checkpoint.quantized()
    if output.is_gguf or not found:
        return MAIN
    main = found[0]
    method = output.made[1].get("method") or main.name
    if not hasattr(main, "group"):
        return str(method)
    about = output.checkpoint.about
    bits = getattr(main, "bits", 4)
    group = f"{main.group}g" if main.group > 0 else "rows"
    ordered = "-actorder_True" if about.get("desc_act") is True else ""
    format = "-compressed-tensors" if main.name == "compressed-tensors" else ""
    return f"{method}-{bits}bit-{group}{ordered}{format}"


def plan(
    judged: Sequence[Judged], names: Sequence[str], extra: Mapping[str, bytes], include: Iterable[str] = ()
) -> list[Branch]:
    """Branches, by `names` of each output; outputs of one name go together. `extra`: card and picture, for all.

    `include`: of the user's own files those that go along. Raises InputError for one that no folder has.
    """
    wanted, branches = {*include}, []
    for name in dict.fromkeys(names):
        mine = [one for one, its in zip(judged, names, strict=True) if its == name]
        branches.append(_branch(name, mine, extra, wanted))
    there = {item.path for branch in branches for item in branch.items}
    if absent := sorted(wanted - there):
        raise InputError("does not exist beside the output", file=judged[0].output.folder / absent[0])
    return branches


def as_main(branch: Branch) -> Branch:
    """The same on main, for loaders that ask for no branch."""
    return replace(branch, name=MAIN)


def _branch(name: str, judged: Sequence[Judged], extra: Mapping[str, bytes], wanted: Collection[str]) -> Branch:
    weights: dict[str, Item] = {}
    documents: dict[str, Item] = {}
    left: dict[str, None] = {}
    for one in judged:
        folder = one.output.folder
        own = {path.name for path in one.output.weights}
        for file, told in one.files.items():
            target = weights if file in own else documents
            target[file] = Item(file, folder / file, told)
        for file in (*_beside(one.output), *(file for file in sorted(wanted) if (folder / file).is_file())):
            if file not in weights:
                documents.setdefault(file, _item(file, (folder / file).read_bytes(), folder / file))
        sent = {*weights, *documents, *extra}
        known = sent | _others(one.output)
        left |= dict.fromkeys(sorted(path.name for path in folder.iterdir() if _is_own(path, known)))
        left |= dict.fromkeys(sorted(path.name for path in folder.glob(f"*{RECIPE}") if path.name not in sent))
    for file, data in extra.items():
        documents[file] = _item(file, data)
    return Branch(name, tuple(weights.values()), tuple(documents.values()), tuple(left))


def _beside(output: Output) -> Iterable[str]:
    """What else belongs to an output: what mixtools wrote or copied there, its records, licences, reports."""
    listed = {name for name in output.entry.get("files", {}) if (output.folder / name).is_file()}
    wanted = {path.name for path in output.folder.iterdir() if path.is_file() and _goes_along(path.name, output)}
    private = {name for name in listed | wanted if name.endswith(RECIPE) and not is_portable(output.folder / name)}
    return sorted((listed | wanted) - {CARD, PICTURE} - private - {path.name for path in output.weights})


def _goes_along(name: str, output: Output) -> bool:
    if name in (manifest.NAME, checked.NAME) or _LICENCES.fullmatch(name):
        return True
    if _REPORTS.fullmatch(name):
        stem = output.name.removesuffix(".gguf")
        return not output.is_gguf or name == RECIPE or name.startswith(f"{stem}.")
    return output.is_gguf and "imatrix" in name and name.endswith((".gguf", ".dat"))


def _others(output: Output) -> set[str]:
    """Of a folder that several outputs share, what belongs to those that are not named."""
    document = manifest.load(output.folder) or {}
    return {*document.get("files", {}), manifest.NAME, checked.NAME}


def _is_own(path: Path, known: Iterable[str]) -> bool:
    hidden = path.name.startswith(".") or path.is_dir()
    cards = path.name in (CARD, BESIDE, PICTURE)
    return not (hidden or cards or path.name in set(known) or _REPORTS.fullmatch(path.name))


def _item(path: str, data: bytes, place: Path | None = None) -> Item:
    return Item(path, place or data, File(len(data), hashlib.sha256(data).hexdigest()))


# --- to the Hub ---


@dataclass
class Sent:
    """What was done for a branch: files that went, and files that were there."""

    name: str
    revision: str
    sent: int = 0
    sent_bytes: int = 0
    skipped: int = 0
    commits: int = 0
    card: str = CARD  # where it went: somebody's own README.md there stays

    def document(self) -> dict[str, Any]:
        return {
            "revision": self.revision, "sent": self.sent, "sent_bytes": self.sent_bytes, "skipped": self.skipped,
            "commits": self.commits, "card": self.card,
        }  # fmt: skip


def send(
    client: Client, branches: Sequence[Branch], *, private: bool, create_pr: bool, progress: Progress
) -> list[Sent]:
    """All branches, in order. Raises HubError; running again continues."""
    user = client.user()
    if create_pr:
        (branch,) = branches
        title = f"Add {branch.weights[0].path}" + (f" and {len(branch.weights) - 1} more" if branch.weights[1:] else "")
        revision = client.draft(title, user, "Made and checked by mixtools; the card tells what and how.")
        done = [publish(client, branch, revision, progress)]
        client.open_draft(revision)
        return done
    client.create(private=private)
    there = client.branches()
    for branch in branches:
        if branch.name not in there | {MAIN}:
            client.create_branch(branch.name)
    return [publish(client, branch, branch.name, progress) for branch in branches]


def publish(client: Client, branch: Branch, revision: str, progress: Progress) -> Sent:
    """Bring a revision to what the branch is to hold, and read it back. Raises HubError; running again continues."""
    done = Sent(branch.name, revision)
    remote = client.files(revision)
    branch, done.card = _beside_theirs(client, branch, revision, remote)
    missing = [item for item in branch.weights if not item.is_there(remote)]
    done.skipped = len(branch.weights) - len(missing)
    if missing and (stale := _withdrawn(branch, remote)):
        _commit(client, done, "Withdraw what the new weights do not go with", delete=stale)
    progress.start(f"uploading to {revision}", sum(item.file.size for item in missing))
    for item in missing:
        _commit(client, done, f"Add {item.path}", [item])
        done.sent, done.sent_bytes = done.sent + 1, done.sent_bytes + item.file.size
        progress.advance(item.file.size)
    progress.finish()
    remote = client.files(revision)
    documents = [item for item in branch.documents if not item.is_there(remote)]
    gone = _outdated(client, branch, revision, remote)
    if documents or gone:
        _commit(client, done, _last_message(branch), documents, gone)
        done.sent += len(documents)
        done.sent_bytes += sum(item.file.size for item in documents)
    done.skipped += len(branch.documents) - len(documents)
    expect_there(client, branch, revision)
    return done


def _beside_theirs(client: Client, branch: Branch, revision: str, remote: Mapping[str, Remote]) -> tuple[Branch, str]:
    """The branch with its card where one that lies there leaves it (theirs.py), and that place."""
    ours = next((item for item in branch.documents if item.path == CARD), None)
    if ours is None or not isinstance(ours.data, bytes) or CARD not in remote or ours.is_there(remote):
        return branch, CARD
    path, data = placed(ours.data, client.read(CARD, revision))
    documents = (*(item for item in branch.documents if item is not ours), _item(path, data))
    return replace(branch, documents=documents), path


def expect_there(client: Client, branch: Branch, revision: str) -> None:
    """Raises HubError for a file that the Hub has not, or not as it was sent."""
    remote = client.files(revision)
    for item in branch.items:
        if not item.is_there(remote):
            found = remote.get(item.path)
            told = "nothing" if found is None else f"{found.size} bytes, {found.sha256 or found.blob}"
            raise HubError(
                f"{item.path} on {revision} is not what was sent; run the same command again",
                file=client.repository, expected=f"{item.file.size} bytes, {item.file.sha256}", found=told,
            )  # fmt: skip


def _commit(client: Client, done: Sent, message: str, items: Sequence[Item] = (), delete: Sequence[str] = ()) -> None:
    """A commit, tried again where its answer was lost and it had not been made."""
    add = [(item.path, item.data) for item in items]
    for left in range(TRIES - 1, -1, -1):
        try:
            client.commit(done.revision, message, add, delete, tries=TRIES - left)
            done.commits += 1
            return
        except LostError as error:
            remote = client.files(done.revision)
            if all(item.is_there(remote) for item in items) and not remote.keys() & {*delete}:
                done.commits += 1
                return
            if not left:
                raise client.lost(error) from None
            delete = [path for path in delete if path in remote]


def _withdrawn(branch: Branch, remote: Mapping[str, Remote]) -> list[str]:
    """Where weights of another content lie under these names, what would open them together with the new."""
    changing = [item.path for item in branch.weights if item.path in remote and not item.is_there(remote)]
    parts = [path for path in changing if path.endswith(".gguf")]
    if parts:
        return sorted(path for path in parts if "-of-" in path)  # any other is whole by itself
    return sorted(path for path in remote if _OPENS.fullmatch(path)) if changing else []


def _outdated(client: Client, branch: Branch, revision: str, remote: Mapping[str, Remote]) -> list[str]:
    """What an earlier output of mixtools left on a folder's branch and this one has not: its manifest there tells."""
    if manifest.NAME not in remote or any(item.path.endswith(".gguf") for item in branch.weights):
        return []
    try:
        listed = json.loads(client.read(manifest.NAME, revision))["files"]
    except (ValueError, KeyError, TypeError):
        return []  # somebody else's, and none of our business
    mine = {item.path for item in branch.items} | {CARD}  # a card that is left is somebody's own
    return sorted(path for path in listed if path in remote and path not in mine)


def _last_message(branch: Branch) -> str:
    return f"Add documents and card of {len(branch.weights)} weight files"

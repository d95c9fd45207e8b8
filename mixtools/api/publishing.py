"""mixtools.card and mixtools.push: what tells of an output, and how it comes to the Hub."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import CheckFailed, UsageError
from ..machine import human_bytes
from ..progress import Callback, Progress, Silent, watched
from ..storage.sealed import CARD
from ..verbs import Option, Result

if TYPE_CHECKING:
    from ..publishing.card import Card
    from ..publishing.outputs import Judged
    from ..publishing.push import Branch, Sent

_OUT = "What was made: folders, GGUF files, or a folder of several."
Outs = Annotated[list[str] | str | Path, Option("OUTPUT", _OUT, argument=True)]
Base = Annotated[str | None, Option("ORG/NAME", "The model on the Hub that it was made of.")]
By = Annotated[str | None, Option("NAME", "Who quantized it, for the card's metadata.")]
DryRun = Annotated[bool, Option("", "Tell what would be done; write nothing, ask no network.", machine=True)]


@dataclass(frozen=True)
class Carded(Result):
    """`files`: what was written, or of a dry run would be; `text`: the card."""

    files: tuple[Path, ...]
    text: str
    verdicts: dict[str, str]
    kept: tuple[Path, ...]
    dry_run: bool = False
    notes: tuple[str, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        return {
            "dry_run": self.dry_run, "files": [str(file) for file in self.files], "verdicts": self.verdicts,
            "kept": [str(file) for file in self.kept], "notes": list(self.notes), "card": self.text,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        if self.dry_run:
            yield from self.text.splitlines()
            return
        for name, verdict in self.verdicts.items():
            yield f"{name}: {verdict}"
        for file in self.kept:
            yield f"{file} is somebody's own and stays; ours lies beside it"
        yield f"wrote {', '.join(str(file) for file in self.files)}"


def card(
    outputs: Outs,
    *,
    base_model: Base = None,
    repository: Annotated[str | None, Option("ORG/NAME", "Where it will be published, for the links.")] = None,
    quantized_by: By = None,
    replace: Annotated[bool, Option("", "Replace a README.md that somebody wrote.", machine=True)] = False,
    dry_run: DryRun = False,
    progress: Progress | Callback | None = None,
) -> Carded:
    """A model card from the outputs' own manifest, configuration and check, as README.md in their folders.

    Example: mixtools card quants --base-model mistralai/Mixtral-8x7B-Instruct-v0.1

    A README.md that came along from the source is replaced, and its licence and languages are taken over; one that
    somebody wrote is kept, and ours lies beside it as README.mixtools.md. Raises UsageError for outputs that do not
    belong together, InputError for what is no output, OutputError where the card cannot be written.
    """
    from ..publishing import card as writer
    from ..publishing import outputs as made
    from ..publishing.push import branch_name

    found = made.find(_list(outputs))
    made.expect_alike(found)
    judged = made.judge(found, watched(progress))
    branches = _branches(found, None, branch_name)
    written = writer.write(judged, writer.Asked(repository, base_model, quantized_by, _shown(branches)))
    folders = list(dict.fromkeys(output.folder for output in found))
    return _leave(judged, written, folders, replace=replace, dry_run=dry_run)


@dataclass(frozen=True)
class Pushed(Result):
    """Where everything is now, or of a dry run would be."""

    repository: str
    branches: tuple[Branch, ...]
    sent: tuple[Sent, ...]
    verdicts: dict[str, str]
    dry_run: bool = False
    private: bool = False
    notes: tuple[str, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        done = {sent.name: sent for sent in self.sent}
        return {
            "dry_run": self.dry_run, "repository": self.repository, "private": self.private,
            "verdicts": self.verdicts, "notes": list(self.notes),
            "branches": [
                {"name": branch.name, "bytes": branch.bytes, "left_out": list(branch.left_out),
                 "files": [{"path": item.path, "bytes": item.file.size, "sha256": item.file.sha256}
                           for item in branch.items],
                 **(done[branch.name].document() if branch.name in done else {})}
                for branch in self.branches
            ],
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        would = "would hold" if self.dry_run else "holds"
        done = {sent.name: sent for sent in self.sent}
        for branch in self.branches:
            files = f"{len(branch.items)} files, {human_bytes(branch.bytes)}"
            place = done[branch.name].revision if branch.name in done else branch.name
            yield f"{self.repository} {place} {would} {files}:"
            for item in branch.items:
                yield f"  {human_bytes(item.file.size):>10}  {item.path}"
            if branch.name in done:
                told = done[branch.name]
                yield (
                    f"  sent {told.sent} of them ({human_bytes(told.sent_bytes)}) in {told.commits} commits; "
                    f"{told.skipped} were there; every size and hash was read back"
                )
                if told.card != CARD:
                    yield f"  {CARD} there is somebody's own and stays; ours lies beside it as {told.card}"
            if branch.left_out:
                yield (
                    "  left out, as yours or as telling of this machine's folders (--include takes them along): "
                    f"{', '.join(branch.left_out)}"
                )
        for name, verdict in self.verdicts.items():
            yield f"{name}: {verdict}"


def push(
    outputs: Outs,
    repository: Annotated[str, Option("REPO", "org/name on the Hub.", argument=True, key="repo")],
    *,
    branch: Annotated[
        str | None, Option("NAME", "Where one output goes; several go to branches by their kind.")
    ] = None,
    private: Annotated[bool, Option("", "Of a repository that is new: for you alone.")] = False,
    create_pr: Annotated[bool, Option("", "As a pull request; one that is not closed yet is continued.")] = False,
    unchecked: Annotated[bool, Option("", "Publish what was not checked, or whose check failed.")] = False,
    unjudged: Annotated[bool, Option("", "Publish what no gate judged.")] = False,
    include: Annotated[list[str] | None, Option("NAME", "A file beside it, to go along; repeatable.")] = None,
    base_model: Base = None,
    quantized_by: By = None,
    dry_run: DryRun = False,
    progress: Progress | Callback | None = None,
) -> Pushed:
    """Publish outputs: a commit for each weight file, card and index last, every hash read back.

    Example: mixtools push quants my-name/Mixtral-8x7B-Instruct-v0.1-GGUF

    Refuses what was not checked, what failed, and what no gate judged, unless it is told. A push that was cut is
    continued by the same command. Several folders go to branches called by what their configuration says, the first to
    main as well. Raises CheckFailed for what is not fit to be published, UsageError for what does not belong together,
    HubError for what the Hub refuses.
    """
    from ..publishing import card as writer
    from ..publishing import outputs as made
    from ..publishing import push as pushing
    from ..publishing.client import Client

    expect_repository(repository)
    watch = watched(progress)
    found = made.find(_list(outputs))
    made.expect_alike(found)
    names = _branches(found, branch, pushing.branch_name)
    if create_pr and (len(set(names)) > 1 or branch is not None):
        raise UsageError("--create-pr: a pull request is a branch itself; push one output, without --branch")
    judged = made.judge(found, watch)
    for one in judged:
        _expect_fit(one, unchecked=unchecked, unjudged=unjudged)
    asked = writer.Asked(repository, base_model, quantized_by, _shown(names))
    written = writer.write(judged, asked)
    extra, notes = _cards(found, written)
    branches = pushing.plan(judged, names, extra, include or ())
    if len(branches) > 1 and branch is None and pushing.MAIN not in names:
        branches = [pushing.as_main(branches[0]), *branches]  # what a loader gets that asks for no branch
    verdicts = {one.output.name: one.verdict for one in judged}
    notes = (*notes, *written.remarks)
    if dry_run:
        return Pushed(repository, tuple(branches), (), verdicts, True, private, notes)
    client = Client.connect(repository, lambda text: watch.start(text, 0))
    with _bars(watch) as shown:
        sent = pushing.send(client, branches, private=private, create_pr=create_pr, progress=shown)
    return Pushed(repository, tuple(branches), tuple(sent), verdicts, False, private, notes)


def preflight(repo: str, **_: Any) -> None:
    """Raises UsageError for what is no name of a repository."""
    expect_repository(repo)


def expect_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
        good = name.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise UsageError(f"{name!r} is no repository; write ORG/NAME")


@contextlib.contextmanager
def _bars(watch: Progress) -> Iterator[Progress]:
    """On a terminal the client draws how far a file is, and ours would be in its way; else it draws nothing."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() and not isinstance(watch, Silent):
        yield Silent()
        return
    disable_progress_bars()
    try:
        yield watch
    finally:
        enable_progress_bars()


def _list(outputs: Sequence[str | Path] | str | Path) -> list[str | Path]:
    return [outputs] if isinstance(outputs, str | Path) else [*outputs]


def _branches(found: Sequence[Any], branch: str | None, by_kind: Any) -> list[str]:
    """A branch for each output. Raises UsageError for two of one name."""
    if found[0].is_gguf:
        return [branch or "main"] * len(found)
    if len(found) == 1:
        return [branch or "main"]
    if branch is not None:
        raise UsageError("--branch names the place of one output; of several each has its own")
    names = [by_kind(output) for output in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two of them would be the branch {twice[0]}; push them one by one, with --branch")
    return names


def _shown(branches: Sequence[str]) -> tuple[str, ...]:
    return tuple(branches) if len(set(branches)) > 1 else ()


def _expect_fit(one: Judged, *, unchecked: bool, unjudged: bool) -> None:
    """Raises CheckFailed for what nobody has said may be published all the same."""
    place = one.output.checkpoint.place
    if one.verdict == "unchecked" and not unchecked:
        raise CheckFailed(f"{one.why}; --unchecked publishes it all the same", file=place)
    if one.verdict == "failed" and not unchecked:
        gates = [gate["name"] for gate in one.document["gates"] if not gate["passed"]]
        why = f" ({', '.join(gates)})" if gates else ""
        raise CheckFailed(f"failed its check{why}; --unchecked publishes it all the same", file=place)
    if one.verdict == "intact" and not unjudged:
        why = "is intact, but no gate judged it; look at its figures, and --unjudged publishes it"
        raise CheckFailed(why, file=place)


def _is_own(readme: Path) -> bool:
    """Whether somebody wrote it: neither we, nor the source that it came from."""
    from ..storage import manifest
    from ..storage.digest import of_file
    from ..storage.sealed import is_sealed

    if not readme.is_file() or is_sealed(readme):
        return False
    listed = (manifest.load(readme.parent) or {"files": {}})["files"].get(readme.name)
    return listed is None or not listed.copied or of_file(readme) != listed.sha256


def _cards(found: Sequence[Any], written: Card) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """README.md and picture to publish: somebody's own card goes before ours."""
    from ..storage.sealed import PICTURE

    readme = next((output.folder / CARD for output in found if _is_own(output.folder / CARD)), None)
    if readme is not None:
        return {CARD: readme.read_bytes()}, (f"{readme} is somebody's own and is published as it is",)
    return {CARD: written.readme, **({PICTURE: written.picture} if written.picture else {})}, ()


def _leave(judged: Sequence[Judged], written: Card, folders: Sequence[Path], *, replace: bool, dry_run: bool) -> Carded:
    from ..storage.disk import DiskErrors
    from ..storage.sealed import BESIDE, PICTURE

    files: list[Path] = []
    kept: list[Path] = []
    for folder in folders:
        own = _is_own(folder / CARD) and not replace
        kept += [folder / CARD] if own else []
        wanted = {BESIDE if own else CARD: written.readme}
        wanted |= {PICTURE: written.picture} if written.picture else {}
        for name, data in wanted.items():
            files.append(folder / name)
            if not dry_run:
                with DiskErrors(folder):
                    part = folder / f".{name}.part"
                    part.write_bytes(data)
                    part.replace(folder / name)
    verdicts = {one.output.name: one.verdict + (f" ({one.why})" if one.why else "") for one in judged}
    return Carded(tuple(files), written.readme.decode(), verdicts, tuple(kept), dry_run, written.remarks)

"""The Hub's client as `push` needs it: calls are tried again where that helps, a failure is one line with a way out.

What is tried again: 429 (as long as Retry-After says), 5xx, and connections that were cut. Commits are the caller's to
repeat, since one whose answer was lost may have been made: `Client.commit` says so by LostError.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TRIES = 6
_LONGEST_WAIT = 300.0  # seconds; a Hub that asks for more is told to its user
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 524})
_CONFLICT = frozenset({409, 412})
Answer = TypeVar("Answer")


class Remote(NamedTuple):
    """A file as the Hub has it: the SHA-256 of a large one, of a small one its id as Git's blob."""

    size: int
    sha256: str | None
    blob: str


class LostError(Exception):
    """A commit that may have been made or not."""


@dataclass
class Client:
    """Of one repository. `say` is told what a user should know of a wait."""

    repository: str
    api: HfApi
    say: Callable[[str], None] = lambda _: None

    @classmethod
    def connect(cls, repository: str, say: Callable[[str], None] = lambda _: None) -> Client:
        """Raises HubError without a token, or with HF_HUB_OFFLINE."""
        from huggingface_hub import HfApi, constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise HubError("HF_HUB_OFFLINE is set; nothing can be published", file=repository)
        if get_token() is None:
            raise HubError("no token: run `hf auth login`, or set HF_TOKEN to one that may write", file=repository)
        return cls(repository, HfApi(), say)

    # --- what is there ---

    def user(self) -> str:
        """Whose token it is. Raises HubError for one that the Hub does not know."""
        return str(self._ask(self.api.whoami)["name"])

    def create(self, *, private: bool) -> None:
        """Raises HubError where the token may not; a repository that is there stays as it is."""
        self._ask(lambda: self.api.create_repo(self.repository, private=private, exist_ok=True))

    def branches(self) -> set[str]:
        refs = self._ask(lambda: self.api.list_repo_refs(self.repository))
        return {branch.name for branch in refs.branches}

    def create_branch(self, name: str) -> None:
        """From the repository's first commit, so that the branch holds its own files alone."""
        first = self._ask(lambda: self.api.list_repo_commits(self.repository))[-1].commit_id
        self._ask(lambda: self.api.create_branch(self.repository, branch=name, revision=first, exist_ok=True))

    def files(self, revision: str) -> dict[str, Remote]:
        """By path."""
        from huggingface_hub.hf_api import RepoFile

        def listed() -> dict[str, Remote]:
            tree = self.api.list_repo_tree(self.repository, revision=revision, recursive=True)
            return {
                one.path: Remote(one.size, one.lfs.sha256 if one.lfs else None, one.blob_id)
                for one in tree
                if isinstance(one, RepoFile)
            }

        return self._ask(listed)

    def read(self, path: str, revision: str) -> bytes:
        """A small file."""

        def fetched() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                place = self.api.hf_hub_download(self.repository, path, revision=revision, local_dir=folder)
                return Path(place).read_bytes()

        return self._ask(fetched)

    def draft(self, title: str, user: str, text: str) -> str:
        """The revision of a pull request of this user's that goes by this title and is not closed, made if need be."""
        there = self._ask(lambda: [*self.api.get_repo_discussions(self.repository, discussion_type="pull_request")])
        mine = [one for one in there if (one.title, one.author) == (title, user) and one.status in ("draft", "open")]
        if mine:
            return f"refs/pr/{mine[0].num}"
        made = self._ask(lambda: self.api.create_pull_request(self.repository, title=title, description=text))
        return f"refs/pr/{made.num}"

    def open_draft(self, revision: str) -> None:
        """Ask for the pull request to be looked at."""
        number = int(revision.rpartition("/")[2])
        details = self._ask(lambda: self.api.get_discussion_details(self.repository, number))
        if details.status == "draft":
            self._ask(lambda: self.api.change_discussion_status(self.repository, number, "open"))

    # --- what goes there ---

    def commit(
        self, revision: str, message: str, add: Sequence[tuple[str, Path | bytes]], delete: Iterable[str] = (), *,
        tries: int = 1,
    ) -> None:  # fmt: skip
        """One commit, tried for the `tries`th time.

        Raises LostError, after a while, where nobody knows whether it was made, HubError where it cannot be.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [CommitOperationDelete(path) for path in delete]
        operations += [CommitOperationAdd(path, data if isinstance(data, bytes) else str(data)) for path, data in add]
        try:
            self.api.create_commit(self.repository, operations, commit_message=message, revision=revision)
        except Exception as raised:  # the client lets errors of its HTTP library through, and that library changed
            error = _cause(raised)
            status = _status(error)
            if status in _AGAIN | _CONFLICT or (status is None and _is_cut(error)):
                self._wait(error, tries)
                raise LostError(self._line(error)) from None
            raise self._refused(error) from None

    def lost(self, error: LostError) -> HubError:
        """Of a commit that was tried often enough."""
        return HubError(f"{error}; the same command continues", file=self.repository)

    # --- failures ---

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        for left in range(TRIES - 1, -1, -1):
            try:
                return call()
            except Exception as raised:
                error = _cause(raised)
                status = _status(error)
                if left and (status in _AGAIN or (status is None and _is_cut(error))):
                    self._wait(error, TRIES - left)
                    continue
                raise self._refused(error) from None
        raise AssertionError

    def _wait(self, error: Exception, tries: int) -> None:
        asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
        seconds = float(asked) if str(asked).isdigit() else min(2.0**tries, 30.0)
        if seconds > _LONGEST_WAIT:
            raise HubError(f"asks to wait {seconds:.0f} s; try again then", file=self.repository) from None
        self.say(f"{self._line(error)}; trying again in {seconds:.0f} s")
        time.sleep(seconds)

    def _refused(self, error: Exception) -> HubError:
        status, told = _status(error), self._line(error)
        ways = {
            401: "the Hub does not take the token: run `hf auth login`, or set HF_TOKEN to one that may write",
            403: "the token may not write there: it needs the right to write, and the repository must be yours",
            404: "is not there, or the token may not see it",
            413: "a file is larger than the Hub takes; --max-shard-size makes smaller ones",
        }
        if status in ways:
            return HubError(f"{ways[status]} ({told})", file=self.repository)
        if status is None and _is_cut(error):
            return HubError(f"the Hub cannot be reached ({told}); the same command continues", file=self.repository)
        return HubError(told, file=self.repository)

    def _line(self, error: Exception) -> str:
        """The error's first line; a token never stands in it."""
        from huggingface_hub import get_token

        told = (getattr(error, "server_message", None) or str(error) or type(error).__name__).strip()
        status = _status(error)
        line = (told.splitlines() or [type(error).__name__])[0]
        line = f"{status} {line}" if status is not None and str(status) not in line else line
        token = self.api.token if isinstance(self.api.token, str) else get_token()
        return line.replace(token, "***") if token else line


def _cause(error: Exception) -> Exception:
    """What an upload in a thread of the client's failed of: of all causes an answer, else a connection that was cut."""
    chain: list[Exception] = [error]
    while isinstance(cause := chain[-1].__cause__, Exception) and cause not in chain:
        chain.append(cause)
    answered = (one for one in chain if _status(one) is not None)
    return next(answered, next(filter(_is_cut, chain), error))


def _status(error: BaseException) -> int | None:
    """Of an answer that the Hub gave; None where it gave none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_cut(error: Exception) -> bool:
    """Whether the connection failed, and not our own use of the client."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, OSError | TimeoutError)
        or bool(names & {"TransportError", "RequestException"})
        or (type(error).__module__.startswith("hf_xet") or "xet" in str(error).lower())
    )

"""A Hub on this machine, against which tests run the real huggingface_hub client.

It speaks the part of the Hub's interface that creating, filling and reading a model repository takes, as
huggingface_hub 2.4 asks for it: large objects through git-lfs (in one part or several) or through Xet into a folder,
commits as lines of JSON, pull requests, trees, files. What it does not know it answers with 501 and keeps in
`Hub.unknown`, so that a test can say that nothing went past it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote

from hub import loopback_routes, loopback_uploads
from hub.loopback_http import INVALID, ROUTES, Answer, Ask, Fault, Request, Server, refused
from hub.loopback_store import Blob, Commit, PullRequest, Refusal, Repository, XetStore

__all__ = ["Blob", "Commit", "Hub", "PullRequest", "Repository", "Request", "loopback_routes", "loopback_uploads"]


class Hub:
    """The server, up while the context is open.

    `tokens` maps a token to its user, `readers` are tokens that may not write, `orgs` maps a user to the
    organizations that they write to. `corrupt` are paths of files that the next commit stores damaged. With `xet`,
    a folder, large objects may come through Xet; `part_size`, in bytes, asks for larger ones in parts.
    """

    part_size: int | None = None

    def __init__(self, *, xet: Path | None = None) -> None:
        self.tokens = {"hf_good": "me", "hf_reader": "me"}
        self.readers = {"hf_reader"}
        self.orgs: dict[str, set[str]] = {}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        self.corrupt: set[str] = set()
        self.pieces: dict[tuple[str, str], dict[int, bytes]] = {}  # (repository, sha256) -> part -> bytes
        self.xet = XetStore(xet) if xet else None
        self._secret = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._faults: list[Fault] = []
        self._server = Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    def create(self, name: str, files: Mapping[str, bytes] | None = None, *, private: bool = False) -> Repository:
        """Makes a repository without a request, with a commit of these files if there are any."""
        with self._lock:
            repository = self.repositories[name] = Repository(name, private)
            if files:
                repository.commit("main", "add files", files)
        return repository

    def fail(
        self,
        method: str,
        path: str,
        *,
        status: int = 0,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        skip: int = 0,
        after: int | None = None,
        drop: bool = False,
    ) -> None:
        """Makes the next `times` requests fail that have this method and in whose path the regex `path` is found.

        The first `skip` of them pass. `status` is answered, with `headers`, instead of carrying the request out.
        `after=N` cuts the connection when N bytes of the body were read, or for GET when N of the answer were sent.
        `drop` carries the request out and closes the connection without an answer, or with `status` answers that.
        """
        if (after is not None) == bool(status or drop):
            raise ValueError("a fault has a status, or after, or drop")
        with self._lock:
            self._faults.append(Fault(method, re.compile(path), status, times, headers or {}, skip, after, drop))

    def paths(self, method: str) -> list[str]:
        """Paths of the requests of one method so far, in order."""
        return [request.path for request in self.requests if request.method == method]

    def arrived(self, request: Request) -> Fault | None:
        """Records a request; returns the fault that is due for it, which is thereby used up once."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times and fault.method == request.method and fault.path.search(request.path):
                    if not fault.skip:
                        fault.times -= 1
                        return fault
                    fault.skip -= 1
        return None

    def answer(self, ask: Ask, raw: str) -> Answer:
        """Carries a request out; `raw` is its path as it came."""
        asked = f"{ask.request.method} {raw}"
        with self._lock:
            for method, pattern, serve in ROUTES:
                if method == ask.request.method.replace("HEAD", "GET") and (match := pattern.fullmatch(raw)):
                    ask.parts = {name: unquote(part) for name, part in match.groupdict().items() if part}
                    try:
                        return serve(self, ask)
                    except Refusal as refusal:
                        if refusal.status == 501:
                            self.unknown.append(f"{asked}: {refusal}")
                        return refused(refusal)
                    except Exception:  # a mistake of this double, or a client that sends what it should not
                        self.unknown.append(f"{asked}: {traceback.format_exc()}")
                        return Answer({"error": "Internal error of the loopback Hub"}, 500)
            self.unknown.append(asked)
        return Answer({"error": "The loopback Hub does not know this request"}, 501)

    def token(self, ask: Ask) -> str | None:
        given = ask.request.authorization
        return given.removeprefix("Bearer ") if given else None

    def user(self, ask: Ask) -> str | None:
        """Who asks; None for nobody in particular. A token that is not known is refused wherever it is shown."""
        token = self.token(ask)
        if token is not None and token not in self.tokens:
            raise Refusal(401, INVALID)
        return None if token is None else self.tokens[token]

    def writer(self, ask: Ask) -> str:
        """Who asks, if their token may write at all."""
        user = self.user(ask)
        if user is None:
            # The client takes this for a missing repository, but without the word for it only under https.
            raise Refusal(401, "Invalid username or password.", "RepoNotFound" if "id" in ask.parts else None)
        if self.token(ask) in self.readers:
            raise Refusal(403, "You must use a write token to upload to a repository.")
        return user

    def member(self, user: str | None, namespace: str) -> bool:
        """Whether a user may write to the repositories of a namespace."""
        return user is not None and (user == namespace or namespace in self.orgs.get(user, set()))

    def readable(self, ask: Ask) -> Repository:
        user, repository = self.user(ask), self.repositories.get(ask["id"])
        if repository is None or (repository.private and not self.member(user, ask["id"].partition("/")[0])):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, ask: Ask, revision: str | None = None, *, pull: bool = False) -> Repository:
        """The repository, if the asker may write to a revision of it, or with `pull` open a pull request."""
        repository, user = self.readable(ask), self.writer(ask)
        own = any(request.ref == revision and request.author == user for request in repository.pull_requests)
        if not (pull or own or self.member(user, ask["id"].partition("/")[0])):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def signature(self, repository: str, sha256: str) -> str:
        """What an address must carry to which a large object is sent without a token."""
        return hashlib.sha256(f"{self._secret} {repository} {sha256}".encode()).hexdigest()[:32]

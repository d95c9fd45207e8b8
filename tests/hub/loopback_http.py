"""The loopback Hub's side of a connection: requests read and recorded, planted faults, answers sent."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from hub.loopback_store import Refusal

if TYPE_CHECKING:
    from hub.loopback import Hub

INVALID = "Invalid credentials in Authorization header"


@dataclass
class Request:
    """One request as it came in; `path` is decoded and without its query, `size` the bytes of body that were read."""

    method: str
    path: str
    authorization: str | None
    query: dict[str, list[str]] = field(default_factory=dict)
    size: int = 0


@dataclass
class Ask:
    """A request with its body and what its route found in its path, decoded."""

    request: Request
    body: bytes
    headers: Mapping[str, str]
    parts: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, part: str) -> str:
        return self.parts[part]

    def asked(self, name: str) -> str:
        """A value of the query, empty where it is not there."""
        return self.request.query.get(name, [""])[0]

    def flag(self, name: str) -> bool:
        return self.asked(name).lower() in {"1", "true"}

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """What is sent back: bytes as they are, anything else as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What `Hub.fail` planted."""

    method: str
    path: re.Pattern[str]
    status: int
    times: int
    headers: Mapping[str, str]
    skip: int
    after: int | None
    drop: bool

    def answer(self) -> Answer:
        reason = INVALID if self.status == 401 else f"{HTTPStatus(self.status).phrase} (planted)"
        answer = refused(Refusal(self.status, reason))
        answer.headers.update(self.headers)
        return answer


Serve = Callable[["Hub", Ask], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Serve]] = []


def route(method: str, path: str) -> Callable[[Serve], Serve]:
    """Enters a function for a path in which ID stands for a repository and REV for a revision."""
    pattern = path.replace("ID", "(?P<id>[^/]+/[^/]+?)").replace("REV", "(?P<revision>[^/]+)")

    def enter(serve: Serve) -> Serve:
        ROUTES.append((method, re.compile(pattern), serve))
        return serve

    return enter


def refused(refusal: Refusal) -> Answer:
    headers = {"X-Error-Message": refusal.message.encode("ascii", "replace").decode()}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    return Answer({"error": refusal.message, **refusal.more}, refusal.status, headers)


class Server(ThreadingHTTPServer):
    """A thread a connection, all of them ended when the Hub is."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        self.hub = hub
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Ends the connections that clients keep for later."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go when it likes
            self.hub.unknown.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        raw, _, query = self.path.partition("?")
        request = Request(self.command, unquote(raw), self.headers.get("Authorization"), parse_qs(query))
        fault = self.hub.arrived(request)
        limit = fault.after if fault and self.command != "GET" else None
        body = self._body(limit)
        request.size = len(body)
        if limit is not None:
            # As a broken line does: at once, what was not read thrown away.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        answer = fault.answer() if fault and fault.status else None
        if answer is None or (fault and fault.drop):
            carried_out = self.hub.answer(Ask(request, body, self.headers), raw)
            answer = answer or carried_out
        if fault and fault.drop and not fault.status:
            self.close_connection = True
        else:
            self._send(answer, fault.after if fault else None)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _body(self, limit: int | None) -> bytes:
        """The body, or its first `limit` bytes. Raises ConnectionError where it ends early."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            return self._read(length if limit is None else min(length, limit))
        read = bytearray()
        while limit is None or len(read) < limit:
            if not (size := self.rfile.readline()):
                raise ConnectionAbortedError("a chunk is missing")
            length = int(size.split(b";")[0], 16)
            read += self._read(length)
            self.rfile.readline()
            if not length:
                break
        return bytes(read[:limit])

    def _read(self, length: int) -> bytes:
        read = self.rfile.read(length)
        if len(read) < length:
            raise ConnectionAbortedError(f"{len(read)} of {length} bytes of body")
        return read

    def _send(self, answer: Answer, after: int | None) -> None:
        """Sends an answer, or its headers and the first `after` bytes of its body."""
        raw = isinstance(answer.body, bytes)
        body = answer.body if raw else json.dumps(answer.body).encode()
        kind = "application/octet-stream" if raw else "application/json; charset=utf-8"
        self.send_response(answer.status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Request-Id": "Root=1-loopback"}
        for name, value in {**headers, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:after])
        if after is not None:
            self.close_connection = True

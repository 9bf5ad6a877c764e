"""A Hugging Face hub on loopback, as far as fetching files goes, that can be told to misbehave."""

import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar


@dataclass
class FakeHub:
    """What the hub holds and how it behaves; `asked` keeps each GET's path, Range and Authorization.

    `before_reset` is called after a cut answer, whose connection is then reset.
    """

    content: bytes = b""
    status: int = 200
    honours_range: bool = True
    cuts_after: list[int] = field(default_factory=list)
    before_reset: Callable[[], object] | None = None
    redirect: str = ""
    before_answer: Callable[[], object] = lambda: None
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    url: str = ""

    def ranges(self) -> list[str | None]:
        return [asked[1] for asked in self.asked]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append((request.path, request.headers["Range"], request.headers["Authorization"]))
        self.before_answer()
        if self.redirect:
            request.send_response(302)
            request.send_header("Location", self.redirect + request.path)
            request.send_header("Content-Length", "0")
            request.end_headers()
        elif self.status != 200:
            request.send_error(self.status)
        else:
            self._send_content(request, request.headers["Range"] if self.honours_range else None)

    def _send_content(self, request: BaseHTTPRequestHandler, wanted: str | None) -> None:
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = self.content[start:]
        request.send_response(206 if wanted else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        cut = bool(self.cuts_after)
        request.wfile.write(body[: self.cuts_after.pop(0)] if cut else body)
        request.close_connection = True
        if cut and self.before_reset is not None:
            self.before_reset()
            # Closed with nothing to wait for, a connection is reset rather than ended.
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(request.connection.detach())


@dataclass
class FakeModelRepo(FakeHub):
    """A hub with one repository, which answers HEAD as the real one does, asks for a token and knows its account.

    `refusal` is an answer to every question about files: status, X-Error-Code and X-Error-Message.
    """

    repo: str = "someone/model"
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    files: dict[str, bytes] = field(default_factory=dict)
    token: str = ""
    account: str = "ada"
    refusal: tuple[int, str, str] | None = None
    heads: int = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        given = (request.headers["Authorization"] or "").removeprefix("Bearer ")
        if request.path == "/api/whoami-v2":
            self._introduce(request, given)
        elif self.refusal or (given != self.token and self.token):
            self._refuse(request, *(self.refusal or self._stranger(given)))
        elif not request.path.startswith(f"/{self.repo}/"):
            self._refuse(request, 404, "RepoNotFound", "Repository not found")
        elif not request.path.startswith(f"/{self.repo}/resolve/{self.commit}/"):
            self._refuse(request, 404, "RevisionNotFound", f"Invalid rev id: {request.path.split('/')[4]}")
        elif (name := request.path.rpartition("/")[2]) not in self.files:
            self._refuse(request, 404, "EntryNotFound", "Entry not found")
        elif request.command == "HEAD":
            self._describe(request, self.files[name])
        else:
            self.content = self.files[name]
            super().answer(request)

    def _stranger(self, given: str) -> tuple[int, str, str]:
        if given:
            return 401, "", "Invalid credentials in Authorization header"
        return 401, "GatedRepo", f"Access to model {self.repo} is restricted. You must be authenticated to access it."

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", message)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _describe(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        self.heads += 1
        self.before_answer()
        request.send_response(200)
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()

    def _introduce(self, request: BaseHTTPRequestHandler, given: str) -> None:
        if given != self.token:
            self._refuse(request, 401, "", "Invalid credentials in Authorization header")
            return
        body = json.dumps({"type": "user", "name": self.account}).encode()
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


AnyHub = TypeVar("AnyHub", bound=FakeHub)


@contextmanager
def serving(hub: AnyHub) -> Iterator[AnyHub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()
        thread.join()

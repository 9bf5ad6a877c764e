"""A Hugging Face hub on loopback, as far as one file goes, that can be told to misbehave."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeHub:
    """What the hub holds and how it behaves; `asked` keeps each request's path, Range and Authorization."""

    content: bytes
    status: int = 200
    honours_range: bool = True
    cuts_after: list[int] = field(default_factory=list)
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
        request.wfile.write(body[: self.cuts_after.pop(0)] if self.cuts_after else body)
        request.close_connection = True


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()
        thread.join()

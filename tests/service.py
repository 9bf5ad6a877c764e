"""The whole service on a real port, in this process, so that a test can also look inside."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from app.main import Service, create_app
from app.settings import Settings

TOKEN = "fake_auth_token_0123456789abcdef"
CALLER = "+15550100001"
CALLED = "+15550100002"


class Running:
    """A service that answers on `url`."""

    def __init__(self, app: FastAPI, server: uvicorn.Server, port: int) -> None:
        self.service: Service = app.state.service
        self.server = server
        self.url = f"http://127.0.0.1:{port}"
        self.socket_url = f"ws://127.0.0.1:{port}"


@contextlib.contextmanager
def running(folder: Path, port: int, **settings: object) -> Iterator[Running]:
    """Start it with the echo engine and a database in `folder`; stop it afterwards, whatever happened."""
    given = {
        "engine": "echo",
        "port": port,
        "twilio_auth_token": TOKEN,
        "database_url": f"sqlite:///{folder / 'calls.db'}",
        **settings,
    }
    app = create_app(Settings(**given))  # type: ignore[arg-type]
    config = uvicorn.Config(
        app, port=port, loop="uvloop", ws="websockets-sansio", ws_per_message_deflate=False, log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    try:
        wait_for(lambda: server.started and app.state.service.engine.ready)
        yield Running(app, server, port)
    finally:
        app.state.service.store.feed.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the service did not stop"


def wait_for(holds: Callable[[], object], within_s: float = 10.0) -> None:
    """Until it holds; a test that waits in vain fails."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.01)


@contextlib.asynccontextmanager
async def soon(within_s: float = 10.0) -> AsyncIterator[None]:
    """A bound on what is waited for inside."""
    async with asyncio.timeout(within_s):
        yield

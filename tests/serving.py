"""A small app around a store, served over a real socket of this machine."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from app.api import Readiness, api_router, one_error_shape
from app.console.pages import console_router
from app.metrics import Metrics
from app.store import Store
from tests.calls import until


def small_app(store: Store, readiness: Callable[[], Readiness] = lambda: Readiness("echo", True, 4, 3)) -> FastAPI:
    app = FastAPI()
    one_error_shape(app)
    app.include_router(api_router(store, readiness, Metrics()))
    app.include_router(console_router(store))
    return app


@contextlib.contextmanager
def served(app: FastAPI, store: Store, port: int = 0) -> Iterator[str]:
    """The app's address. Ends as the service does: the feed first, then the server waits for what it still answers."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            store.feed.close()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server still waits for a response that does not end"

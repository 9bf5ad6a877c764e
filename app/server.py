"""The server process: one socket, one loop, and an end that closes the live pages before it waits for them."""

import errno
import gc
import logging
import signal
import socket

import uvicorn

from app.main import create_app
from app.settings import Settings
from app.store import Feed

_log = logging.getLogger("personaline")


class PortFault(Exception):
    """The address cannot be listened on. The message says why and what to change."""


class _Server(uvicorn.Server):
    """Tells the live pages to go before uvicorn waits for their responses to end."""

    def __init__(self, config: uvicorn.Config, feed: Feed) -> None:
        super().__init__(config)
        self._feed = feed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._feed.close()
        await super().shutdown(sockets)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises PortFault, and what `create_app` raises, before anything is served.
    """
    listening = _listen(settings.host, settings.port)
    app = create_app(settings)
    if settings.dev_allow_unsigned:
        _log.warning("DEV_ALLOW_UNSIGNED=1: ANYONE who reaches this port can place calls. For local trials only.")
    config = uvicorn.Config(
        app, loop="uvloop", ws="websockets-sansio", ws_per_message_deflate=False, ws_max_size=65_536,
        log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=10,
    )  # fmt: skip
    service = app.state.service
    _log.info("engine %s, %d calls at once; the page is at http://%s:%d/", service.engine_name,
              service.engine.capacity, settings.host, settings.port)  # fmt: skip
    # uvicorn ends gracefully on SIGTERM and then raises it again, to the handler that was there before its own: with
    # this one, a service that was asked to stop and did exits with 0.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    _calm_collector()
    _Server(config, service.store.feed).run([listening])


def _calm_collector() -> None:
    """What is loaded stays: leave it out of every collection, and collect the rest less often than every 700 objects.

    160 calls make some 50,000 short-lived objects a second, none of them in a cycle.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise PortFault(f"cannot listen on {host}:{port}: {_why(error)}") from error
    return listening


def _why(error: Exception) -> str:
    match getattr(error, "errno", None):
        case errno.EADDRINUSE:
            return "another program uses this port; choose another with --port or PORT"
        case errno.EACCES:
            return "this user may not use this port; choose one above 1023 with --port or PORT"
        case errno.EADDRNOTAVAIL:
            return "this machine has no such address; 127.0.0.1 or 0.0.0.0 is right for HOST"
        case _:
            return f"{error}; an address such as 127.0.0.1 is right for HOST"

"""A service of one's own for a trial: `personaline serve` in another process, on this machine only."""

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx

READY_WITHIN_S = 300.0

_LOOK_EVERY_S = 0.25
_STOP_WITHIN_S = 20.0
_PERSONAS = Path(__file__).resolve().parent.parent.parent / "personas"
_LOG = "service.log"


class ServiceFault(Exception):
    """The service did not start or does not answer. The message says what it said."""


class TrialService:
    """A running service: where it is, and the token that its webhooks are signed with."""

    def __init__(self, folder: Path, engine: str, port: int | None) -> None:
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = secrets.token_hex(16)
        self._log = folder / _LOG
        self._environment = {
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "PUBLIC_URL": self.url,
            "TWILIO_AUTH_TOKEN": self.token,
            "DEV_ALLOW_UNSIGNED": "0",
            "DATABASE_URL": f"sqlite:///{(folder / 'calls.db').absolute()}",
            "ENGINE": engine,
            "PERSONAS_DIR": str(_PERSONAS),
            "LOG_LEVEL": "info",
        }
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process; what it logs goes into the folder. Raises ServiceFault."""
        try:
            log = self._log.open("wb")
        except OSError as error:
            raise ServiceFault(f"{self._log}: cannot be written: {error.strerror}") from error
        with log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "app.cli", "serve", env=os.environ | self._environment, stdout=log, stderr=log
            )

    def client(self) -> httpx.AsyncClient:
        """A client for its HTTP interface."""
        return httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=10)

    async def until_ready(self, http: httpx.AsyncClient, progress: Callable[[str], None]) -> None:
        """Wait until calls can be taken, saying what is waited for. Raises ServiceFault."""
        assert self._process is not None, "it was started"
        deadline_s = time.monotonic() + READY_WITHIN_S
        told = ""
        while reasons := await self._not_ready(http):
            if self._process.returncode is not None:
                raise ServiceFault(f"the service stopped: {self._last_words()}")
            if time.monotonic() > deadline_s:
                raise ServiceFault(f"the service was not ready within {READY_WITHIN_S:.0f} s; {self._log} says more")
            if reasons != told:
                told = reasons
                progress(told)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def stop(self) -> None:
        """Stop the process, by force if it takes longer than 20 s."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_WITHIN_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _not_ready(self, http: httpx.AsyncClient) -> str:
        try:
            reply = await http.get("/ready")
        except httpx.TransportError:
            return "waiting for the service to start"
        if reply.status_code == 200:
            return ""
        return "waiting: " + "; ".join(reply.json().get("reasons") or ["the service is not ready"])

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(lines[-5:]) or f"{self._log} is empty"


@contextlib.asynccontextmanager
async def trial_service(folder: Path, engine: str, port: int | None = None) -> AsyncIterator[TrialService]:
    """Start a service with its database and log in `folder`, on a free port if none is given; stop it at the end.

    Raises ServiceFault.
    """
    service = TrialService(folder, engine, port)
    try:
        await service.start()
        yield service
    finally:
        await service.stop()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    return port

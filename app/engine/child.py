"""The engine's own process: the very same Engine, told what to do over a pipe and given frames by shared memory."""

import contextlib
import faulthandler
import gc
import logging
import logging.handlers
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

from app.engine.contract import EngineFault, Heard, Role, Runner, Spoken
from app.engine.engine import Engine
from app.engine.frames import FrameRings, RingTable
from app.engine.slots import Lease

END_WITHIN_S = 5.0
"""A process that has been told to end, or whose parent is gone, is ended by force after so long."""


_log = logging.getLogger("personaline.engine")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a process needs to become an engine. `make` is called there, so it must be picklable.

    `heard` and `spoken` name the rings of `rows` rows; `log_level` is the parent's for `personaline`.
    """

    make: Callable[[], Runner]
    roles: Sequence[Role]
    rows: int
    heard: str
    spoken: str
    log_level: int


@dataclass(frozen=True, slots=True)
class Hold:
    lease: Lease
    role: Role


@dataclass(frozen=True, slots=True)
class Say:
    lease: Lease
    text: str
    start_within_ms: int | None


@dataclass(frozen=True, slots=True)
class Change:
    lease: Lease
    role: Role


@dataclass(frozen=True, slots=True)
class Release:
    lease: Lease


class Stop:
    """Finish the tick and end."""


Order = Hold | Say | Change | Release | Stop


class Warm(NamedTuple):
    """Loaded: the first word of a process that can take calls."""

    rows: int


class Words(NamedTuple):
    """All of a `Spoken` but its samples."""

    text: str
    ends: bool
    interrupted: bool
    heard: tuple[Heard, ...]
    said: str


SILENT = Words("", False, False, (), "")


class Ticked(NamedTuple):
    """A tick has been, whether or not anybody spoke: the sign of life.

    `frames` are rows, tickets, and the numbers under which the samples lie in the row's ring; `words` is what goes with
    some of them, by their place in that list.
    """

    tick_s: float
    late_ticks: int
    dropped_frames: int
    behind: bool
    frames: list[tuple[int, int, int]]
    words: dict[int, Words]


class Failed(NamedTuple):
    """The last word of an engine that cannot start or go on. `users`: an EngineFault, which a user can mend."""

    message: str
    users: bool


Report = Warm | Ticked | Failed | logging.LogRecord


class EngineChild:
    """Joins an Engine, which runs on the main thread, to the pipe. A thread of its own takes the orders."""

    def __init__(self, plan: Plan, pipe: Connection) -> None:
        self._pipe = pipe
        self._sending = threading.Lock()
        self._heard = FrameRings(plan.rows, plan.heard)
        self._spoken = FrameRings(plan.rows, plan.spoken)
        self._plan = plan
        self._engine: Engine | None = None
        self._warm = False
        self._log_to_parent()

    def run(self) -> None:
        """Until the parent says so, or is gone, or the engine fails. Then the process may end."""
        threading.Thread(target=self._obey, name="orders", daemon=True).start()
        try:
            runner = self._plan.make()
        except Exception as error:  # noqa: BLE001 - the process's edge: the parent is told
            _log.error("the engine cannot be made: %s", error, exc_info=not isinstance(error, EngineFault))
            self._fail(error)
            return
        self._engine = Engine(runner, self._deliver, self._plan.roles, lambda rows: RingTable(self._heard, rows))
        self._engine.run()
        if self._engine.fault is not None:
            self._fail(self._engine.fault)

    def _fail(self, error: Exception) -> None:
        self._send(Failed(str(error), isinstance(error, EngineFault)))

    def _deliver(self, spoken: Sequence[tuple[Lease, Spoken]]) -> None:
        assert self._engine is not None
        engine = self._engine
        if not self._warm:
            self._warm = True
            _calm_collector()
            self._send(Warm(engine.capacity))
        numbers = self._spoken.write([(lease, one.pcm) for lease, one in spoken])
        frames = [(lease.row, lease.ticket, number) for (lease, _), number in zip(spoken, numbers, strict=True)]
        words = {at: found for at, (_, one) in enumerate(spoken) if (found := _words(one)) != SILENT}
        self._send(Ticked(engine.tick_s, engine.late_ticks, engine.dropped_frames, engine.behind, frames, words))

    def _obey(self) -> None:
        order: Order = Stop()
        while True:
            try:
                order = self._pipe.recv()
            except (EOFError, OSError):
                order = Stop()
            if isinstance(order, Stop):
                break
            assert self._engine is not None, "orders come once the engine is warm"
            _obey(self._engine, order)
        self._end()

    def _end(self) -> None:
        """Let the engine finish its tick, but not for ever; one that still loads has nothing to finish."""
        if not self._warm:
            os._exit(0)
        assert self._engine is not None
        self._engine.stop()
        threading.Event().wait(END_WITHIN_S)
        os._exit(1)

    def _log_to_parent(self) -> None:
        root = logging.getLogger()
        root.handlers[:] = [_ToParent(self._send)]
        root.setLevel(logging.WARNING)
        logging.getLogger("personaline").setLevel(self._plan.log_level)

    def _send(self, report: Report) -> None:
        # A parent that is gone is noticed by the thread that takes its orders.
        with self._sending, contextlib.suppress(OSError):
            self._pipe.send(report)


class _ToParent(logging.Handler):
    """Hands records to the parent, which writes them as its own."""

    def __init__(self, send: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # Only what can be sent: a library may hang anything on its records.
            words = self.format(record)
            told = logging.LogRecord(record.name, record.levelno, record.pathname, record.lineno, words, None, None)
            told.created = record.created
            self._send(told)
        except Exception:  # noqa: BLE001 - as every handler of the standard library does
            self.handleError(record)


def run_child(plan: Plan, pipe: Connection) -> None:
    """The process's whole life. Ctrl-C and SIGTERM reach it with the parent, which still has calls to end."""
    if sys.stderr is not None:
        faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    EngineChild(plan, pipe).run()
    # Not by way of finalizers: a GPU in disorder can hang them, and there is nothing left to save.
    logging.shutdown()
    os._exit(0)


def _calm_collector() -> None:
    """What is loaded stays: leave it out of every collection, and collect the rest less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _words(one: Spoken) -> Words:
    return Words(one.text, one.ends, one.interrupted, one.heard, one.said)


def _obey(engine: Engine, order: Order) -> None:
    match order:
        case Hold(lease, role):
            engine.hold(lease, role)
        case Say(lease, text, start_within_ms):
            engine.say(lease, text, start_within_ms)
        case Change(lease, role):
            engine.change(lease, role)
        case Release(lease):
            engine.release(lease)

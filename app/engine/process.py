"""The engine in a process of its own: no socket holds its interpreter up, and a fault of the GPU ends calls only."""

import atexit
import contextlib
import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np

from app.engine.child import (
    END_WITHIN_S,
    SILENT,
    Change,
    Failed,
    Hold,
    Order,
    Plan,
    Release,
    Report,
    Say,
    Stop,
    Ticked,
    Warm,
    run_child,
)
from app.engine.contract import FRAME_SAMPLES, EngineFault, EngineFull, Pcm, Role, Runner, Spoken
from app.engine.engine import Deliver, check_words
from app.engine.frames import FrameRings
from app.engine.slots import Lease, LeaseTable

HANGS_AFTER_S = 5.0
"""An engine that was warm and has not ticked for so long is replaced."""
QUIET_AFTER_S = 1.0
"""No new call goes to an engine that has not ticked for so long."""
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0
"""Before another process is started; doubled each time, until one has ticked for a minute."""
STEADY_AFTER_S = 60.0

_NOTHING = Ticked(0.0, 0, 0, False, [], {})
_LOOK_S = 0.25
_KILL_WITHIN_S = 5.0

_log = logging.getLogger("personaline.engine")


class EngineProcess:
    """One runner in another process, which is watched and replaced when it ends. A `SpeechEngine`.

    A process that is replaced takes its calls with it: their leases end, and new calls are refused until the next one
    is warm. An EngineFault while the first one loads is a user's to mend: `fault` has it, and nothing is tried again.
    """

    def __init__(self, make: Callable[[], Runner], rows: int, deliver: Deliver, roles: Sequence[Role] = ()) -> None:
        """`make` is called in the other process, so it must be picklable; `rows` is the most that its runner has."""
        self._make = make
        self._rows = rows
        self._deliver = deliver
        self._roles = roles
        self._leasing = threading.Lock()
        self._leases = LeaseTable(rows)
        self._life: _Life | None = None
        self._counted = _NOTHING
        self._late_ticks = self._dropped_frames = 0
        self._ticked_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="engine keeper", daemon=True)
        self.fault: Exception | None = None
        self.tick_s = 0.0
        self.restarts = 0

    @property
    def capacity(self) -> int:
        return self._leases.capacity

    @property
    def in_use(self) -> int:
        return self._leases.in_use

    @property
    def dropped_frames(self) -> int:
        return self._dropped_frames + self._counted.dropped_frames

    @property
    def late_ticks(self) -> int:
        return self._late_ticks + self._counted.late_ticks

    @property
    def ready(self) -> bool:
        return self._life is not None

    @property
    def refusal(self) -> EngineFull | None:
        if self.fault is not None:
            return EngineFull("the engine has stopped", "not_ready")
        if self._life is None:
            again = " again: it had stopped" if self.restarts else ""
            return EngineFull(f"the engine is not ready{again}", "not_ready")
        quiet = time.monotonic() - self._ticked_s > QUIET_AFTER_S
        behind = quiet or (self._counted.behind and self.in_use > 0)
        return EngineFull("the engine is behind its beat", "behind") if behind else None

    def start(self) -> None:
        """Start the process. It loads the models first; `ready` tells when calls can be taken."""
        atexit.register(self.close)
        self._thread.start()

    def close(self) -> None:
        """End the process, by force if it takes longer than 5 s. Blocks until that is done. Twice is harmless."""
        self._stopping.set()
        atexit.unregister(self.close)
        if self._thread.ident is not None:
            self._thread.join()

    def lease(self, role: Role) -> Lease:
        """Take a row for a call in this role; its prompt and greeting are prepared from now on.

        Raises:
            EngineFull: no row is free, or the engine is not ready or behind its beat. The caller gets a busy answer.
        """
        with self._leasing:
            refusal, life = self.refusal, self._life
            if refusal is not None or life is None:
                raise refusal or EngineFull("the engine is not ready", "not_ready")
            lease = self._leases.lease()
            life.order(Hold(lease, role))
        return lease

    def holds(self, lease: Lease) -> bool:
        return self._leases.holds(lease)

    def push(self, lease: Lease, frame: Pcm) -> bool:
        """Give a frame heard, float32 [1920]. False when the lease has ended: drop it."""
        with self._leasing:
            if self._life is None or not self._leases.holds(lease):
                return False
            self._life.heard.write([(lease, frame)])
        return True

    def say(self, lease: Lease, text: str, start_within_ms: int | None = None) -> bool:
        """Words that the agent must say, as in `Runner.say`. False when the lease has ended: nobody will say them.

        Raises:
            ValueError: no words, or a negative time.
        """
        check_words(text, start_within_ms)
        return self._order(Say(lease, text, start_within_ms))

    def change(self, lease: Lease, role: Role) -> bool:
        """Let another role take the call over, as in `Runner.change`. False when the lease has ended."""
        return self._order(Change(lease, role))

    def release(self, lease: Lease) -> None:
        """Give the row back. Twice is harmless."""
        with self._leasing:
            if self._leases.release(lease) and self._life is not None:
                self._life.order(Release(lease))

    def _order(self, order: Say | Change) -> bool:
        with self._leasing:
            if self._life is None or not self._leases.holds(order.lease):
                return False
            self._life.order(order)
        return True

    def _keep_alive(self) -> None:
        """One process after the other, until `close` or a fault that no other process would mend."""
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            steady = self._live()
            if self._stopping.is_set() or self.fault is not None:
                return
            pause_s = FIRST_PAUSE_S if steady else pause_s
            _log.warning("the engine's process is started again in %.0f s", pause_s)
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
            self.restarts += 1

    def _live(self) -> bool:
        """One process's life. Whether it ticked for a minute."""
        try:
            life = _Life(self._make, self._roles, self._rows)
        except OSError as error:
            _log.error("the engine's process cannot be started: %s", error)
            return False
        except Exception as error:  # noqa: BLE001 - the thread's edge: /ready, every call and the log are told
            self.fault = error
            _log.exception("the engine's process cannot be started")
            return False
        warm_s = None
        try:
            for report in life.reports(self._stopping):
                if isinstance(report, Warm):
                    warm_s = time.monotonic()
                self._take(report, life)
        except Exception:  # noqa: BLE001 - the thread's edge: the process is replaced
            _log.exception("what the engine's process tells cannot be understood")
            life.give_up()
        finally:
            self._end_calls()
            life.end()
        return warm_s is not None and time.monotonic() - warm_s > STEADY_AFTER_S

    def _take(self, report: Report, life: "_Life") -> None:
        match report:
            case Ticked():
                self._tick(report, life)
            case Warm(rows):
                with self._leasing:
                    self._ticked_s = time.monotonic()
                    self._leases = LeaseTable(rows, self._leases.given)
                    self._life = life
            case Failed(message, users):
                if users and not life.warm and not self.restarts:
                    self.fault = EngineFault(message)
            case _:
                logging.getLogger(report.name).handle(report)

    def _tick(self, ticked: Ticked, life: "_Life") -> None:
        self._counted, self._ticked_s = ticked, time.monotonic()
        self.tick_s = ticked.tick_s
        spoken = []
        for at, (row, ticket, number) in enumerate(ticked.frames):
            lease = Lease(row, ticket)
            if self._leases.holds(lease) and (pcm := life.spoken_frame(lease, number)) is not None:
                spoken.append((lease, Spoken(pcm, *ticked.words.get(at, SILENT))))
        self._deliver(spoken)

    def _end_calls(self) -> None:
        with self._leasing:
            self._life = None
            self._leases = LeaseTable(self._leases.capacity, self._leases.given)
        # Whoever reads in between sees a little less, never more: a counter cannot go back.
        late, dropped = self.late_ticks, self.dropped_frames
        self._counted = _NOTHING
        self._late_ticks, self._dropped_frames = late, dropped


class _Life:
    """One process, its pipe and its rings, from its start to its end."""

    def __init__(self, make: Callable[[], Runner], roles: Sequence[Role], rows: int) -> None:
        """Raises what starting a process can raise, with nothing left behind."""
        self.warm = False
        self._hung = False
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="engine orders", daemon=True)
        context = multiprocessing.get_context("spawn")
        with contextlib.ExitStack() as undo:
            self.heard = undo.enter_context(contextlib.closing(FrameRings(rows)))
            self._spoken = undo.enter_context(contextlib.closing(FrameRings(rows)))
            self._pipe, theirs = context.Pipe()
            undo.callback(self._pipe.close)
            plan = Plan(make, tuple(roles), rows, self.heard.name, self._spoken.name, _log.getEffectiveLevel())
            with theirs:
                self._process = context.Process(target=run_child, args=(plan, theirs), name="personaline engine")
                self._process.start()
            self._shared = undo.pop_all()
        self._writer.start()

    def order(self, order: Order) -> None:
        """Never waits."""
        self._orders.put(order)

    def spoken_frame(self, lease: Lease, number: int) -> Pcm | None:
        """The samples, float32 [1920]. None for those that this side was too slow to fetch."""
        pcm = np.empty(FRAME_SAMPLES, np.float32)
        return pcm if self._spoken.read(lease, number, pcm) else None

    def reports(self, stopping: threading.Event) -> Iterator[Report]:
        """What the process tells, until it ends, hangs, or was told to stop and has not within 5 s."""
        quiet_s, stop_by_s = 0.0, None
        while True:
            if stopping.is_set() and stop_by_s is None:
                stop_by_s = time.monotonic() + END_WITHIN_S
                self.order(Stop())
            self._hung = time.monotonic() > stop_by_s if stop_by_s else self.warm and quiet_s >= HANGS_AFTER_S
            if self._hung:
                return
            # Counted in looks, not by the clock: this process may have been suspended, and the other with it.
            if not self._pipe.poll(_LOOK_S):
                quiet_s += _LOOK_S
                continue
            report = _receive(self._pipe)
            if report is None:
                return
            quiet_s = 0.0
            self.warm = self.warm or isinstance(report, Warm)
            yield report

    def give_up(self) -> None:
        """It shall end by force: nobody listens to it any more."""
        self._hung = True

    def end(self) -> None:
        """Whatever the process is doing, it and all that was shared with it is gone afterwards."""
        self._process.join(0 if self._hung else END_WITHIN_S)
        if self._process.exitcode is None:
            _log.error("the engine's process does not answer, and is ended by force")
            self._process.kill()
            self._process.join(_KILL_WITHIN_S)
        if self._process.exitcode is None:
            _log.error("the engine's process %s cannot even be ended by force", self._process.pid)
        elif self._process.exitcode:
            _log.error("the engine's process has ended with code %d", self._process.exitcode)
        self._orders.put(None)
        self._shared.close()
        self._writer.join(_KILL_WITHIN_S)

    def _write(self) -> None:
        """A pipe that is full, since nobody reads it, holds up this thread and no other."""
        while (order := self._orders.get()) is not None:
            try:
                self._pipe.send(order)
            except OSError:
                return


def _receive(pipe: Connection) -> Report | None:
    """None once the process has ended."""
    try:
        report: Report = pipe.recv()
    except (EOFError, OSError):
        return None
    return report

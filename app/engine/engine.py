"""The engine thread: at every tick, one frame of each call that has one goes through the runner."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from app.engine.beat import Beat
from app.engine.contract import FRAME_SAMPLES, EngineFault, EngineFull, Pcm, Role, Runner, Spoken
from app.engine.slots import Lease, SlotTable

_log = logging.getLogger("personaline.engine")

Deliver = Callable[[Sequence[tuple[Lease, Spoken]]], None]
"""Called at each tick at which anybody spoke, on a thread of the engine's, with what each row said.

And once a beat with nothing, when nobody does: a sign of life.
"""


class SpeechEngine(Protocol):
    """What the service and its calls ask of an engine, wherever it runs.

    Every method but `start` and `close` may be called from any thread and never waits.
    """

    fault: Exception | None
    tick_s: float
    restarts: int

    @property
    def capacity(self) -> int: ...

    @property
    def in_use(self) -> int: ...

    @property
    def dropped_frames(self) -> int: ...

    @property
    def late_ticks(self) -> int: ...

    @property
    def ready(self) -> bool: ...

    @property
    def refusal(self) -> EngineFull | None:
        """What a caller would be told now, were a row free. None: welcome."""
        ...

    def start(self) -> None: ...

    def close(self) -> None: ...

    def lease(self, role: Role) -> Lease: ...

    def holds(self, lease: Lease) -> bool:
        """Whether this lease is still good. It ends by `release`, and when the engine stops."""
        ...

    def push(self, lease: Lease, frame: Pcm) -> bool: ...

    def say(self, lease: Lease, text: str, start_within_ms: int | None = None) -> bool: ...

    def change(self, lease: Lease, role: Role) -> bool: ...

    def release(self, lease: Lease) -> None: ...


class Slots(Protocol):
    """A `SlotTable`, or what stands where one does."""

    @property
    def capacity(self) -> int: ...

    @property
    def in_use(self) -> int: ...

    dropped_frames: int

    def lease(self) -> Lease: ...

    def hold(self, lease: Lease) -> None: ...

    def release(self, lease: Lease) -> bool: ...

    def holds(self, lease: Lease) -> bool: ...

    def push(self, lease: Lease, frame: Pcm) -> bool: ...

    def take(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Lease]: ...


class Engine:
    """One runner on one thread. A `SpeechEngine`.

    `slots` makes the table of rows, once for as many as the runner has, and again if it has fewer once it is warm.
    """

    restarts = 0

    def __init__(
        self, runner: Runner, deliver: Deliver, roles: Sequence[Role] = (), slots: Callable[[int], Slots] = SlotTable
    ) -> None:
        self._runner = runner
        self._deliver = deliver
        self._roles = roles
        self._make_slots = slots
        self._orders: deque[Callable[[], None]] = deque()
        self._ordering = threading.Lock()
        self._stopping = threading.Event()
        self._warm = threading.Event()
        self._beat = Beat()
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self._make_room()
        self.fault: Exception | None = None
        self.tick_s = 0.0

    def _make_room(self) -> None:
        rows = self._runner.rows
        self._slots = self._make_slots(rows)
        self._pcm: Pcm = np.zeros((rows, FRAME_SAMPLES), np.float32)
        self._active = np.zeros(rows, np.bool_)

    @property
    def capacity(self) -> int:
        return self._slots.capacity

    @property
    def in_use(self) -> int:
        return self._slots.in_use

    @property
    def dropped_frames(self) -> int:
        return self._slots.dropped_frames

    @property
    def late_ticks(self) -> int:
        return self._beat.late_ticks

    @property
    def behind(self) -> bool:
        """Whether ticks have lately been late, more often than by accident."""
        return self._beat.behind(time.monotonic())

    @property
    def ready(self) -> bool:
        return self._warm.is_set() and self.fault is None

    @property
    def refusal(self) -> EngineFull | None:
        if self.fault is not None:
            return EngineFull("the engine has stopped", "not_ready")
        if not self._warm.is_set():
            return EngineFull("the engine is not ready", "not_ready")
        # With no call up there is nobody whom another could harm.
        behind = self.behind and self.in_use > 0
        return EngineFull("the engine is behind its beat", "behind") if behind else None

    def start(self) -> None:
        """Start the thread. It loads the models first; `ready` tells when calls can be taken."""
        self._thread.start()

    def stop(self) -> None:
        """Let `run` return after the tick that is running."""
        self._stopping.set()

    def close(self) -> None:
        """Stop after the tick that is running, and free the models. Blocks until that is done."""
        self.stop()
        if self._thread.ident is not None:
            self._thread.join()

    def lease(self, role: Role) -> Lease:
        """Take a row for a call in this role; its prompt and greeting are prepared from now on.

        Raises:
            EngineFull: no row is free, or the engine is not ready or behind its beat. The caller gets a busy answer.
        """
        if (refusal := self.refusal) is not None:
            raise refusal
        with self._ordering:
            lease = self._slots.lease()
            self._orders.append(lambda: self._runner.join(lease.row, role))
        return lease

    def hold(self, lease: Lease, role: Role) -> None:
        """Begin a call on the row of a lease that another process has given."""
        with self._ordering:
            self._slots.hold(lease)
            self._orders.append(lambda: self._runner.join(lease.row, role))

    def holds(self, lease: Lease) -> bool:
        return self.fault is None and self._slots.holds(lease)

    def push(self, lease: Lease, frame: Pcm) -> bool:
        """Give a frame heard, float32 [1920]. False when the lease has ended: drop it."""
        return self._slots.push(lease, frame)

    def say(self, lease: Lease, text: str, start_within_ms: int | None = None) -> bool:
        """Words that the agent must say, as in `Runner.say`. False when the lease has ended: nobody will say them.

        Raises:
            ValueError: no words, or a negative time.
        """
        check_words(text, start_within_ms)
        return self._order(lease, lambda: self._runner.say(lease.row, text, start_within_ms))

    def change(self, lease: Lease, role: Role) -> bool:
        """Let another role take the call over, as in `Runner.change`. False when the lease has ended."""
        return self._order(lease, lambda: self._runner.change(lease.row, role))

    def release(self, lease: Lease) -> None:
        """Give the row back. Twice is harmless."""
        with self._ordering:
            if self._slots.release(lease):
                self._orders.append(lambda: self._runner.leave(lease.row))

    def _order(self, lease: Lease, order: Callable[[], None]) -> bool:
        """Have the engine thread do this between two ticks, unless the lease has ended by then."""
        with self._ordering:
            held = self._slots.holds(lease)
            if held:
                self._orders.append(lambda: order() if self._slots.holds(lease) else None)
        return held

    def run(self) -> None:
        """The engine's whole life, on the thread that calls it: until `stop`, or until it fails."""
        try:
            self._runner.warm_up(self._roles)
            if self._runner.rows != self.capacity:
                self._make_room()
            self._warm.set()
            self._tick_on_the_beat()
        except EngineFault as error:
            self.fault = error
            _log.error("the engine cannot start or go on: %s", error)
        except Exception as error:  # noqa: BLE001 - the thread's edge: /ready, every call and the log are told
            self.fault = error
            _log.exception("the engine stopped: its calls end as failed")
        finally:
            self._runner.close()

    def _tick_on_the_beat(self) -> None:
        beat = self._beat
        beat.begin(time.monotonic())
        while not self._stopping.wait(max(0.0, beat.due_s - time.monotonic())):
            began_s = time.monotonic()
            self._tick(began_s)
            beat.ended(began_s, time.monotonic())

    def _tick(self, began_s: float) -> None:
        # Together, so that nobody's frame is taken whose join is still to come.
        with self._ordering:
            orders = [*self._orders]
            self._orders.clear()
            leases = self._slots.take(self._pcm, self._active)
        for order in orders:
            order()
        if leases or self._beat.on_beat:
            self._deliver(self._step(leases, began_s))
        if self._beat.on_beat:
            self._runner.between()

    def _step(self, leases: list[Lease], began_s: float) -> list[tuple[Lease, Spoken]]:
        if not leases:
            return []
        spoken = self._runner.step(self._pcm, self._active)
        self.tick_s = time.monotonic() - began_s
        return [(lease, frame) for lease in leases if (frame := spoken[lease.row]) is not None]


def check_words(text: str, start_within_ms: int | None) -> None:
    """Raises ValueError for words that cannot be said: none, or after a negative time."""
    if not text.strip() or (start_within_ms or 0) < 0:
        found = f"text {text!r}, start_within_ms {start_within_ms}"
        raise ValueError(f"say: {found}; words are right, and a time from 0 up or None")

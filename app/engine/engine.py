"""The engine thread and its beat: every 80 ms, one frame of each call that has one goes through the runner."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from app.engine.contract import FRAME_MS, FRAME_SAMPLES, EngineFault, EngineFull, Pcm, Role, Runner, Spoken
from app.engine.slots import Lease, SlotTable

BEAT_S = FRAME_MS / 1000
_BEHIND_BEATS = 4

_log = logging.getLogger("personaline.engine")

Deliver = Callable[[Sequence[tuple[Lease, Spoken]]], None]
"""Called on the engine thread, at most once a tick, with what each row said."""


class Engine:
    """One runner on one thread.

    `lease`, `push`, `say`, `change` and `release` may be called from any thread and never wait.
    """

    def __init__(self, runner: Runner, deliver: Deliver, roles: Sequence[Role] = ()) -> None:
        self._runner = runner
        self._deliver = deliver
        self._roles = roles
        self._slots = SlotTable(runner.rows)
        self._orders: deque[Callable[[], None]] = deque()
        self._ordering = threading.Lock()
        self._stopping = threading.Event()
        self._warm = threading.Event()
        self._epoch_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._pcm: Pcm = np.zeros((runner.rows, FRAME_SAMPLES), np.float32)
        self._active = np.zeros(runner.rows, np.bool_)
        self.fault: Exception | None = None
        self.tick_s = 0.0
        self.late_ticks = 0

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
    def ready(self) -> bool:
        return self._warm.is_set() and self.fault is None

    def start(self) -> None:
        """Start the thread. It loads the models first; `ready` tells when calls can be taken."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the tick that is running, and free the models. Blocks until that is done."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def lease(self, role: Role) -> Lease:
        """Take a row for a call in this role; its prompt and greeting are prepared from now on.

        Raises:
            EngineFull: no row is free, or the engine is not ready. The caller gets a busy answer.
        """
        if not self.ready:
            raise EngineFull("the engine is not ready")
        with self._ordering:
            lease = self._slots.lease()
            self._orders.append(lambda: self._runner.join(lease.row, role))
        return lease

    def push(self, lease: Lease, frame: Pcm) -> bool:
        """Give a frame heard, float32 [1920]. False when the lease has ended: drop it."""
        return self._slots.push(lease, frame)

    def say(self, lease: Lease, text: str, start_within_ms: int | None = None) -> bool:
        """Words that the agent must say, as in `Runner.say`. False when the lease has ended: nobody will say them.

        Raises:
            ValueError: no words, or a negative time.
        """
        if not text.strip() or (start_within_ms or 0) < 0:
            found = f"text {text!r}, start_within_ms {start_within_ms}"
            raise ValueError(f"say: {found}; words are right, and a time from 0 up or None")
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

    def until_tick_s(self) -> float:
        """How long until the next beat: a call shifts its framing so that its frames complete just before it."""
        return BEAT_S - math.fmod(time.monotonic() - self._epoch_s, BEAT_S)

    def _run(self) -> None:
        try:
            self._runner.warm_up(self._roles)
            self._warm.set()
            self._beat()
        except EngineFault as error:
            self.fault = error
            _log.error("the engine cannot start or go on: %s", error)
        except Exception as error:  # noqa: BLE001 - the thread's edge: /ready, every call and the log are told
            self.fault = error
            _log.exception("the engine stopped: its calls end as failed")
        finally:
            self._runner.close()

    def _beat(self) -> None:
        """Tick on multiples of 80 ms; a late tick is followed at once by the next, until the beat is caught up."""
        due_s = time.monotonic() + self.until_tick_s()
        while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
            began_s = time.monotonic()
            self._tick()
            self.tick_s = time.monotonic() - began_s
            due_s += BEAT_S
            behind = (time.monotonic() - due_s) / BEAT_S
            if behind > 0:
                self.late_ticks += 1
            if behind > _BEHIND_BEATS:
                due_s += math.floor(behind) * BEAT_S

    def _tick(self) -> None:
        # Together, so that nobody's frame is taken whose join is still to come.
        with self._ordering:
            orders = [*self._orders]
            self._orders.clear()
            leases = self._slots.take(self._pcm, self._active)
        for order in orders:
            order()
        if leases:
            spoken = self._runner.step(self._pcm, self._active)
            self._deliver([(lease, frame) for lease in leases if (frame := spoken[lease.row]) is not None])
        self._runner.between()

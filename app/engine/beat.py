"""The beat: four ticks in the 80 ms of a frame, when the next one is due, and what being behind means."""

import math
import time
from collections import deque

from app.engine.contract import FRAME_MS

BEAT_S = FRAME_MS / 1000
TICKS = 4
"""A beat's ticks, 20 ms apart as a carrier's packets are."""
TICK_S = BEAT_S / TICKS
BEHIND_TICKS = 3
BEHIND_WITHIN_S = 2.0
"""So many late ticks within so short a time are no accident: no new call is taken until it has passed."""

# Of a tick: what lies so close before a multiple of 20 ms is meant to be it.
_ROUNDING = 1e-6


class Beat:
    """Ticks on multiples of 20 ms from an epoch. A tick that takes longer is followed at once by the next.

    So a call waits for others as little as the GPU allows: few calls are stepped a quarter at a time, and the more time
    that takes, the more of them a tick finds, down to all of them at once. `docs/performance.md` compares other ways.

    A tick is late when it ends more than a beat after it was due: its calls' next frames are there already. Times are
    seconds of `time.monotonic`. Engine thread only, but for `behind`.
    """

    def __init__(self, epoch_s: float | None = None) -> None:
        self._epoch_s = time.monotonic() if epoch_s is None else epoch_s
        self.late_ticks = 0
        self._late_at_s: deque[float] = deque(maxlen=BEHIND_TICKS)
        self._next = self._beat = 0
        self.due_s = self._epoch_s

    @property
    def on_beat(self) -> bool:
        """Whether the tick that is due is the beat's first, or the first one since that was passed over."""
        return self._next >= self._beat

    def behind(self, now_s: float) -> bool:
        """Whether ticks have lately been late, more often than by accident."""
        return len(self._late_at_s) == BEHIND_TICKS and now_s - self._late_at_s[0] < BEHIND_WITHIN_S

    def begin(self, now_s: float) -> None:
        """The next multiple is the first tick."""
        self._wait_for(self._index(now_s) + 1, now_s)

    def ended(self, began_s: float, now_s: float) -> None:
        """The tick that was due began and ended: set the next."""
        if now_s > self.due_s + BEAT_S:
            self.late_ticks += 1
            self._late_at_s.append(now_s)
        began = self._index(began_s)
        if self.on_beat:
            self._beat = (began // TICKS + 1) * TICKS
        self._wait_for(began + 1, now_s)

    def _wait_for(self, tick: int, now_s: float) -> None:
        self._next = max(tick, self._index(now_s))
        self.due_s = max(now_s, self._epoch_s + tick * TICK_S)

    def _index(self, at_s: float) -> int:
        return math.floor((at_s - self._epoch_s) / TICK_S + _ROUNDING)

"""The beat: when the next tick is due, when there is time for late frames in between, and what being behind means."""

import math
import time
from collections import deque

from app.engine.contract import FRAME_MS

BEAT_S = FRAME_MS / 1000
LOOKS = 4
"""Looks for waiting frames in a beat, the tick among them: a frame that missed its tick waits 20 ms, not 80."""
BEHIND_TICKS = 3
BEHIND_WITHIN_S = 2.0
"""So many late ticks within so short a time are no accident: no new call is taken until it has passed."""

_CAUGHT_UP_BEATS = 4
# Each beat; half of what the longest look took is forgotten after a minute, and longer looks are tried again.
_FORGET = 0.999


class Beat:
    """Ticks on multiples of 80 ms from an epoch, and looks between them.

    All frames are aligned to the tick; a look is for the few that missed it, and is taken only if one as long as the
    longest of the last minute would be over before the next tick is due. Times are seconds of `time.monotonic`, which all processes of a machine share.
    Engine thread only, but for `until_tick_s` and `behind`.
    """

    def __init__(self, epoch_s: float | None = None) -> None:
        self.epoch_s = time.monotonic() if epoch_s is None else epoch_s
        self.late_ticks = 0
        self._late_at_s: deque[float] = deque(maxlen=BEHIND_TICKS)
        self._look_s = 0.0
        self._due_s = self.epoch_s
        self._look = 0

    @property
    def next_s(self) -> float:
        """When to tick or look next."""
        return self._due_s + self._look * BEAT_S / LOOKS

    @property
    def on_tick(self) -> bool:
        """Whether what comes next is a tick; a look otherwise."""
        return self._look == 0

    def until_tick_s(self, now_s: float) -> float:
        """How long until the next tick: more than 0, at most 80 ms."""
        return BEAT_S - math.fmod(now_s - self.epoch_s, BEAT_S)

    def behind(self, now_s: float) -> bool:
        """Whether ticks have lately been late, more often than by accident."""
        return len(self._late_at_s) == BEHIND_TICKS and now_s - self._late_at_s[0] < BEHIND_WITHIN_S

    def begin(self, now_s: float) -> None:
        """The first tick is the next one due."""
        self._due_s, self._look = now_s + self.until_tick_s(now_s), 0

    def ended(self, began_s: float, now_s: float) -> None:
        """The tick or look that was due has ended: set what comes next.

        A late tick is followed at once by the next, until the beat is caught up. More than four beats are given up.
        """
        if self.on_tick:
            self._tick_ended(now_s)
        else:
            self._look_s = max(self._look_s, now_s - began_s)
        self._look += 1
        if self._look == LOOKS or max(now_s, self.next_s) + self._look_s > self._due_s + BEAT_S:
            self._due_s, self._look = self._due_s + BEAT_S, 0
            behind = (now_s - self._due_s) / BEAT_S
            if behind > _CAUGHT_UP_BEATS:
                self._due_s += math.floor(behind) * BEAT_S

    def _tick_ended(self, now_s: float) -> None:
        self._look_s *= _FORGET
        if now_s > self._due_s + BEAT_S:
            self.late_ticks += 1
            self._late_at_s.append(now_s)

"""What the carrier still has to play, by our own clock: how far ahead of the caller's ear our speech may run."""

LEAD_MS = 60
"""So much should still wait at the carrier when our next frame comes, which may then be that late unheard."""
AHEAD_MAX_MS = 220
"""The carrier is never given more than this: the lead and two frames. What waits with us can still be left out."""
UNREST_MS = 20
"""The beat's own; a lead that is off by less is left as it is."""


class Playout:
    """The carrier's buffer for one call: filled by what is sent, emptied by the time that passes.

    After a pause of ours the frames that were due meanwhile come all at once. Sent on at once, they would wait at the
    carrier, and so would every later one: the pause would be heard for the rest of the call. So at most `AHEAD_MAX_MS`
    is sent, and the lead is put right where nobody hears it, in quiet audio: what is too much of it is left out, what
    is missing is put in. Words are never cut.

    All times are seconds of one monotonic clock. Event loop only.
    """

    def __init__(self) -> None:
        self._empty_at_s = 0.0

    def held_ms(self, now_s: float) -> float:
        """How much of what was sent is still to be played."""
        return max(0.0, self._empty_at_s - now_s) * 1000

    def takes(self, ms: float, now_s: float) -> bool:
        """Whether so much more may be sent now."""
        return self.held_ms(now_s) + ms <= AHEAD_MAX_MS

    def surplus_ms(self, waiting_ms: float, now_s: float) -> float:
        """How much less than the next frame should be sent, if it is quiet; negative for more.

        `waiting_ms` is what waits with us behind that frame already: the caller would hear it late by this surplus.
        """
        surplus_ms = self.held_ms(now_s) + waiting_ms - LEAD_MS
        return surplus_ms if abs(surplus_ms) >= UNREST_MS else 0.0

    def sent(self, ms: float, now_s: float) -> None:
        """So much was handed to the carrier."""
        self._empty_at_s = max(now_s, self._empty_at_s) + ms / 1000

    def flushed(self, now_s: float) -> None:
        """The carrier has been told to throw away what it holds."""
        self._empty_at_s = now_s

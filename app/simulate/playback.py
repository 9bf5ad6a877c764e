"""What a caller hears: the carrier's buffer of the agent's audio, drained in real time."""

from collections import deque
from dataclasses import dataclass

from telephony.g711 import ULAW_SILENCE


@dataclass(frozen=True, slots=True)
class Dry:
    """The buffer had nothing to play from one sample of the call to another. `flushed`: since it had been cleared."""

    start: int
    end: int
    flushed: bool


class Playback:
    """A carrier's playback buffer for one call, without I/O. Positions are samples at 8 kHz since the call began.

    Audio plays from the moment it comes, back to back with what still waits; while nothing waits there is silence.
    Times given must not go backwards.

    `lane` is what the caller has heard so far, in mu-law. `pieces` are the positions where a message's audio begins,
    `flushes` those where waiting audio was thrown away, `dry` the times without anything to play since the first audio.
    """

    def __init__(self) -> None:
        self.lane = bytearray()
        self.pieces: list[int] = []
        self.flushes: list[int] = []
        self.dry: list[Dry] = []
        self._waiting: deque[bytes] = deque()
        self._front_bytes = 0
        self._taken_bytes = 0
        self._done_bytes = 0
        self._marks: deque[tuple[int, str]] = deque()
        self._flushed = False

    def play(self, ulaw: bytes, now: int) -> list[str]:
        """Take audio that came at `now`. Gives the marks that fell due before it."""
        due = self.advance(now)
        if ulaw:
            self._waiting.append(ulaw)
            self._taken_bytes += len(ulaw)
        return due

    def mark(self, name: str, now: int) -> list[str]:
        """Take a mark. It falls due when all audio before it has been played: at once if none waits."""
        self._marks.append((self._taken_bytes, name))
        return self.advance(now)

    def clear(self, now: int) -> list[str]:
        """Throw away what waits. Gives all pending marks back, as Twilio does."""
        due = self.advance(now)
        if self._waiting:
            self.flushes.append(now)
        self._waiting.clear()
        self._front_bytes = 0
        self._done_bytes = self._taken_bytes
        self._flushed = True
        return due + self._due()

    def advance(self, now: int) -> list[str]:
        """Play until `now`. Gives the marks that fell due."""
        while self._waiting and len(self.lane) < now:
            self._play_some(now - len(self.lane))
        if len(self.lane) < now:
            self._run_dry(now)
        return self._due()

    def _play_some(self, wanted: int) -> None:
        piece, start = self._waiting[0], self._front_bytes
        if not start:
            self.pieces.append(len(self.lane))
        part = piece[start : start + wanted]
        self.lane += part
        self._done_bytes += len(part)
        self._front_bytes += len(part)
        self._flushed = False
        if self._front_bytes == len(piece):
            self._waiting.popleft()
            self._front_bytes = 0

    def _due(self) -> list[str]:
        due = []
        while self._marks and self._marks[0][0] <= self._done_bytes:
            due.append(self._marks.popleft()[1])
        return due

    def _run_dry(self, now: int) -> None:
        start = len(self.lane)
        self.lane += ULAW_SILENCE * (now - start)
        if not self._taken_bytes:
            return
        if self.dry and self.dry[-1].end == start:
            start = self.dry.pop().start
        self.dry.append(Dry(start, now, self._flushed))

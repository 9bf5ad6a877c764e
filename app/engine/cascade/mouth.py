"""The agent's speech as frames: clauses come in whenever they are ready, 80 ms goes out each tick."""

from collections import deque
from typing import Protocol

import numpy as np

from app.engine.cascade.tts import Speech
from app.engine.contract import FRAME_SAMPLES, SAMPLE_RATE_HZ, Pcm

_FADE = SAMPLE_RATE_HZ // 100
_SILENCE: Pcm = np.zeros(FRAME_SAMPLES, np.float32)
_SILENCE.flags.writeable = False


class Source(Protocol):
    """Clauses of one utterance, filled by a worker while the mouth plays them."""

    speech: deque[Speech]

    @property
    def finished(self) -> bool: ...


class Mouth:
    """Engine thread only."""

    def __init__(self) -> None:
        self._source: Source | None = None
        self._clause: Speech | None = None
        self._at = 0
        self.said = ""

    @property
    def busy(self) -> bool:
        return self._source is not None

    @property
    def started(self) -> bool:
        """Whether any of the utterance has been heard."""
        return self._clause is not None or bool(self.said)

    def play(self, source: Source) -> None:
        self._source, self._clause, self._at, self.said = source, None, 0, ""

    def next(self) -> tuple[Pcm, str, bool]:
        """float32 [1920], the words that begin in it, and whether the utterance ends with it."""
        if self._source is None:
            return _SILENCE, "", False
        frame, text, filled = np.zeros(FRAME_SAMPLES, np.float32), "", 0
        while filled < FRAME_SAMPLES and self._has_clause():
            taken, words = self._take(frame[filled:])
            filled += taken
            text += words
        ends = self._source.finished and not self._has_clause()
        if ends:
            self._source = None
        return frame, text, ends

    def stop(self) -> Pcm:
        """Fall silent within 10 ms: the last frame. What was not said is forgotten, `said` is what was."""
        if not self.started:
            self._source = None
            return _SILENCE
        frame = self.next()[0].copy()
        frame[:_FADE] *= np.linspace(1, 0, _FADE, dtype=np.float32)
        frame[_FADE:] = 0
        self._source = self._clause = None
        return frame

    def _has_clause(self) -> bool:
        assert self._source is not None
        if self._clause is None and self._source.speech:
            self._clause, self._at = self._source.speech.popleft(), 0
        return self._clause is not None

    def _take(self, room: Pcm) -> tuple[int, str]:
        clause = self._clause
        assert clause is not None
        taken = min(len(room), len(clause.pcm) - self._at)
        room[:taken] = clause.pcm[self._at : self._at + taken]
        words = "".join(word for first, word in clause.words if self._at <= first < self._at + taken)
        self.said += words
        self._at += taken
        if self._at >= len(clause.pcm):
            self._clause = None
        return taken, words

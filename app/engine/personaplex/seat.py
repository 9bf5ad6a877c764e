"""What the host keeps of one row's call: its text as it is said, its turns, and the words it must still say."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from app.engine.contract import FRAME_MS, Pcm, Role, Spoken
from app.engine.personaplex.model.config import EPAD, PAD
from app.engine.personaplex.model.guide import CAPACITY
from app.engine.personaplex.model.tokenizer import TextStream, Tokenizer
from app.engine.personaplex.prefix import Prefix

GREETING_WITHIN_MS = 480
_QUIET_FRAMES = 8
"""This long without a word or a sound, 640 ms, and the agent has finished its turn."""
_AUDIBLE_RMS = 0.004


@dataclass(frozen=True, slots=True)
class Guided:
    """Tokens for the guide; `text` is reported when the last of them is said, empty for all but a text's last part."""

    tokens: tuple[int, ...]
    within_frames: int
    text: str


class Seat:
    """Engine thread only."""

    def __init__(self, role: Role, prefix: Prefix, seed: int, tokenizer: Tokenizer) -> None:
        self.role, self.prefix, self.seed = role, prefix, seed
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer)
        self._waiting: deque[Guided] = deque()
        self._current: Guided | None = None
        self._just_drawn = ""
        self._speaking = False
        self._quiet_frames = 0

    def queue(self, text: str, start_within_ms: int | None) -> None:
        """Words to say, behind those that wait."""
        tokens = self._tokenizer.words(text)
        within = 0 if start_within_ms is None else max(1, -(-start_within_ms // FRAME_MS))
        parts = [tuple(tokens[at : at + CAPACITY]) for at in range(0, len(tokens), CAPACITY)]
        for part in parts:
            self._waiting.append(Guided(part, within, text if part is parts[-1] else ""))

    def next_guided(self) -> Guided | None:
        """What the row's guide shall hold now, once; None while it has something or nothing waits."""
        if self._current is not None or not self._waiting:
            return None
        self._current = self._waiting.popleft()
        return self._current

    def frame(self, pcm: Pcm, token: int, taken: int) -> Spoken:
        """What the row said in a tick.

        Args:
            pcm: float32 [1920], kept.
            token: the text token of this frame.
            taken: how many tokens the row's guide has given out. They are drawn one frame ahead of the sound.
        """
        said, self._just_drawn = self._just_drawn, ""
        if self._current is not None and taken >= len(self._current.tokens):
            self._just_drawn, self._current = self._current.text, None
        text = self._stream.feed(token)
        return Spoken(pcm, text, self._turn_ends(token, pcm), said=said)

    def _turn_ends(self, token: int, pcm: Pcm) -> bool:
        word = token not in (PAD, EPAD)
        self._speaking |= word
        quiet = not word and float(np.sqrt(np.mean(np.square(pcm)))) < _AUDIBLE_RMS
        self._quiet_frames = self._quiet_frames + 1 if quiet else 0
        ends = self._speaking and self._quiet_frames >= _QUIET_FRAMES
        self._speaking &= not ends
        return ends

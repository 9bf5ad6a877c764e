"""What the host keeps of one row's call: its text as it is said, its turns, and the words it must still say."""

from collections import deque
from dataclasses import dataclass

from app.engine.contract import FRAME_MS, Pcm, Role, Spoken
from app.engine.personaplex.model.config import EPAD, PAD
from app.engine.personaplex.model.guide import CAPACITY
from app.engine.personaplex.model.tokenizer import TextStream, Tokenizer

GREETING_WITHIN_MS = 480
_QUIET_FRAMES = 8
"""This long without a word or a sound, 640 ms, and the agent has finished its turn."""
AUDIBLE_RMS = 0.004


@dataclass(frozen=True, slots=True)
class Guided:
    """Tokens for the guide; `text` is reported when the last of them is said, empty for all but a text's last part."""

    tokens: tuple[int, ...]
    within_frames: int
    text: str
    greeting: bool


class Seat:
    """Engine thread only."""

    def __init__(self, seed: int, tokenizer: Tokenizer) -> None:
        self.seed = seed
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer)
        self._waiting: deque[Guided] = deque()
        self._current: Guided | None = None
        self._just_drawn = ""
        self._speaking = False
        self._quiet_frames = 0

    def greet(self, role: Role) -> None:
        """The role's greeting is to be said; that of a role which never got to speak is not."""
        self._waiting = deque(guided for guided in self._waiting if not guided.greeting)
        self.queue(role.greeting, GREETING_WITHIN_MS, greeting=True)

    def queue(self, text: str, start_within_ms: int | None, greeting: bool = False) -> None:
        """Words to say, behind those that wait."""
        tokens = self._tokenizer.words(text)
        within = 0 if start_within_ms is None else max(1, -(-start_within_ms // FRAME_MS))
        parts = [tuple(tokens[at : at + CAPACITY]) for at in range(0, len(tokens), CAPACITY)]
        for part in parts:
            self._waiting.append(Guided(part, within, text if part is parts[-1] else "", greeting))

    def next_guided(self) -> Guided | None:
        """What the row's guide shall hold now, once; None while it has something or nothing waits."""
        if self._current is not None or not self._waiting:
            return None
        self._current = self._waiting.popleft()
        return self._current

    def frame(self, pcm: Pcm, audible: bool, token: int, taken: int) -> Spoken:
        """What the row said in a tick.

        Args:
            pcm: float32 [1920], kept.
            audible: whether it holds more than the line's own silence.
            token: the text token of this frame.
            taken: how many tokens the row's guide has given out. They are drawn one frame ahead of the sound.
        """
        said, self._just_drawn = self._just_drawn, ""
        if self._current is not None and taken >= len(self._current.tokens):
            self._just_drawn, self._current = self._current.text, None
        text = self._stream.feed(token)
        return Spoken(pcm, text, self._turn_ends(token not in (PAD, EPAD), audible), said=said)

    def _turn_ends(self, word: bool, audible: bool) -> bool:
        self._speaking |= word
        self._quiet_frames = 0 if word or audible else self._quiet_frames + 1
        ends = self._speaking and self._quiet_frames >= _QUIET_FRAMES
        self._speaking &= not ends
        return ends

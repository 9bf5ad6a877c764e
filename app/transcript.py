"""From what the engine hears and says, frame by frame, to the lines that are kept."""

from collections.abc import Callable
from dataclasses import replace

from app.engine import FRAME_MS, Heard, Spoken
from app.store import TranscriptLine

_FRAME_S = FRAME_MS / 1000


class Transcript:
    """One call's lines. Each is kept again whenever it grows, so that a killed process loses a word at most.

    Times are seconds of the call's clock, which starts with its media. Event loop only.
    """

    def __init__(self, keep: Callable[[TranscriptLine], None]) -> None:
        self._keep = keep
        self._numbers = 0
        self._caller: dict[int, int] = {}
        self._agent: TranscriptLine | None = None
        self._spoken_to: list[tuple[int, int]] = []
        self._unheard: list[tuple[TranscriptLine, list[tuple[int, int]]]] = []

    def hear(self, heard: Heard) -> None:
        """Keep the caller's words; a later form of the same utterance replaces the earlier one."""
        if heard.utterance not in self._caller:
            self._caller[heard.utterance] = self._next_number()
        number = self._caller[heard.utterance]
        self._keep(TranscriptLine(number, "caller", heard.text, heard.start_s, heard.end_s, heard.final))

    def say(self, spoken: Spoken, at_s: float, sent_ms: int) -> None:
        """Keep the agent's words. `sent_ms` is how much audio the leg had been sent once this frame was out."""
        if spoken.text:
            line = self._agent or TranscriptLine(self._next_number(), "agent", "", at_s, at_s)
            self._agent = replace(line, text=line.text + spoken.text, end_s=at_s + _FRAME_S)
            self._spoken_to.append((sent_ms, len(self._agent.text.rstrip())))
            self._keep(self._agent)
        if spoken.ends and self._agent is not None:
            self._finish(at_s + _FRAME_S)

    def played(self, until_ms: int) -> None:
        """The caller has heard all that was sent before this position: note how far each line got."""
        waiting = []
        for line, spoken_to in self._unheard:
            reached = max((letters for sent_ms, letters in spoken_to if sent_ms <= until_ms), default=0)
            if reached > len(line.heard or ""):
                line = replace(line, heard=line.text[:reached])
                self._keep(line)
            if reached < len(line.text):
                waiting.append((line, spoken_to))
        self._unheard = waiting

    def flushed(self) -> None:
        """What was still waiting at the carrier will never be heard."""
        self._unheard.clear()

    def close(self, at_s: float) -> None:
        """The call is over: the line that was being spoken ends here."""
        if self._agent is not None:
            self._finish(at_s)

    def _finish(self, at_s: float) -> None:
        assert self._agent is not None
        line = replace(self._agent, text=self._agent.text.rstrip(), end_s=max(at_s, self._agent.end_s), final=True)
        self._keep(line)
        self._unheard.append((line, self._spoken_to))
        self._agent, self._spoken_to = None, []

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

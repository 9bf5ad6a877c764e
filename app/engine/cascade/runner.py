"""CascadeRunner: the embedded engine as rows. Each row is a dialogue; the models are shared."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.engine.cascade.asr import Recogniser
from app.engine.cascade.dialogue import Dialogue
from app.engine.cascade.llm import LanguageModel
from app.engine.cascade.mind import Mind
from app.engine.cascade.parts import Parts, rows_for_this_machine
from app.engine.cascade.prompt import greeted
from app.engine.cascade.tts import Voice
from app.engine.contract import Pcm, Role, Spoken


class CascadeRunner:
    """A Runner on the CPU. Rows cost nothing until a call joins."""

    def __init__(self, parts: Parts, rows: int | None = None) -> None:
        self.rows = rows or rows_for_this_machine()
        self._parts = parts
        self._dialogues: list[Dialogue | None] = [None] * self.rows
        self._mind: Mind | None = None

    def warm_up(self, roles: Sequence[Role]) -> None:
        """Load every model and read every role's prompt once. Takes seconds. Raises EngineFault."""
        voice, recogniser = Voice(self._parts.tts), Recogniser(self._parts.asr)
        model = LanguageModel(self._parts.llm, self.rows)
        self._mind = Mind(recogniser, model, voice, self.rows)
        recogniser(np.zeros(16_000, np.float32))
        for role in roles:
            voice(role.greeting or "Hello.")
            model.read(0, greeted(role))

    def join(self, row: int, role: Role) -> None:
        assert self._mind is not None, "join before warm_up"
        self._dialogues[row] = Dialogue(row, role, self._mind, self._parts.vad)

    def leave(self, row: int) -> None:
        if (dialogue := self._dialogues[row]) is not None:
            dialogue.close()
            self._dialogues[row] = None

    def say(self, row: int, text: str, start_within_ms: int | None) -> None:
        """While the caller has the turn the words wait for its end, but no longer than `start_within_ms`."""
        if (dialogue := self._dialogues[row]) is not None:
            dialogue.say(text, start_within_ms)

    def change(self, row: int, role: Role) -> None:
        if (dialogue := self._dialogues[row]) is not None:
            dialogue.change(role)

    def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Spoken | None]:
        return [
            dialogue.frame(pcm[row]) if active[row] and dialogue is not None else None
            for row, dialogue in enumerate(self._dialogues)
        ]

    def between(self) -> None:
        pass

    def close(self) -> None:
        for row in range(self.rows):
            self.leave(row)
        if self._mind is not None:
            self._mind.close()
            self._mind = None

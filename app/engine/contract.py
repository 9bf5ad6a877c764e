"""What every speech engine takes and gives: roles, frames and the runner that advances all rows at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE_HZ = 24_000
FRAME_MS = 80
FRAME_SAMPLES = 1_920

Pcm = NDArray[np.float32]


class EngineFull(Exception):
    """No call can be taken now: the caller gets the carrier's busy answer.

    `reason` says why: every row is taken, ticks have lately been late, it loads or has stopped, it is stopping.
    """

    def __init__(self, message: str, reason: Literal["full", "behind", "not_ready", "stopping"] = "full") -> None:
        super().__init__(message)
        self.reason = reason


class EngineFault(Exception):
    """The engine cannot start or go on. The message says what is missing and the remedy."""


@dataclass(frozen=True, slots=True)
class Role:
    """What the engine needs of a persona for one call, its variables already filled in."""

    name: str
    prompt: str
    greeting: str = ""
    voice: str = "NATF2"
    language: str = "en"
    text_temperature: float = 0.7
    text_top_k: int = 25
    audio_temperature: float = 0.8
    audio_top_k: int = 250


@dataclass(frozen=True, slots=True)
class Heard:
    """The caller's words, where the engine is one that hears words.

    `utterance` counts from 0; a later Heard with the same number replaces the earlier one. Times are seconds of
    audio heard since the lease began.
    """

    utterance: int
    text: str
    start_s: float
    end_s: float
    final: bool


@dataclass(frozen=True, slots=True)
class Spoken:
    """One 80 ms frame of the agent's speech: float32 [1920] at 24 kHz in [-1, 1].

    `text` is what begins to be said in this frame, spaces included, often "". `ends` marks the last frame of an
    utterance. `interrupted` says that the agent fell silent because the caller spoke over it: what the carrier
    still holds of it should be flushed. `said` is the guided text, as it was given to `Runner.say`, whose last word
    is out with this frame; a text that was cut short is never reported.
    """

    pcm: Pcm
    text: str = ""
    ends: bool = False
    interrupted: bool = False
    heard: tuple[Heard, ...] = ()
    said: str = ""


class Runner(Protocol):
    """A batch of rows that advance together. Every method is called on the engine thread, `warm_up` first."""

    rows: int

    def warm_up(self, roles: Sequence[Role]) -> None:
        """Load what is needed and prepare these roles, so that their calls start at once.

        May lower `rows` to what the machine has proved to carry; never afterwards.

        Raises EngineFault.
        """
        ...

    def join(self, row: int, role: Role) -> None:
        """Begin a call on a free row. Must not block for longer than a tick can wait."""
        ...

    def leave(self, row: int) -> None:
        """End the call on a row and forget all of it."""
        ...

    def say(self, row: int, text: str, start_within_ms: int | None) -> None:
        """Have the agent say these very words, behind those it was given earlier; `Spoken.said` tells when it has.

        Args:
            start_within_ms: how long the agent may stay silent before it must begin. None: it begins when it next
                speaks of its own accord.
        """
        ...

    def change(self, row: int, role: Role) -> None:
        """Go on with the call in another role; both sides' words so far are kept, as far as the engine can.

        Must not block for longer than a tick can wait: the old role goes on until the new one is ready.
        """
        ...

    def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> Sequence[Spoken | None]:
        """Advance every active row by one frame; the others get None.

        Args:
            pcm: float32 [rows, 1920] in [-1, 1] at 24 kHz, one frame a row.
            active: bool [rows]. A False row is neither read nor moved.
        """
        ...

    def between(self) -> None:
        """Called once each beat, the tick's frames delivered: work for which no caller should wait."""
        ...

    def close(self) -> None:
        """Stop all workers and free the models."""
        ...

"""A runner over the tiny checkpoint, and calls to play on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from app.engine.contract import FRAME_SAMPLES, Role, Spoken
from app.engine.personaplex.model import rows
from app.engine.personaplex.model.ring import Kv
from app.engine.personaplex.model.weights import find_checkpoint
from app.engine.personaplex.runner import PersonaPlexRunner, Window
from app.engine.personaplex.voices import unpack_voices, voice_file

HARBOUR = Role("harbour", "You work for the harbour office and your name is Ada.")
CAPTAIN = Role("captain", "You are the captain. The ferry leaves at seven.", voice="NATM1")
SHORT = Role("short", "You help.", text_temperature=0.0, audio_temperature=0.0)


def tiny_runner(
    checkpoint: Path,
    count: int,
    window: Window = "rebuild",
    seed: int | None = 1,
    dtype: torch.dtype = torch.float32,
    kv: Kv = "bf16",
) -> PersonaPlexRunner:
    found = find_checkpoint(checkpoint)
    voices = unpack_voices(found.voices, checkpoint / "voices") if found.voices.is_file() else found.voices
    return PersonaPlexRunner(
        found, count, torch.device("cpu"), dtype, lambda name: voice_file(voices, name), window, seed, kv=kv
    )


def sound(call: int, frame: int) -> NDArray[np.float32]:
    """What a caller says: the same for the same call and frame."""
    noise = np.random.default_rng([call, frame]).standard_normal(FRAME_SAMPLES)
    return (0.1 * noise).astype(np.float32)


@dataclass(frozen=True)
class Call:
    """A caller's part: how long it lasts, the ticks it skips, and another role that takes over at a frame."""

    number: int
    role: Role
    frames: int
    skips: frozenset[int] = frozenset()
    handed_over: tuple[int, Role] | None = None


class Stage:
    """Plays calls tick by tick. A row that is given back is filled with what nobody may ever hear."""

    def __init__(self, runner: PersonaPlexRunner) -> None:
        self.runner = runner
        self._on: dict[int, tuple[Call, int, list[Spoken]]] = {}

    def begin(self, row: int, call: Call) -> list[Spoken]:
        """Put a call on a row; the list fills as it is played."""
        self.runner.join(row, call.role)
        said: list[Spoken] = []
        self._on[row] = call, 0, said
        return said

    @property
    def free(self) -> list[int]:
        return [row for row in range(self.runner.rows) if row not in self._on]

    def tick(self) -> None:
        pcm = np.zeros((self.runner.rows, FRAME_SAMPLES), np.float32)
        active = np.zeros(self.runner.rows, np.bool_)
        for row, (call, ticks, said) in self._on.items():
            if call.handed_over is not None and call.handed_over[0] == len(said) and ticks not in call.skips:
                self.runner.change(row, call.handed_over[1])
            if ticks not in call.skips:
                pcm[row], active[row] = sound(call.number, len(said)), True
        spoken = self.runner.step(pcm, active)
        self.runner.between()
        for row, (call, ticks, said) in list(self._on.items()):
            assert (spoken[row] is not None) == bool(active[row])
            if (frame := spoken[row]) is not None:
                said.append(frame)
            self._on[row] = call, ticks + 1, said
            if len(said) == call.frames:
                self.end(row)

    def end(self, row: int) -> None:
        del self._on[row]
        self.runner.leave(row)
        poison(self.runner, row)

    def alone(self, row: int, call: Call) -> list[Spoken]:
        said = self.begin(row, call)
        while row in self._on:
            self.tick()
        return said


def poison(runner: PersonaPlexRunner, row: int) -> None:
    for tensor in (*rows.leaves(runner._lm_state), *rows.leaves(runner._mimi_state)):
        tensor[row].fill_(torch.nan if tensor.is_floating_point() else 1)


def same_speech(one: Sequence[Spoken], other: Sequence[Spoken]) -> bool:
    if [frame.text for frame in one] != [frame.text for frame in other]:
        return False
    return all(np.allclose(a.pcm, b.pcm, atol=1e-5) for a, b in zip(one, other, strict=True))

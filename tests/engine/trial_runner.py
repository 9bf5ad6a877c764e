"""A runner that does what its frames and words tell it to, in a process of its own: also die."""

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.engine.contract import EngineFault, Heard, Pcm, Role, Spoken
from app.engine.echo import EchoRunner

DIE, RAISE, HANG, RICH, WHO = 10.0, 11.0, 12.0, 13.0, 14.0
"""What a frame's first sample commands; any other is echoed."""


class TrialRunner(EchoRunner):
    """`happened` are its orders; a WHO frame is answered with them as text, and with its process's number as `said`."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.happened: list[str] = []

    def warm_up(self, roles: Sequence[Role]) -> None:
        logging.getLogger("personaline.engine").info("trial: %d roles", len(roles))

    def join(self, row: int, role: Role) -> None:
        self.happened.append(f"join {role.name}")

    def leave(self, row: int) -> None:
        self.happened.append("leave")

    def say(self, row: int, text: str, start_within_ms: int | None) -> None:
        self.happened.append(f"say {text} within {start_within_ms}")

    def change(self, row: int, role: Role) -> None:
        self.happened.append(f"change to {role.name}")

    def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Spoken | None]:
        return [self._answer(pcm[row].copy()) if active[row] else None for row in range(self.rows)]

    def _answer(self, frame: Pcm) -> Spoken:
        match float(frame[0]):
            case 10.0:
                os._exit(7)
            case 11.0:
                raise RuntimeError("device lost")
            case 12.0:
                threading.Event().wait()
            case 13.0:
                heard = (Heard(3, "Good day.", 0.5, 1.25, final=True),)
                return Spoken(frame, "Good ", ends=True, interrupted=True, heard=heard, said="Good day.")
            case 14.0:
                return Spoken(frame, "; ".join(self.happened), said=str(os.getpid()))
        return Spoken(frame)


class Broken(EchoRunner):
    def warm_up(self, roles: Sequence[Role]) -> None:
        raise EngineFault("PERSONAPLEX_CHECKPOINT: /no/such is not there")


class Lowered(EchoRunner):
    def warm_up(self, roles: Sequence[Role]) -> None:
        self.rows = 1


class Slow(EchoRunner):
    """Every step takes longer than the beat."""

    def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Spoken | None]:
        threading.Event().wait(0.1)
        return super().step(pcm, active)


class Loading(EchoRunner):
    def warm_up(self, roles: Sequence[Role]) -> None:
        threading.Event().wait()


def dies_while_it_loads_once(note: Path) -> EchoRunner:
    """The first process to make it writes the note and dies."""
    if not note.exists():
        note.touch()
        os._exit(3)
    return EchoRunner(1)


def unmade() -> EchoRunner:
    raise EngineFault("torch is not installed: pip install 'personaline[personaplex]'")

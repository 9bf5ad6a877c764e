"""EchoRunner: says back what it hears, 80 ms later. No model and no torch: for tests, load and line checks."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.engine.contract import Pcm, Role, Spoken


class EchoRunner:
    """A Runner whose every row repeats its caller. It has no words of its own: `say` and `change` do nothing."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def warm_up(self, roles: Sequence[Role]) -> None:
        pass

    def join(self, row: int, role: Role) -> None:
        pass

    def leave(self, row: int) -> None:
        pass

    def say(self, row: int, text: str, start_within_ms: int | None) -> None:
        pass

    def change(self, row: int, role: Role) -> None:
        pass

    def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Spoken | None]:
        return [Spoken(pcm[row].copy()) if active[row] else None for row in range(self.rows)]

    def between(self) -> None:
        pass

    def close(self) -> None:
        pass

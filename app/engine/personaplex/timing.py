"""How long a tick takes: real ticks, one after another, with every row at the same point of its call."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.engine.contract import FRAME_SAMPLES, Role
from app.engine.personaplex.model.lm import LmState, Reach
from app.engine.personaplex.tick import Tick

_WARM_UP = 5
_USUAL = Role("", "")
"""How freely a persona's calls choose, unless its file says otherwise."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of measured times; `p99_ms` is one of them, the first that no more than a hundredth exceeds."""

    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> "Spread":
        p99_ms = np.percentile(times_ms, 99, method="higher")
        return cls(float(np.median(times_ms)), float(p99_ms), max(times_ms))


def time_ticks(tick: Tick, state: LmState, rows: int, context: int, frames: int) -> list[float]:
    """Milliseconds of each of so many ticks, by the wall clock around the call that blocks.

    The first `rows` rows are active, with `context` positions each, the new one included; from the ring's length on,
    the ring has gone round. Every tick is set back to there, so all of them do the same work.

    `state` is the one that `tick` moves. Its rows are nobody's afterwards: a call that joins one clears it, as always.
    Engine thread only.
    """
    ring = state.kv.slots
    if not (1 <= rows <= tick.rows and context >= 1):
        raise ValueError(f"time_ticks: found {rows} rows, {context} positions; 1 to {tick.rows} and from 1 are right")
    position = context - 1 if context < ring else context + ring
    pcm = np.random.default_rng(1).uniform(-0.3, 0.3, (tick.rows, FRAME_SAMPLES)).astype(np.float32)
    active = np.arange(tick.rows) < rows
    choose_as_usual(state, rows)
    times_ms = []
    for _ in range(_WARM_UP + frames):
        state.position[:rows] = position
        finish(state.position.device)
        began_s = time.perf_counter()
        tick(pcm, active, usual_reach(position))
        times_ms.append((time.perf_counter() - began_s) * 1000)
    return times_ms[_WARM_UP:]


def choose_as_usual(state: LmState, rows: int) -> None:
    """Let the first rows draw their tokens as a persona's calls do."""
    choice = state.choice
    choice.text_temperature[:rows], choice.text_top_k[:rows] = _USUAL.text_temperature, _USUAL.text_top_k
    choice.audio_temperature[:rows], choice.audio_top_k[:rows] = _USUAL.audio_temperature, _USUAL.audio_top_k


def usual_reach(position: int) -> Reach:
    """For rows that draw as usual, of which none is further than `position`."""
    return Reach(position + 1, _USUAL.text_top_k, _USUAL.audio_top_k)


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

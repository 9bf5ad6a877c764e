"""Ways to keep the beat, compared: how long a frame waits from its last packet to the speech that answers it.

A GPU is modelled by what a tick costs, a floor and so much a row; the carrier by frames every 80 ms whose last packet
is late now and then. Nothing here is measured. Times are milliseconds but for those handed to the engine's own Beat.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, quantiles

from app.engine.beat import BEAT_S, Beat

BEAT_MS = BEAT_S * 1000
AHEAD_MS = 12.0
DRIFT = 30e-6
"""By how much the carrier's clock may differ from ours."""

_INBOX_FRAMES = 4


@dataclass(frozen=True, slots=True)
class Gpu:
    """What one tick costs, whoever is in it: `floor_ms`, and `row_ms` for each call."""

    name: str
    floor_ms: float
    row_ms: float

    def tick_ms(self, rows: int) -> float:
        return self.floor_ms + self.row_ms * rows if rows else 0.0


@dataclass(frozen=True, slots=True)
class Lateness:
    """Of a frame's last packet: exponential with this mean, and in a small share of frames up to so much more."""

    mean_ms: float
    share: float = 0.0
    most_ms: float = 0.0

    def draw(self, chance: random.Random) -> float:
        late_ms = chance.expovariate(1 / self.mean_ms) if self.mean_ms else 0.0
        return late_ms + (chance.uniform(0, self.most_ms) if chance.random() < self.share else 0.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`wait_ms` and its 99th percentile over all frames, and the share of time that the GPU was busy."""

    wait_ms: float
    p99_ms: float
    busy: float


@dataclass(slots=True)
class _Run:
    """The frames still to come as (when, call), and those that wait for the GPU, by call."""

    coming: deque[tuple[float, int]]
    gpu: Gpu
    waiting: dict[int, deque[float]] = field(default_factory=dict)
    waits_ms: list[float] = field(default_factory=list)
    busy_ms: float = 0.0

    def step(self, now_ms: float) -> float:
        """One frame of each call that has one by now. When it is over."""
        while self.coming and self.coming[0][0] <= now_ms:
            at_ms, call = self.coming.popleft()
            inbox = self.waiting.setdefault(call, deque(maxlen=_INBOX_FRAMES))
            inbox.append(at_ms)
        cost_ms = self.gpu.tick_ms(len(self.waiting))
        self.busy_ms += cost_ms
        for call in list(self.waiting):
            self.waits_ms.append(now_ms + cost_ms - self.waiting[call].popleft())
            if not self.waiting[call]:
                del self.waiting[call]
        return now_ms + cost_ms


def frames(phases_ms: Sequence[float], lateness: Lateness, until_ms: float, seed: int) -> deque[tuple[float, int]]:
    """When each call's frames are complete, in order. What its first packet was late by shifts a call's phase."""
    chance = random.Random(seed)
    found = []
    for call, phase_ms in enumerate(phases_ms):
        beat_ms = BEAT_MS * (1 + chance.uniform(-DRIFT, DRIFT))
        at_ms, latest_ms = phase_ms - lateness.draw(chance), 0.0
        while at_ms < until_ms:
            at_ms += beat_ms
            latest_ms = max(latest_ms, at_ms + lateness.draw(chance))
            found.append((latest_ms, call))
    return deque(sorted(found))


def aligned(calls: int, groups: int = 1) -> list[float]:
    """Each call's frames complete just before its group's tick."""
    return [call % groups * BEAT_MS / groups - AHEAD_MS for call in range(calls)]


def unaligned(calls: int) -> list[float]:
    """Calls begin when they begin."""
    chance = random.Random(calls)
    return [chance.uniform(0, BEAT_MS) for _ in range(calls)]


def play(
    way: str, phases_ms: Sequence[float], gpu: Gpu, lateness: Lateness, seconds: float = 120.0, seed: int = 1
) -> Outcome:
    """Let the calls' frames come and be stepped in this way.

    Ways: "tick" every 80 ms; "tick 2" or "tick 4" so often in 80 ms; "looks", as the engine does; "ready", whenever the
    GPU is free and a frame waits.
    """
    until_ms = seconds * 1000
    run = _Run(frames(phases_ms, lateness, until_ms, seed), gpu)
    for now_ms in _WAYS[way](run):
        if now_ms > until_ms:
            break
    return Outcome(fmean(run.waits_ms), quantiles(run.waits_ms, n=100)[-1], run.busy_ms / until_ms)


def _ticking(run: _Run, ticks: int = 1) -> Iterator[float]:
    due_ms = now_ms = 0.0
    while True:
        yield (now_ms := run.step(max(now_ms, due_ms)))
        due_ms += BEAT_MS / ticks


def _with_looks(run: _Run) -> Iterator[float]:
    beat, now_s = Beat(0.0), 0.0
    while True:
        began_s = max(now_s, beat.next_s)
        now_s = run.step(began_s * 1000) / 1000
        beat.ended(began_s, now_s)
        yield now_s * 1000


def _when_ready(run: _Run) -> Iterator[float]:
    now_ms = 0.0
    while run.coming or run.waiting:
        if not run.waiting:
            now_ms = max(now_ms, run.coming[0][0])
        yield (now_ms := run.step(now_ms))


_WAYS: dict[str, Callable[[_Run], Iterator[float]]] = {
    "tick": _ticking,
    "tick 2": partial(_ticking, ticks=2),
    "tick 4": partial(_ticking, ticks=4),
    "looks": _with_looks,
    "ready": _when_ready,
}

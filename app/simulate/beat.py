"""Ways to keep the beat, compared: how long a frame waits from its last packet to the speech that answers it.

A GPU is modelled by what a tick costs, a floor and so much a row; the carrier by frames every 80 ms whose last packet
is late now and then. Nothing here is measured. Times are milliseconds but for those handed to the engine's own Beat.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from statistics import fmean, quantiles

from app.engine.beat import BEAT_S, Beat

BEAT_MS = BEAT_S * 1000
PACKET_MS = 20.0
AHEAD_MS = 12.0
"""Where frames are aligned to a tick, the last packet of each is due so long before it, or up to a packet sooner: a
frame is complete when a packet is."""
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

    def look(self, now_ms: float) -> list[int]:
        """The calls that have a frame by now."""
        while self.coming and self.coming[0][0] <= now_ms:
            at_ms, call = self.coming.popleft()
            self.waiting.setdefault(call, deque(maxlen=_INBOX_FRAMES)).append(at_ms)
        return list(self.waiting)

    def step(self, now_ms: float, calls: Sequence[int]) -> float:
        """One frame of each of these calls. When it is over."""
        cost_ms = self.gpu.tick_ms(len(calls))
        self.busy_ms += cost_ms
        for call in calls:
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
    """Each call's frames are complete just before its group's tick, as nearly as whole packets allow."""
    chance = random.Random(calls)
    return [call % groups * BEAT_MS / groups - AHEAD_MS - chance.uniform(0, PACKET_MS) for call in range(calls)]


def unaligned(calls: int) -> list[float]:
    """Calls begin when they begin."""
    chance = random.Random(calls)
    return [chance.uniform(0, BEAT_MS) for _ in range(calls)]


def play(
    way: str, phases_ms: Sequence[float], gpu: Gpu, lateness: Lateness, seconds: float = 120.0, seed: int = 1
) -> Outcome:
    """Let the calls' frames come and be stepped in this way.

    Ways: "1", "2" or "4" ticks of all in 80 ms, at fixed times; "late", one of all, and between them such calls as
    missed it, if there is time; "engine", as the engine does; "ready", whenever the GPU is free and a frame waits.
    """
    until_ms = seconds * 1000
    run = _Run(frames(phases_ms, lateness, until_ms, seed), gpu)
    for now_ms in _WAYS[way](run):
        if now_ms > until_ms:
            break
    return Outcome(fmean(run.waits_ms), quantiles(run.waits_ms, n=100)[-1], run.busy_ms / until_ms)


def _ticking(run: _Run, ticks: int) -> Iterator[float]:
    now_ms = 0.0
    for number in count():
        at_ms = max(now_ms, number * BEAT_MS / ticks)
        yield (now_ms := run.step(at_ms, run.look(at_ms)))


def _with_late_ones(run: _Run) -> Iterator[float]:
    now_ms = 0.0
    for number in count():
        due_ms = number * BEAT_MS
        at_ms = max(now_ms, due_ms)
        stepped = run.look(at_ms)
        now_ms = run.step(at_ms, stepped)
        for look in range(1, 4):
            at_ms = max(now_ms, due_ms + look * PACKET_MS)
            late = [call for call in run.look(at_ms) if call not in stepped or len(run.waiting[call]) > 1]
            if at_ms + run.gpu.tick_ms(len(late)) <= due_ms + BEAT_MS:
                now_ms = run.step(at_ms, late) if late else now_ms
                stepped += late
        yield now_ms


def _as_the_engine_does(run: _Run) -> Iterator[float]:
    beat, now_s = Beat(0.0), 0.0
    while True:
        began_s = max(now_s, beat.due_s)
        now_s = run.step(began_s * 1000, run.look(began_s * 1000)) / 1000
        beat.ended(began_s, now_s)
        yield now_s * 1000


def _when_ready(run: _Run) -> Iterator[float]:
    now_ms = 0.0
    while run.coming or run.waiting:
        if not run.look(now_ms):
            now_ms = max(now_ms, run.coming[0][0])
        yield (now_ms := run.step(now_ms, run.look(now_ms)))


_WAYS: dict[str, Callable[[_Run], Iterator[float]]] = {
    "1": partial(_ticking, ticks=1),
    "2": partial(_ticking, ticks=2),
    "4": partial(_ticking, ticks=4),
    "late": _with_late_ones,
    "engine": _as_the_engine_does,
    "ready": _when_ready,
}

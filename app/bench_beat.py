"""The beat with sockets beside it: the tick of a modelled GPU, the engine a thread of the service or on its own.

Also the service that is measured: `python -m app.bench_beat` with what `_Trial` passes it.
"""

import asyncio
import contextlib
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from app.engine.beat import TICK_S
from app.engine.contract import FRAME_SAMPLES, Pcm, Role, Spoken
from app.engine.echo import EchoRunner
from app.simulate.beat import Gpu, Lateness, Outcome, aligned, play, unaligned
from app.simulate.service import TrialService
from app.simulate.twilio import FakeTwilio

SETTLE_S = 2.0
_PLACED_APART_S = 0.013
_LINE_HZ = 8_000
_TICKS = "ticks.npy"

H100 = (Gpu("1,500 positions, half a window", 8.3, 0.22), Gpu("3,000 positions, a full window", 8.3, 0.39))
LATENESS = Lateness(2.0, 0.002, 60.0)


class ModelRunner(EchoRunner):
    """A Runner that waits as for a GPU, without the interpreter lock, and does on the host what PersonaPlex's does.

    `gpu_s` is a tick of all rows, a fifth of it whoever is in it. A beat whose first tick has nobody in it gets one of
    all rows, so that a service without calls can be compared. Of the ticks that begin a beat is
    written to a file at the end: float64 [ticks, 3], when it began, how long it took until all that was said was handed
    out, and how much of that was the GPU's, in seconds. The engine's thread keeps to the processor's core `core`, if
    one is given.
    """

    def __init__(self, rows: int, gpu_s: float, note: Path, core: int | None = None) -> None:
        super().__init__(rows)
        self._gpu_s = gpu_s
        self._note = note
        self._core = core
        self._speech = np.zeros((rows, FRAME_SAMPLES), np.float32)
        self._stepped: tuple[float, float, float] | None = None
        self._ticks: list[tuple[float, float, float]] = []

    def warm_up(self, roles: Sequence[Role]) -> None:
        self._note.unlink(missing_ok=True)
        if self._core is not None:
            os.sched_setaffinity(0, {self._core})

    def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Spoken | None]:
        began_s = time.monotonic()
        self._speech[:] = pcm
        gpu_s = self._gpu_s * (0.2 + 0.8 * float(active.mean()))
        time.sleep(gpu_s)
        audible = np.sqrt(np.mean(np.square(self._speech), axis=1)) > 0.001
        spoken = [
            Spoken(self._speech[row].copy(), "" if audible[row] else " ") if active[row] else None
            for row in range(self.rows)
        ]
        self._stepped = (began_s, gpu_s, time.monotonic())
        return spoken

    def between(self) -> None:
        # A step that long ago was an earlier tick's: this one had nobody in it.
        if self._stepped is None or time.monotonic() - self._stepped[2] > TICK_S / 2:
            self.step(self._speech, np.ones(self.rows, np.bool_))
        assert self._stepped is not None
        began_s, gpu_s, _ = self._stepped
        self._ticks.append((began_s, time.monotonic() - began_s, gpu_s))
        self._stepped = None

    def close(self) -> None:
        np.save(self._note, np.array(self._ticks).reshape(-1, 3))


@dataclass(frozen=True, slots=True)
class BeatCost:
    """One row of the table, in milliseconds, as median, 99th percentile and most.

    `host_ms` is what ticks took beyond the GPU's time, from the first frame taken to the last one handed out, and
    `late_ms` by how much they began late. `simulation_late_ms` is by how much the callers' side itself was late with a
    packet, at worst.
    """

    engine: str
    calls: int
    host_ms: tuple[float, float, float]
    late_ms: tuple[float, float, float]
    dry: int
    simulation_late_ms: float


async def bench_beat(
    counts: Sequence[int], gpu_ms: float, seconds: float, runs: int, folder: Path, progress: Callable[[str], None]
) -> list[BeatCost]:
    """Measure each number of calls in both places, several times; the medians of the runs.

    Raises ServiceFault, CallFault.
    """
    rows = []
    with _core_apart() as core:
        for count in counts:
            for place in ("thread", "process"):
                found = []
                for run in range(runs):
                    progress(f"{count} calls, the engine in a {place}, run {run + 1} of {runs} ...")
                    trial = _Trial(folder, place, max(count, 75), gpu_ms / 1000, core)
                    found.append(await _measure(trial, place, count, seconds, folder, progress))
                rows.append(_median(found))
    return rows


@contextlib.contextmanager
def _core_apart() -> Iterator[int | None]:
    """The engine's thread gets a core, callers and sockets the others: a lock is measured, not too few cores."""
    if not hasattr(os, "sched_setaffinity") or len(cores := os.sched_getaffinity(0)) < 2:
        yield None
        return
    apart = max(cores)
    os.sched_setaffinity(0, cores - {apart})
    try:
        yield apart
    finally:
        os.sched_setaffinity(0, cores)


async def _measure(
    trial: "_Trial", place: str, count: int, seconds: float, folder: Path, progress: Callable[[str], None]
) -> BeatCost:
    calls: list[FakeTwilio] = []
    # A collection of what earlier runs left would make all callers late at once.
    gc.collect()
    gc.freeze()
    async with trial as service, service.client() as http:
        await service.until_ready(http, progress)
        try:
            for _ in range(count):
                calls.append(FakeTwilio(service.url, token=service.token))
                await calls[-1].dial()
                calls[-1].say(_noise(seconds + SETTLE_S + count * _PLACED_APART_S))
                await asyncio.sleep(_PLACED_APART_S)
            await asyncio.sleep(SETTLE_S)
            dry, began_s = sum(len(call.playback.dry) for call in calls), time.monotonic()
            await asyncio.sleep(seconds)
            dry, ended_s = sum(len(call.playback.dry) for call in calls) - dry, time.monotonic()
        finally:
            await asyncio.gather(*(call.hang_up() for call in calls))
    began, took, gpu = np.load(folder / _TICKS).T
    within = (began > began_s) & (began + took < ended_s)
    host, late = _spread((took - gpu)[within]), _spread(lateness(began[within]))
    late_ms = max((call.late_max_s for call in calls), default=0.0) * 1000
    return BeatCost(place, count, host, late, dry, late_ms)


def _noise(seconds: float) -> bytes:
    """Something that is never silent, so that both conversions work."""
    return np.random.default_rng(1).integers(0, 256, math.ceil(seconds * _LINE_HZ), np.uint8).tobytes()


def lateness(began_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much each tick began late, in seconds, if most were on time and none early. Told up to 15 ms."""
    turns = began_s / TICK_S
    usual = np.angle(np.exp(2j * np.pi * turns).mean()) / (2 * np.pi)
    after = (turns - usual + 0.25) % 1 * TICK_S
    found: NDArray[np.float64] = after - after.min()
    return found


def _spread(seconds: NDArray[np.float64]) -> tuple[float, float, float]:
    half, most = np.quantile(seconds, [0.5, 0.99])
    return float(half) * 1000, float(most) * 1000, float(seconds.max()) * 1000


def _median(runs: Sequence[BeatCost]) -> BeatCost:
    def each(one: Callable[[BeatCost], tuple[float, float, float]]) -> tuple[float, float, float]:
        half, most, worst = (statistics.median(values) for values in zip(*map(one, runs), strict=True))
        return half, most, worst

    return BeatCost(
        runs[0].engine,
        runs[0].calls,
        each(lambda run: run.host_ms),
        each(lambda run: run.late_ms),
        round(statistics.median(run.dry for run in runs)),
        statistics.median(run.simulation_late_ms for run in runs),
    )


def table(rows: Sequence[BeatCost], gpu_ms: float, runs: int) -> list[str]:
    """The figures as lines of Markdown."""
    lines = [
        f"A modelled GPU that takes {gpu_ms:g} ms for 75 calls. What ticks took beyond that, and how late they began,\n"
        f"in ms; medians of {runs} runs.\n",
        "| engine | calls | host p50 | p99 | max | late p50 | p99 | max | playback ran dry | callers' own lateness |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = " | ".join(f"{value:.1f}" for value in (*row.host_ms, *row.late_ms))
        lines.append(f"| {row.engine} | {row.calls} | {figures} | {row.dry} | {row.simulation_late_ms:.0f} |")
    lines.append(f"\nPython {sys.version.split()[0]}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    return lines


WAYS: tuple[tuple[str, str, int], ...] = (
    ("a tick every 80 ms", "1", 0),
    ("a tick every 80 ms, calls aligned to it", "1", 1),
    ("the same, late frames between ticks", "late", 1),
    ("2 phase groups, aligned", "2", 2),
    ("4 phase groups, aligned", "4", 4),
    ("a tick every 20 ms of whoever has a frame: the engine's", "engine", 0),
    ("whenever a frame is ready", "ready", 0),
)


def ways(calls: Sequence[int], gpus: Sequence[Gpu] = H100, seconds: float = 60.0) -> list[str]:
    """Ways to keep the beat, simulated: mean wait / 99th percentile in ms, and the GPU's busy share, as Markdown."""
    lines = []
    for gpu in gpus:
        lines += [
            f"\nH100, computed, {gpu.name}: a tick of {gpu.floor_ms:g} ms and {gpu.row_ms:g} ms a call\n",
            "| from the last packet to speech: mean / p99 ms, GPU busy | "
            + " | ".join(f"{n} calls" for n in calls)
            + " |",
            "|---|" + "---:|" * len(calls),
        ]
        for name, way, groups in WAYS:
            found = [play(way, aligned(n, groups) if groups else unaligned(n), gpu, LATENESS, seconds) for n in calls]
            lines.append(f"| {name} | " + " | ".join(_cell(one) for one in found) + " |")
    return lines


def _cell(one: Outcome) -> str:
    return f"{one.wait_ms:.0f} / {one.p99_ms:.0f}, {one.busy:.0%}"


class _Trial(TrialService):
    """A service as `personaline serve` is, with the modelled runner."""

    def __init__(self, folder: Path, place: str, rows: int, gpu_s: float, core: int | None) -> None:
        super().__init__(folder, "echo", None)
        self._arguments = (place, str(rows), str(gpu_s), str(folder / _TICKS), "" if core is None else str(core))

    async def start(self) -> None:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "app.bench_beat", *self._arguments,
                env=os.environ | self._environment, stdout=log, stderr=log,
            )  # fmt: skip

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.stop()


def serve(place: str, rows: int, gpu_s: float, note: Path, core: int | None) -> None:
    """Serve with this runner, in a thread or a process, until SIGTERM."""
    import uvicorn

    from app.cli import start_log
    from app.engine_choice import Choice
    from app.main import create_app
    from app.settings import load_settings

    settings = load_settings()
    start_log(settings.log_level)
    make = partial(ModelRunner, rows, gpu_s, note, core)
    app = create_app(settings, Choice("echo", make, place == "process", rows))
    config = uvicorn.Config(
        app, settings.host, settings.port, loop="uvloop", ws="websockets-sansio", ws_per_message_deflate=False,
        log_config=None, access_log=False, lifespan="on",
    )  # fmt: skip
    # As app/server.py does, so that the collector is no part of what is measured.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    uvicorn.Server(config).run()


if __name__ == "__main__":
    _place, _rows, _gpu_s, _note, _core = sys.argv[1:]
    serve(_place, int(_rows), float(_gpu_s), Path(_note), int(_core) if _core else None)

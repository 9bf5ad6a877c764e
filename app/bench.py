"""What the line alone costs: calls of the echo engine through a service of its own, and the CPU it used for them."""

import asyncio
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from app.simulate.service import TrialService, trial_service
from app.simulate.twilio import FakeTwilio
from telephony import g711

SETTLE_S = 2.0
_CPU = "personaline_process_cpu_seconds"
_PLACED_APART_S = 0.013


@dataclass(frozen=True, slots=True)
class GatewayCost:
    """One row of the table. `cpu_s` is CPU seconds of the service for each minute of each call.

    `dry` counts how often a call's playback ran out of audio, `simulation_late_ms` is by how much the callers' side
    itself was late with a packet, at worst: with much of it, the dry ones may be its own.
    """

    calls: int
    cpu_s: float
    core_share: float
    dry: int
    simulation_late_ms: float


async def bench_gateway(
    counts: Sequence[int], seconds: float, folder: Path, progress: Callable[[str], None]
) -> list[GatewayCost]:
    """Measure each number of calls for so many seconds, in one service, one after the other.

    The callers run in another process than the service, so their cost is not in the figures. Raises ServiceFault,
    CallFault.
    """
    rows = []
    async with trial_service(folder, "echo") as service, service.client() as http:
        await service.until_ready(http, progress)
        for count in counts:
            progress(f"{count} calls for {seconds:.0f} s ...")
            rows.append(await _measure(service, http, count, seconds))
    return rows


async def _measure(service: TrialService, http: httpx.AsyncClient, count: int, seconds: float) -> GatewayCost:
    calls = [FakeTwilio(service.url, token=service.token) for _ in range(count)]
    try:
        for call in calls:
            await call.dial()
            call.say(_speech(seconds + SETTLE_S + count * _PLACED_APART_S))
            await asyncio.sleep(_PLACED_APART_S)
        await asyncio.sleep(SETTLE_S)
        dry = sum(len(call.playback.dry) for call in calls)
        cpu_s, began_s = await _cpu_s(http), time.monotonic()
        await asyncio.sleep(seconds)
        used_s, took_s = await _cpu_s(http) - cpu_s, time.monotonic() - began_s
        dry = sum(len(call.playback.dry) for call in calls) - dry
    finally:
        await asyncio.gather(*(call.hang_up() for call in calls))
    late_ms = max(call.late_max_s for call in calls) * 1000
    return GatewayCost(count, used_s / (count * took_s / 60), used_s / took_s, dry, late_ms)


def _speech(seconds: float) -> bytes:
    """Something that is never silent, so that both conversions work: a tone that slides up and down."""
    t = np.arange(math.ceil(seconds * g711.SAMPLE_RATE_HZ)) / g711.SAMPLE_RATE_HZ
    sliding = 0.3 * np.sin(2 * np.pi * (600 * t + 40 * np.sin(2 * np.pi * 3 * t)))
    return g711.encode(sliding.astype(np.float32))


async def _cpu_s(http: httpx.AsyncClient) -> float:
    for line in (await http.get("/metrics")).text.splitlines():
        if line.startswith(f"{_CPU} "):
            return float(line.split()[1])
    raise AssertionError(f"{_CPU} is not among the service's metrics")


def table(rows: Sequence[GatewayCost]) -> list[str]:
    """The figures as lines of Markdown."""
    lines = [
        "| calls | CPU seconds a call-minute | share of one core | playback ran dry | callers' own lateness, worst |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.calls} | {row.cpu_s:.3f} | {row.core_share:.0%} | {row.dry} | {row.simulation_late_ms:.0f} ms |"
        )
    lines.append(f"\nPython {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')}")
    return lines

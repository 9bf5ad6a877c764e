"""How many calls a tick carries in time: measured before the first of them, and kept for the next start."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from app.engine.personaplex.model.config import LmConfig, MimiConfig
from app.engine.personaplex.model.lm import LmState
from app.engine.personaplex.tick import Tick
from app.engine.personaplex.timing import Spread, time_ticks

BUDGET_MS = 60.0
"""Of the 80 ms from tick to tick. What is left is for prompts that are read and rows that are made anew in between."""

_FRAMES = 10
"""Ticks of one look. Enough to know the tick, too few for a true p99: the slowest of them stands for it."""

_log = logging.getLogger("personaline.engine")


@dataclass(frozen=True, slots=True)
class Admission:
    """So many calls, each with a full window, are ticked in time; `most` is how many were asked for."""

    calls: int
    p99_ms: float
    most: int

    def of(self, most: int) -> "Admission | None":
        """What is known of another number asked for. None where more calls might do than were tried."""
        if most > self.most and self.calls == self.most:
            return None
        return Admission(min(self.calls, most), self.p99_ms, most)


def admit(tick: Tick, lm_state: LmState, most: int, file: Path, key: str) -> Admission:
    """As `calls_in_time`, or what an earlier start found under the same key, with a line for the log."""
    return kept_or_measured(file, key, most, lambda: calls_in_time(tick, lm_state, most))


def kept_or_measured(file: Path, key: str, most: int, measure: Callable[[], Admission]) -> Admission:
    """What `file` knows under this key; otherwise what `measure` finds, which is kept there.

    A file that cannot be read or written costs a measurement, nothing else.
    """
    kept = _kept(file).get(key)
    admission = kept.of(most) if kept else None
    known = " at an earlier start" if admission else ""
    if admission is None:
        admission = measure()
        _keep(file, key, admission)
    _log.info(
        "%d calls at once: memory allows %d, the tick %s (p99 %.1f ms of %.0f, measured%s)",
        admission.calls, most, admission.calls if admission.calls < most else "as many", admission.p99_ms, BUDGET_MS,
        known,
    )  # fmt: skip
    if admission.p99_ms > BUDGET_MS:
        _log.warning("even one call's tick takes %.1f ms of the 80 that it has", admission.p99_ms)
    return admission


def calls_in_time(tick: Tick, lm_state: LmState, most: int, budget_ms: float = BUDGET_MS) -> Admission:
    """The most calls, among the widths that `tick` has, whose ticks stay under the budget with every window full.

    At least one, in time or not. The windows are full of zeros, which a GPU reads as fast as anything, if with less
    power. Takes a second where `most` are in time, else a few. No row may have a call, and what
    the rows hold afterwards is nobody's: a call that joins clears its own. Engine thread only.
    """

    def look(calls: int) -> Spread:
        return Spread.of(time_ticks(tick, lm_state, calls, lm_state.kv.slots, _FRAMES))

    counts = [*(width for width in tick.widths if width < most), most]
    calls, p99_ms = largest_in_time(counts, look, budget_ms)
    lm_state.position.zero_()
    return Admission(calls, round(p99_ms, 1), most)


def largest_in_time(
    counts: Sequence[int], look: Callable[[int], Spread], budget_ms: float = BUDGET_MS
) -> tuple[int, float]:
    """The largest of `counts`, which ascend, that a look finds under the budget, and its p99 in ms; else the smallest.

    A look that only its slowest ticks spoil is taken again: something else on the machine may have been in the way,
    and what is found here is kept for long.
    """
    p99_ms: dict[int, float] = {}
    first, after = 0, len(counts)
    # The largest comes first: mostly it is memory that sets the limit.
    place = after - 1
    while first < after:
        spread = look(counts[place])
        if spread.p50_ms < budget_ms <= spread.p99_ms:
            spread = look(counts[place])
        p99_ms[place] = spread.p99_ms
        if spread.p99_ms < budget_ms:
            first = place + 1
        else:
            after = place
        place = (first + after) // 2
    found = max(0, first - 1)
    return counts[found], p99_ms[found]


def key_of(
    device: torch.device, dtype: torch.dtype, lm: LmConfig, mimi: MimiConfig, weights: str, kv: str, graphs: bool
) -> str:
    """What measured ticks hold for: the GPU, torch, the networks' sizes, and how they are run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kinds = f"{dtype}, weights {weights}, kv {kv}, {'graphs' if graphs else 'no graphs'}"
    sizes = hashlib.sha256(repr((lm, mimi)).encode()).hexdigest()[:12]
    return f"{name}, torch {torch.__version__}, {kinds}, ring {lm.ring}, sizes {sizes}"


def _kept(file: Path) -> dict[str, Admission]:
    """What earlier starts found; nothing where the file is missing or damaged."""
    try:
        return {key: _read(entry) for key, entry in json.loads(file.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("%s: damaged (%s), so ticks are measured again", file, error)
        return {}


def _read(entry: dict[str, Any]) -> Admission:
    """Raises KeyError, TypeError or ValueError for what is none."""
    admission = Admission(int(entry["calls"]), float(entry["p99_ms"]), int(entry["most"]))
    if not 1 <= admission.calls <= admission.most:
        raise ValueError(f"{admission.calls} calls of {admission.most}")
    return admission


def _keep(file: Path, key: str, admission: Admission) -> None:
    """Beside what is there for other settings. A reader finds the old file or the new one, never half of one."""
    entries = {kept: asdict(other) for kept, other in _kept(file).items()} | {key: asdict(admission)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, suffix=".partial", encoding="utf-8", delete=False
        ) as new:
            new.write(json.dumps(entries, indent=1) + "\n")
        os.replace(new.name, file)
    except OSError as error:
        _log.warning("%s: cannot be written (%s), so ticks are measured at every start", file, error.strerror or error)

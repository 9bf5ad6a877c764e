"""What PersonaPlex costs on this machine: its ticks, the memory they take, the start of a call, and loading."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from app.engine.contract import EngineFault
from app.engine.personaplex.bench.cold_start import ColdStart, Load, cold_start
from app.engine.personaplex.bench.memory import cap_memory, free_bytes, give_back, used_bytes
from app.engine.personaplex.bench.report import Point, Report, Start, environment
from app.engine.personaplex.bench.roofline import Limits, measure_limits
from app.engine.personaplex.bench.trial import PROMPT_FRAMES, Networks, Trial
from app.engine.personaplex.model.config import LmConfig, MimiConfig
from app.engine.personaplex.model.quantize import Weights
from app.engine.personaplex.model.ring import Kv
from app.engine.personaplex.model.weights import Checkpoint, find_checkpoint
from app.engine.personaplex.sizes import footprint, rows_that_fit
from app.engine.personaplex.timing import Spread

Device = Literal["auto", "cuda", "cpu"]
Progress = Callable[[str, int, int], object]
"""What is being done now, how many steps are done, and of how many."""

_STEPS_BESIDE_POINTS = 5


@dataclass(frozen=True)
class Options:
    calls: tuple[int, ...] = (1, 8, 16, 32, 64, 96, 128)
    contexts: tuple[int, ...] = (750, 1500, 3000)
    weights: Weights = "bf16"
    kv: Kv = "int8"
    frames: int = 200
    checkpoint: Path | None = None
    device: Device = "auto"
    graphs: bool = True
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        for name, values in (("--calls", self.calls), ("--context", self.contexts), ("--frames", (self.frames,))):
            if not values or min(values) < 1:
                raise EngineFault(f"{name}: found {', '.join(map(str, values)) or 'nothing'}; 1 or more is right")

    @property
    def cap_bytes(self) -> float | None:
        return None if self.memory_gb is None else self.memory_gb * 1e9


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Of an option such as "1,8,16". Raises EngineFault."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise EngineFault(f"{name}: found {text!r}; numbers such as 1,8,16 are right") from error


def run(options: Options, progress: Progress) -> Report:
    """Measure all that `options` name. Numbers of calls that do not fit are passed over.

    Raises:
        EngineFault: no such device or checkpoint, weights of a kind that this device has not, a tick that cannot be
            captured, or no room even for the model.
    """
    try:
        bench = _Bench(options, progress)
        loading, limits = bench.loading(), bench.limits()
        points, start = bench.measure(limits)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise EngineFault(f"{reason}; see with nvidia-smi who holds the memory") from error
    given = {name: str(value) for name, value in asdict(options).items() if value is not None and name != "device"}
    made_with = environment(bench.device, bench.dtype)
    weights_bytes, call_bytes = bench.needs.weights_bytes + bench.needs.codec_weights_bytes, bench.needs.call_bytes
    return Report(made_with, given, limits, weights_bytes, call_bytes, bench.fitting, points, start, loading)


class _Bench:
    """One run, on one device."""

    def __init__(self, options: Options, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self._done, self._of = 0, len(options.calls) * len(options.contexts) + _STEPS_BESIDE_POINTS
        self.device = _device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        if options.cap_bytes is not None:
            cap_memory(self.device, options.cap_bytes)
        self._checkpoint: Checkpoint | None = find_checkpoint(options.checkpoint) if options.checkpoint else None
        found = self._checkpoint
        lm, mimi = (found.lm, found.mimi_config) if found else (LmConfig(), MimiConfig())
        self.needs = footprint(lm, mimi, self.dtype.itemsize, options.weights, options.kv)
        self.fitting = rows_that_fit(self.needs, free_bytes(self.device, options.cap_bytes))
        self._counts = [calls for calls in options.calls if calls <= self.fitting]

    def loading(self) -> ColdStart | str:
        """First, as long as the page cache is as cold as it was found. Or why it was not measured."""
        self._step("loading from nothing")
        options, found = self._options, self._checkpoint
        if found is None:
            return "it needs --checkpoint"
        if not self._counts:
            return "no number of calls fits"
        dtype = str(self.dtype).removeprefix("torch.")
        try:
            return cold_start(
                Load(
                    str(found.folder), max(self._counts), self.device.type, dtype, options.weights, options.kv,
                    options.graphs, options.cap_bytes,
                )
            )  # fmt: skip
        except EngineFault as fault:
            # Whether it was the last call that had no room will show; the rest can still be measured.
            return str(fault)

    def limits(self) -> Limits:
        self._step("measuring copies and products")
        return measure_limits(self.device, self.dtype)

    def measure(self, limits: Limits) -> tuple[tuple[Point, ...], Start | None]:
        """Every point in the order of the table, and the start of a call beside the most others."""
        self._step("making the model")
        options, trial = self._options, None
        if self._counts:
            networks = Networks(
                self._checkpoint, self.device, self.dtype, options.weights, options.kv, max(self._counts)
            )
            give_back(self.device)
            self._step("making room for calls")
            trial = self._largest(networks)
        points = []
        for context in options.contexts:
            for calls in options.calls:
                self._step(f"{calls} call{'s' * (calls > 1)} of {context} positions")
                point = None if trial is None else self._point(networks, trial, limits, calls, context)
                points.append(point or Point(calls, context))
        self._step("the start of a call")
        return tuple(points), None if trial is None else self._start(trial)

    def _largest(self, networks: Networks) -> Trial | None:
        """Room for the most calls that fit, in truth and not by arithmetic alone."""
        for calls in sorted(self._counts, reverse=True):
            if (trial := _tried(networks, calls, self._options.graphs)) is not None:
                return trial
            give_back(self.device)
        return None

    def _point(self, networks: Networks, trial: Trial, limits: Limits, calls: int, context: int) -> Point | None:
        if calls > trial.rows:
            return None
        try:
            times_ms = trial.time_ticks(calls, context, self._options.frames)
        except torch.OutOfMemoryError:
            return None
        floor = networks.work.floor(limits, calls, context)
        # Room is made once, for the most calls: what these do not need of it is not theirs.
        memory_bytes = used_bytes(self.device) - (trial.rows - calls) * trial.row_bytes
        return Point(calls, context, Spread.of(times_ms), floor, memory_bytes)

    def _start(self, trial: Trial) -> Start | None:
        context = max(self._options.contexts)
        try:
            times_ms = trial.time_starts(trial.rows, context)
        except torch.OutOfMemoryError:
            return None
        return Start(trial.rows, context, PROMPT_FRAMES, Spread.of(times_ms))

    def _step(self, what: str) -> None:
        self._progress(what, self._done, self._of)
        self._done += 1


def _tried(networks: Networks, calls: int, graphs: bool) -> Trial | None:
    try:
        return Trial(networks, calls, graphs)
    except torch.OutOfMemoryError:
        return None


def _device(wanted: Device) -> torch.device:
    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    if wanted == "cuda":
        raise EngineFault("--device cuda: found no NVIDIA GPU that this torch can use; personaline doctor says why")
    return torch.device("cpu")


def write(file: Path, content: str) -> None:
    """Raises EngineFault."""
    try:
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise EngineFault(f"{file}: cannot be written: {error.strerror or error}") from error

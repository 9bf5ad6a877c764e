"""What the bench found: for people as a Markdown table, for programs as JSON."""

import importlib.metadata
import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from app import __version__
from app.engine.personaplex.bench.cold_start import ColdStart
from app.engine.personaplex.bench.roofline import Floor, Limits
from app.engine.personaplex.timing import Spread

BUDGET_MS = 60.0
"""Of the 80 ms between two beats: the rest is for the calls that join, the rebuilds and the sockets."""
_GIT_S = 10


@dataclass(frozen=True, slots=True)
class Point:
    """So many calls of so many positions each. All None: they do not fit in the memory."""

    calls: int
    context: int
    ticks: Spread | None = None
    floor: Floor | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """From a call's joining, its prompt of `prompt_frames` read before, to its first frame out."""

    calls: int
    context: int
    prompt_frames: int
    times: Spread


@dataclass(frozen=True)
class Report:
    """`options` as they were given; `fitting`: calls that fit by arithmetic, in the memory that was free. Where
    `loading` was not measured, it is the reason.
    """

    environment: dict[str, str]
    options: dict[str, str]
    limits: Limits
    weights_bytes: int
    call_bytes: int
    fitting: int
    points: tuple[Point, ...]
    start: Start | None
    loading: ColdStart | str

    def most_calls(self) -> dict[int, int | None]:
        """For each context the largest measured number of calls whose p99 stays under the budget."""
        most: dict[int, int | None] = {point.context: None for point in self.points}
        for point in self.points:
            if point.ticks is not None and point.ticks.p99_ms < BUDGET_MS:
                most[point.context] = max(point.calls, most[point.context] or 0)
        return most


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What a figure depends on beside the options."""
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "triton": _version("triton"),
        "Python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
    }
    return {name: value for name, value in found.items() if value != "none"}


def as_json(report: Report) -> str:
    found = asdict(report) | {"budget_ms": BUDGET_MS, "most_calls": report.most_calls()}
    return json.dumps(found, indent=1) + "\n"


def as_lines(report: Report) -> list[str]:
    """The figures as lines of Markdown."""
    lines = [
        "| calls | positions | p50 | p99 | max | roofline | p50 / roofline | memory |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        *map(_row, report.points),
        "",
    ]
    lines += [f"- {line}" for line in (*_most(report), _room(report), _start(report.start), _loading(report.loading))]
    return [*lines, "", _made_with(report)]


def _row(point: Point) -> str:
    place = f"| {point.calls} | {point.context} |"
    if point.ticks is None or point.floor is None:
        return f"{place} does not fit | | | | | |"
    ticks, floor = point.ticks, point.floor
    times = " | ".join(f"{ms:.1f} ms" for ms in (ticks.p50_ms, ticks.p99_ms, ticks.max_ms))
    memory = "" if point.memory_bytes is None else _size(point.memory_bytes)
    return f"{place} {times} | {floor.ms:.1f} ms ({floor.bound}) | {ticks.p50_ms / floor.ms:.2f} | {memory} |"


def _most(report: Report) -> list[str]:
    return [
        f"most measured calls of {context} positions with a p99 under {BUDGET_MS:.0f} ms: {calls or 'none'}"
        for context, calls in report.most_calls().items()
    ]


def _room(report: Report) -> str:
    sizes = f"weights {_size(report.weights_bytes)}, each call {_size(report.call_bytes)}"
    return f"calls that fit in the free memory, by arithmetic: {report.fitting} ({sizes}, and what is kept in reserve)"


def _start(start: Start | None) -> str:
    if start is None:
        return "start of a call: not measured, it does not fit"
    others = f"calls in all {start.calls}, the others of {start.context} positions"
    what = f"a prompt of {start.prompt_frames} frames copied, first frame out; {others}"
    return f"start of a call ({what}): p50 {start.times.p50_ms:.1f} ms, max {start.times.max_ms:.1f} ms"


def _loading(loading: ColdStart | str) -> str:
    if isinstance(loading, str):
        return f"from the start of the process to ready: not measured, {loading}"
    memory = "unknown" if loading.host_bytes is None else _size(loading.host_bytes)
    return (
        f"from the start of the process to ready: {loading.seconds:.1f} s, host memory beyond the page cache {memory}"
    )


def _made_with(report: Report) -> str:
    options = ", ".join(
        f"{name} {value}" for name, value in report.options.items() if name not in ("calls", "contexts")
    )
    limits = report.limits
    rates = f"copies at {limits.copy_bytes_per_s / 1e9:.0f} GB/s, multiplies at {limits.flops_per_s / 1e12:.1f} TFLOP/s"
    made_with = ", ".join(f"{name} {value}" for name, value in report.environment.items() if name != "device")
    return f"{report.environment['device']}, {rates} (measured); {made_with}; {options}"


def _size(count_bytes: int) -> str:
    return f"{count_bytes / 1e9:.2f} GB" if count_bytes >= 1e8 else f"{count_bytes / 1e6:.1f} MB"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """Of the repository that this file is of, marked where anything in it was changed since; else the version."""
    here = Path(__file__).resolve()
    try:
        for words in (("ls-files", "--error-unmatch", here.name), ("describe", "--always", "--dirty", "--exclude=*")):
            asked = subprocess.run(
                ["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=_GIT_S, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return f"none, version {__version__}"
    return asked.stdout.strip()

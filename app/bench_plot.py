"""A picture of what `personaline bench engine` found: milliseconds a tick against calls, a line for each context."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.engine import FRAME_MS, EngineFault

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from app.engine.personaplex.bench.report import Report

INSTALL = "pip install 'personaline[bench]'"

_COLOURS = ("#2a78d6", "#d9730d", "#11806a", "#8250c4", "#b8336a", "#556270")
_INK, _QUIET, _RULE, _LATE = "#1d2733", "#5d6b7a", "#e6eaee", "#c43d2f"
_LEAST_TOP_MS = 92.0
_LABELS_APART = 0.05


@dataclass(frozen=True)
class Line:
    """One context: `calls` in rising order, and of each the median and the 99th percentile in milliseconds."""

    context: int
    calls: Sequence[int]
    p50_ms: Sequence[float]
    p99_ms: Sequence[float]


def require_matplotlib() -> None:
    """To be asked before minutes of measuring, not after. Raises EngineFault with the command that installs it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EngineFault(f"--plot needs matplotlib ({error}): {INSTALL}") from error


def plot(report: "Report", file: Path) -> None:
    """Write a PNG. Raises EngineFault when there is nothing to show, or no way to write it."""
    require_matplotlib()
    from matplotlib.figure import Figure

    lines = lines_of(report)
    if not lines:
        raise EngineFault(f"{file}: there is nothing to plot, no number of calls fits in the memory")
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    top_ms = max(_LEAST_TOP_MS, 1.08 * max(ms for line in lines for ms in line.p99_ms))
    most = max(calls for line in lines for calls in line.calls)
    _frame(axes, sorted({calls for line in lines for calls in line.calls}), 1.2 * most, top_ms)
    _rules(axes, report)
    for colour, line in zip(_COLOURS, lines, strict=False):
        axes.fill_between(line.calls, line.p50_ms, line.p99_ms, color=colour, alpha=0.18, linewidth=0)
        axes.plot(line.calls, line.p50_ms, color=colour, linewidth=2, marker="o", markersize=4.5)
    _name(axes, lines, top_ms)
    axes.set_title("A tick of all calls", loc="left", color=_INK, fontsize=13, fontweight="bold", pad=40)
    axes.text(0, 1.025, _subtitle(report), transform=axes.transAxes, color=_QUIET, fontsize=9, linespacing=1.5)
    try:
        figure.savefig(file, format="png", facecolor="white")
    except OSError as error:
        raise EngineFault(f"{file}: cannot be written: {error.strerror or error}") from error


def lines_of(report: "Report") -> list[Line]:
    """Of every context that was measured, as many as there are colours."""
    lines = []
    for context in dict.fromkeys(point.context for point in report.points):
        measured = sorted(
            (point.calls, point.ticks.p50_ms, point.ticks.p99_ms)
            for point in report.points
            if point.context == context and point.ticks is not None
        )
        if measured:
            calls, p50_ms, p99_ms = zip(*measured, strict=True)
            lines.append(Line(context, calls, p50_ms, p99_ms))
    return lines[: len(_COLOURS)]


def _frame(axes: "Axes", calls: Sequence[int], right: float, top_ms: float) -> None:
    axes.set_xlim(0, right)
    axes.set_ylim(0, top_ms)
    axes.set_xticks(calls)
    axes.set_xlabel("calls at once", color=_QUIET, fontsize=9)
    axes.set_ylabel("milliseconds a tick", color=_QUIET, fontsize=9)
    axes.tick_params(colors=_QUIET, labelsize=9, length=0)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)


def _rules(axes: "Axes", report: "Report") -> None:
    from app.engine.personaplex.bench.report import BUDGET_MS

    for ms, style, meaning in ((FRAME_MS, "-", "the next frame is due"), (BUDGET_MS, "--", "what a tick may take")):
        axes.axhline(ms, color=_LATE, linewidth=1.2, linestyle=style)
        axes.annotate(f"{ms:.0f} ms: {meaning}", (0, ms), (4, 3), textcoords="offset points", color=_LATE, fontsize=8.5)


def _name(axes: "Axes", lines: Sequence[Line], top_ms: float) -> None:
    """Each line's name behind its last point, and no name over another."""
    free_from_ms: dict[int, float] = {}
    for colour, line in sorted(zip(_COLOURS, lines, strict=False), key=lambda one: one[1].p50_ms[-1]):
        at_ms = max(line.p50_ms[-1], free_from_ms.get(line.calls[-1], 0))
        free_from_ms[line.calls[-1]] = at_ms + _LABELS_APART * top_ms
        axes.annotate(
            f"{line.context:,} positions", (line.calls[-1], at_ms), (9, 0), textcoords="offset points", va="center",
            color=colour, fontsize=9, fontweight="bold",
        )  # fmt: skip


def _subtitle(report: "Report") -> str:
    made_on, options = report.environment, report.options
    kinds = f"weights {options['weights']}, keys and values {options['kv']}, {made_on['date']}"
    missing = sorted({point.calls for point in report.points if point.ticks is None})
    unfit = f" Not in the memory: {', '.join(map(str, missing))} calls." if missing else ""
    return f"{made_on['device']}, {kinds}\nLine: median. Band: up to the 99th percentile.{unfit}"

"""What each page shows: one frozen dataclass a page. Templates see `page` and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from app.store import CallRecord, Role, TranscriptLine

OUTCOMES = {"completed": "Completed", "busy": "Busy", "failed": "Failed", "interrupted": "Interrupted"}


@dataclass(frozen=True, slots=True)
class Moment:
    """A time for `<time>`: `iso` for machines, `utc` for people until the browser puts their own zone in its place."""

    iso: str
    utc: str


@dataclass(frozen=True, slots=True)
class LineView:
    """`heard` and `unheard` are the text in two: the agent's words that never reached the caller come second."""

    number: int
    role: Role
    who: str
    at: str
    heard: str
    unheard: str
    final: bool


@dataclass(frozen=True, slots=True)
class CallView:
    id: str
    caller: str
    called: str
    persona: str
    carrier: str
    engine: str
    live: bool
    outcome: str
    outcome_label: str
    reason: str
    started: Moment
    clock_began: Moment | None
    duration: str
    lines: tuple[LineView, ...] = ()


@dataclass(frozen=True, slots=True)
class BoardPage:
    live: tuple[CallView, ...]
    finished: tuple[CallView, ...]
    blank_line: LineView


@dataclass(frozen=True, slots=True)
class CallPage:
    call: CallView
    blank_line: LineView


@dataclass(frozen=True, slots=True)
class ErrorPage:
    title: str
    message: str


# Cloned by the browser for each new line, so that a line's markup is written once.
BLANK_LINE = LineView(-1, "caller", "", "", "", "", True)


def board_page(
    live: Sequence[CallRecord], finished: Sequence[CallRecord], said: Mapping[str, Sequence[TranscriptLine]]
) -> BoardPage:
    return BoardPage(
        tuple(call_view(call, said.get(call.id, ())) for call in live),
        tuple(call_view(call) for call in finished),
        BLANK_LINE,
    )


def call_page(call: CallRecord, said: Sequence[TranscriptLine]) -> CallPage:
    return CallPage(call_view(call, said), BLANK_LINE)


def call_view(call: CallRecord, said: Sequence[TranscriptLine] = ()) -> CallView:
    persona = call.persona[:1].upper() + call.persona[1:]
    return CallView(
        id=call.id,
        caller=masked(call.caller),
        called=call.called,
        persona=persona,
        carrier=call.carrier.capitalize(),
        engine=call.engine,
        live=call.state != "ended",
        outcome=call.outcome or "",
        outcome_label=OUTCOMES.get(call.outcome or "", ""),
        reason=call.reason,
        started=moment(call.started_at),
        clock_began=moment(call.answered_at) if call.answered_at else None,
        duration=clock(call.duration_s or 0.0),
        lines=tuple(line_view(line, "Caller" if line.role == "caller" else persona) for line in said),
    )


def line_view(line: TranscriptLine, who: str) -> LineView:
    all_heard = line.heard is None or not line.text.startswith(line.heard)
    unheard = "" if all_heard else line.text.removeprefix(line.heard or "").lstrip()
    heard = line.text[: len(line.text) - len(unheard)]
    return LineView(line.number, line.role, who, clock(line.start_s), heard, unheard, line.final)


def masked(number: str) -> str:
    """Enough to tell two callers apart and no more: the last four digits."""
    digits = [letter for letter in number if letter.isdigit()]
    return "••• " + "".join(digits[-4:]) if len(digits) > 6 else "Unknown caller"


def clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:03. Fractions are cut off, as on any clock."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def moment(at: datetime) -> Moment:
    utc = at.astimezone(UTC)
    return Moment(utc.strftime("%Y-%m-%dT%H:%M:%SZ"), utc.strftime("%d %b %Y %H:%M:%S UTC"))

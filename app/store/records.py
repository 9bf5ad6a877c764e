"""What the store takes and gives: plain frozen values, never rows of a table."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

Role = Literal["caller", "agent"]
Direction = Literal["inbound", "outbound"]
State = Literal["connecting", "live", "ended"]
Outcome = Literal["completed", "busy", "failed", "interrupted"]


class StoreFault(Exception):
    """The database cannot be used. The message is one line: which one, what was found, what would be right."""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call. Times are UTC; `duration_s` counts from the answer, on the call's own clock."""

    id: str
    carrier: str
    carrier_call_id: str
    direction: Direction
    persona: str
    engine: str
    caller: str
    called: str
    started_at: datetime
    answered_at: datetime | None
    ended_at: datetime | None
    state: State
    outcome: Outcome | None
    reason: str
    duration_s: float | None


@dataclass(frozen=True, slots=True)
class TranscriptLine:
    """What one side said in one go. `number` rises within the call, both sides together.

    Times are seconds on the call's clock. `final` is False while words may still be added or changed. `heard` is
    as much of the agent's `text` as the caller has heard, None where nobody can tell and for the caller's own words.
    """

    number: int
    role: Role
    text: str
    start_s: float
    end_s: float
    final: bool = False
    heard: str | None = None


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """Something that happened in a call. Ids rise with time; `at_s` is on the call's clock, `at` is UTC."""

    id: int
    call_id: str
    at: datetime
    at_s: float | None
    type: str
    data: dict[str, Any]

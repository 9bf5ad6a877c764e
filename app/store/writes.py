"""The writes: each is a value that knows how to put itself into the tables, and what it then tells the feed."""

from collections.abc import Hashable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, text, update

from app.store import tables
from app.store.feed import Change
from app.store.records import Direction, Outcome, TranscriptLine

# Both databases spell it the same; SQLAlchemy has it only once for each.
KEEP_LINE = text(
    """
    INSERT INTO lines (call_id, number, role, text, start_s, end_s, final, heard)
    VALUES (:call_id, :number, :role, :text, :start_s, :end_s, :final, :heard)
    ON CONFLICT (call_id, number) DO UPDATE SET role = excluded.role, text = excluded.text,
    start_s = excluded.start_s, end_s = excluded.end_s, final = excluded.final, heard = excluded.heard
    """
)


@dataclass(frozen=True, slots=True)
class CallStarted:
    call_id: str
    carrier: str
    carrier_call_id: str
    direction: Direction
    persona: str
    engine: str
    caller: str
    called: str
    at: datetime

    def apply(self, connection: Connection) -> Change:
        row = asdict(self) | {"id": self.call_id, "started_at": self.at, "state": "connecting", "reason": ""}
        del row["call_id"], row["at"]
        connection.execute(insert(tables.calls).values(row))
        return EventHappened(self.call_id, "call.started", {}, self.at, None).apply(connection)


@dataclass(frozen=True, slots=True)
class CallAnswered:
    call_id: str
    at: datetime

    def apply(self, connection: Connection) -> Change:
        _update_call(connection, self.call_id, state="live", answered_at=self.at)
        return EventHappened(self.call_id, "call.answered", {}, self.at, 0.0).apply(connection)


@dataclass(frozen=True, slots=True)
class CallEnded:
    call_id: str
    outcome: Outcome
    reason: str
    duration_s: float
    at: datetime

    def apply(self, connection: Connection) -> Change:
        ended = {"outcome": self.outcome, "reason": self.reason, "duration_s": self.duration_s}
        _update_call(connection, self.call_id, state="ended", ended_at=self.at, **ended)
        return EventHappened(self.call_id, "call.ended", ended, self.at, self.duration_s).apply(connection)


@dataclass(frozen=True, slots=True)
class LineSaid:
    """A line as far as it has come: it replaces what was kept under its number."""

    call_id: str
    line: TranscriptLine

    def key(self) -> Hashable:
        return self.call_id, self.line.number

    def apply(self, connection: Connection) -> Change:
        values = asdict(self.line)
        connection.execute(KEEP_LINE, values | {"call_id": self.call_id})
        return Change("transcript.updated", self.call_id, values)


@dataclass(frozen=True, slots=True)
class EventHappened:
    call_id: str
    type: str
    data: dict[str, Any]
    at: datetime
    at_s: float | None

    def apply(self, connection: Connection) -> Change:
        event_id = connection.scalar(insert(tables.events).values(asdict(self)).returning(tables.events.c.id))
        return Change(self.type, self.call_id, self.data, event_id)


Write = CallStarted | CallAnswered | CallEnded | LineSaid | EventHappened


def _update_call(connection: Connection, call_id: str, **values: object) -> None:
    connection.execute(update(tables.calls).where(tables.calls.c.id == call_id).values(values))

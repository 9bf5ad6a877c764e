"""Calls, transcripts and events. Writes return at once; reads block and belong in a thread pool."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, Self

from sqlalchemy import ColumnElement, Engine, Row, Select, func, select, tuple_

from app.store import tables
from app.store.database import connect, faults_named, held_alone, migrate
from app.store.feed import Feed
from app.store.interrupted import close_interrupted_calls
from app.store.records import CallRecord, Direction, Outcome, StoredEvent, TranscriptLine
from app.store.writer import Writer
from app.store.writes import CallAnswered, CallEnded, CallStarted, EventHappened, LineSaid


class Store:
    """One database, one writing thread, as many readers as there are connections.

    Writes may come from any thread; a database that refuses them for now shows in `fault`, never in the caller.
    Reads raise StoreFault.
    """

    def __init__(self, engine: Engine, closing: ExitStack) -> None:
        self.feed = Feed()
        self._engine = engine
        self._closing = closing
        self._writer = Writer(engine, self.feed)
        self._writer.start()

    @classmethod
    def open(cls, url: str) -> Self:
        """Make the folder and the tables, close the calls a crash left open, start to write.

        `url` as `database_url` gives it. Raises StoreFault.
        """
        engine = connect(url)
        with ExitStack() as closing:
            closing.callback(engine.dispose)
            closing.enter_context(held_alone(engine))
            migrate(engine)
            with faults_named(engine), engine.begin() as connection:
                close_interrupted_calls(connection)
            return cls(engine, closing.pop_all())

    def close(self) -> None:
        """Write what waits, end the feed and let go of the database. Blocks, at most a few seconds."""
        self.feed.close()
        self._writer.close()
        self._closing.close()

    @property
    def fault(self) -> str:
        """Why nothing can be written now, in one line; empty when all is well."""
        return self._writer.fault or ("" if self._writer.is_alive() else "the store is not running")

    @property
    def queued(self) -> int:
        """Writes on their way to the database."""
        return self._writer.queued

    def call_started(
        self,
        call_id: str,
        *,
        carrier: str,
        carrier_call_id: str,
        persona: str,
        engine: str,
        caller: str,
        called: str,
        direction: Direction = "inbound",
        at: datetime | None = None,
    ) -> None:
        """`call_id` is a uuid4's hex. `at` is now unless given, here and below."""
        write = CallStarted(
            call_id, carrier, carrier_call_id, direction, persona, engine, caller, called, at or datetime.now(UTC)
        )
        self._writer.put(write)

    def call_answered(self, call_id: str, *, at: datetime | None = None) -> None:
        """The media leg is up: the call's clock starts."""
        self._writer.put(CallAnswered(call_id, at or datetime.now(UTC)))

    def line(self, call_id: str, line: TranscriptLine) -> None:
        """Keep a line, or what has become of it since: the newest under its number stays."""
        self._writer.put(LineSaid(call_id, line))

    def event(
        self,
        call_id: str,
        type: str,
        data: dict[str, Any] | None = None,
        at_s: float | None = None,
        *,
        at: datetime | None = None,
    ) -> None:
        """Keep that something happened. `data` must be JSON and is not copied: leave it alone afterwards."""
        self._writer.put(EventHappened(call_id, type, data or {}, at or datetime.now(UTC), at_s))

    def call_ended(
        self, call_id: str, *, outcome: Outcome, reason: str, duration_s: float, at: datetime | None = None
    ) -> None:
        self._writer.put(CallEnded(call_id, outcome, reason, duration_s, at or datetime.now(UTC)))

    def calls(self, limit: int, before: CallRecord | None = None, live: bool | None = None) -> list[CallRecord]:
        """Newest first, from the one after `before`; `live` True only those that are up, False only ended ones."""
        columns = tables.calls.c
        query = select(tables.calls).order_by(columns.started_at.desc(), columns.id.desc()).limit(limit)
        if before is not None:
            query = query.where(tuple_(columns.started_at, columns.id) < (before.started_at, before.id))
        if live is not None:
            query = query.where((columns.state != "ended") == live)
        return [_call(row) for row in self._read(query)]

    def call(self, call_id: str) -> CallRecord | None:
        rows = self._read(select(tables.calls).where(tables.calls.c.id == call_id))
        return _call(rows[0]) if rows else None

    def transcript(self, call_id: str) -> list[TranscriptLine]:
        """In the order the lines began."""
        return self._lines(tables.lines.c.call_id == call_id).get(call_id, [])

    def last_lines(self, call_ids: Iterable[str], limit: int) -> dict[str, list[TranscriptLine]]:
        """The end of each call's transcript, for those in which something was said."""
        columns = tables.lines.c
        place = func.row_number().over(partition_by=columns.call_id, order_by=columns.number.desc()).label("place")
        ranked = select(columns.call_id, columns.number, place).where(columns.call_id.in_(call_ids)).subquery()
        newest = select(ranked.c.call_id, ranked.c.number).where(ranked.c.place <= limit)
        return self._lines(tuple_(columns.call_id, columns.number).in_(newest))

    def events_after(self, event_id: int, limit: int) -> list[StoredEvent]:
        columns = tables.events.c
        query = select(tables.events).where(columns.id > event_id).order_by(columns.id).limit(limit)
        return [StoredEvent(**row._mapping) for row in self._read(query)]

    def _lines(self, which: ColumnElement[bool]) -> dict[str, list[TranscriptLine]]:
        columns = tables.lines.c
        found: dict[str, list[TranscriptLine]] = {}
        for row in self._read(select(tables.lines).where(which).order_by(columns.call_id, columns.number)):
            values = dict(row._mapping)
            found.setdefault(values.pop("call_id"), []).append(TranscriptLine(**values))
        return found

    def _read(self, query: Select[Any]) -> Sequence[Row[Any]]:
        with faults_named(self._engine), self._engine.connect() as connection:
            return connection.execute(query).all()


def _call(row: Row[Any]) -> CallRecord:
    return CallRecord(**row._mapping)

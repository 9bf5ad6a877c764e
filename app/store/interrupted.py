"""Calls that were up when the program was killed: closed at the next start with the last that is known of them."""

from datetime import datetime, timedelta

from sqlalchemy import Connection, func, select

from app.store import tables
from app.store.writes import CallEnded

REASON = "the service stopped in the middle of the call"


def close_interrupted_calls(connection: Connection) -> None:
    columns = tables.calls.c
    query = select(columns.id, columns.started_at, columns.answered_at).where(columns.state != "ended")
    for call_id, started_at, answered_at in connection.execute(query).all():
        ended_at = _last_known(connection, call_id, answered_at or started_at)
        duration_s = (ended_at - answered_at).total_seconds() if answered_at else 0.0
        CallEnded(call_id, "interrupted", REASON, duration_s, ended_at).apply(connection)


def _last_known(connection: Connection, call_id: str, clock_start: datetime) -> datetime:
    said_until_s = connection.scalar(select(func.max(tables.lines.c.end_s)).where(tables.lines.c.call_id == call_id))
    happened_at = connection.scalar(select(func.max(tables.events.c.at)).where(tables.events.c.call_id == call_id))
    return max(clock_start + timedelta(seconds=said_until_s or 0.0), happened_at or clock_start)

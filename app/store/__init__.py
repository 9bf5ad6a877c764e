"""Calls, what was said in them and what happened: kept in SQLite or PostgreSQL, written by one thread."""

from app.store.database import database_url
from app.store.feed import HELLO, Change, Feed, Subscription
from app.store.records import CallRecord, Direction, Outcome, Role, State, StoredEvent, StoreFault, TranscriptLine
from app.store.store import Store

__all__ = [
    "HELLO",
    "CallRecord",
    "Change",
    "Direction",
    "Feed",
    "Outcome",
    "Role",
    "State",
    "Store",
    "StoreFault",
    "StoredEvent",
    "Subscription",
    "TranscriptLine",
    "database_url",
]

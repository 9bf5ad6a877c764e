"""Calls to put into a store, for every test that needs some."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from app.store import Store, TranscriptLine

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
CALL = "0" * 31 + "1"
OTHER = "0" * 31 + "2"


def begin(store: Store, call_id: str = CALL, at: datetime = NOON) -> None:
    store.call_started(
        call_id,
        carrier="twilio",
        carrier_call_id="CA1",
        persona="operator",
        engine="echo",
        caller="+15550100001",
        called="+15550100002",
        at=at,
    )
    store.call_answered(call_id, at=at + timedelta(seconds=1))


def said(number: int, text: str, *, final: bool = True) -> TranscriptLine:
    return TranscriptLine(number, "caller", text, float(number), number + 0.5, final)


def written(store: Store) -> None:
    until(lambda: store.queued == 0)


def until(holds: Callable[[], object], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.01)

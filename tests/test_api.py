"""What the service tells others about its calls and itself."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api import Readiness, changes_since
from app.metrics import Metrics
from app.store import Change, Store, TranscriptLine
from tests.calls import CALL, NOON, OTHER, begin, said, until, written
from tests.serving import served, small_app


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(f"sqlite:///{tmp_path}/calls.db")
    yield store
    store.close()


def browser(app: FastAPI, client: str = "127.0.0.1", host: str = "localhost") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(client, 50_000))
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}")


async def got(app: FastAPI, path: str, status: int = 200) -> Any:
    async with browser(app) as client:
        answer = await client.get(path)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_calls_come_newest_first_and_page_by_page(store: Store) -> None:
    for number in range(5):
        begin(store, f"{number:032x}", NOON + timedelta(seconds=number))
    written(store)
    app = small_app(store)

    pages = [await got(app, "/api/v1/calls?limit=2")]
    while pages[-1]["next"]:
        pages.append(await got(app, f"/api/v1/calls?limit=2&before={pages[-1]['next']}"))

    assert [[int(call["id"], 16) for call in page["calls"]] for page in pages] == [[4, 3], [2, 1], [0]]


async def test_one_call_and_what_was_said_in_it(store: Store) -> None:
    begin(store)
    line = TranscriptLine(1, "agent", "Good morning!", 2.0, 3.5, True, heard="Good")
    store.line(CALL, line)
    written(store)
    app = small_app(store)

    call = await got(app, f"/api/v1/calls/{CALL}")
    transcript = await got(app, f"/api/v1/calls/{CALL}/transcript")

    assert (call["id"], call["caller"], call["started_at"]) == (CALL, "+15550100001", "2026-11-22T12:00:00Z")
    assert transcript == {"call_id": CALL, "lines": [asdict(line)]}


async def test_only_the_live_calls_are_given_where_these_are_asked_for(store: Store) -> None:
    begin(store, CALL)
    begin(store, OTHER)
    store.call_ended(OTHER, outcome="completed", reason="", duration_s=1.0)
    written(store)

    live = await got(small_app(store), "/api/v1/calls?live=true")

    assert [call["id"] for call in live["calls"]] == [CALL]


@pytest.mark.parametrize(
    ("path", "status", "code", "message"),
    [
        ("/api/v1/calls/none", 404, "not_found", "there is no call none"),
        ("/api/v1/calls/none/transcript", 404, "not_found", "there is no call none"),
        ("/api/v1/calls?before=none", 422, "invalid_request", "query.before: there is no call none"),
        ("/api/v1/calls?limit=0", 422, "invalid_request", "query.limit: Input should be greater than or equal to 1"),
        ("/api/v1/nothing", 404, "not_found", "Not Found"),
    ],
)
async def test_every_refusal_has_one_shape(store: Store, path: str, status: int, code: str, message: str) -> None:
    answer = await got(small_app(store), path, status)

    assert answer["error"]["code"] == code
    assert answer["error"]["message"].startswith(message)


async def test_a_database_that_cannot_be_read_is_said_and_not_a_crash(store: Store, tmp_path: Path) -> None:
    somebody_else = sqlite3.connect(tmp_path / "calls.db")
    somebody_else.execute("DROP TABLE calls")
    somebody_else.close()

    answer = await got(small_app(store), "/api/v1/calls", 503)

    assert answer["error"]["code"] == "unavailable"
    assert "calls.db cannot be used: no such table" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/calls/none", "/api/v1/calls", "/api/v1/calls/none", "/api/v1/events"])
@pytest.mark.parametrize(
    ("client", "host", "header"),
    [
        ("203.0.113.9", "localhost", ""),
        ("192.168.1.7", "localhost", ""),
        ("127.0.0.1", "phones.example.com", ""),
        ("127.0.0.1", "localhost", "X-Forwarded-For"),
        ("127.0.0.1", "localhost", "Forwarded"),
    ],
)
async def test_callers_words_are_shown_on_this_machine_only(
    store: Store, path: str, client: str, host: str, header: str
) -> None:
    async with browser(small_app(store), client, host) as elsewhere:
        answer = await elsewhere.get(path, headers={header: "127.0.0.1"} if header else {})

    assert answer.status_code == 403
    assert "on this machine only" in answer.text


@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
async def test_this_machine_is_known_by_each_of_its_addresses(store: Store, client: str) -> None:
    async with browser(small_app(store), client, "[::1]" if client == "::1" else "localhost") as here:
        assert (await here.get("/api/v1/calls")).status_code == 200


async def test_health_and_readiness_are_for_everybody_and_metrics_for_the_private_network(store: Store) -> None:
    app = small_app(store)
    for client, status in (("203.0.113.9", 403), ("10.0.0.5", 200), ("127.0.0.1", 200)):
        async with browser(app, client, "phones.example.com") as somebody:
            assert (await somebody.get("/health")).json() == {"status": "alive"}
            assert (await somebody.get("/ready")).status_code == 200
            assert (await somebody.get("/metrics")).status_code == status


FINE = Readiness("cascade", True, 4, 1)


@pytest.mark.parametrize(
    ("now", "status", "reasons", "warnings"),
    [
        (FINE, 200, [], []),
        (replace(FINE, engine_ready=False), 503, ["the cascade engine is not ready"], []),
        (replace(FINE, engine_reason="the engine is behind its beat"), 503, ["the engine is behind its beat"], []),
        (replace(FINE, store_fault="the disk is full"), 503, ["the disk is full"], []),
        (replace(FINE, persona_faults=["operator.yaml: line 3"]), 200, [], ["operator.yaml: line 3"]),
        (replace(FINE, rows_free=0), 200, [], ["all 4 rows are taken: another caller hears busy"]),
    ],
)
async def test_readiness_says_why_not(
    store: Store, now: Readiness, status: int, reasons: list[str], warnings: list[str]
) -> None:
    answer = await got(small_app(store, lambda: now), "/ready", status)

    assert (answer["ready"], answer["reasons"]) == (status == 200, reasons)
    assert answer["warnings"] == warnings


def test_metrics_carry_their_units_and_what_they_mean() -> None:
    metrics = Metrics()
    metrics.add_line(borrowed_ms=1_500, filled_ms=20, dropped_ms=0)
    metrics.response.observe(0.8)
    metrics.protocol_errors.labels("twilio").inc()

    text = metrics.text().decode()

    assert 'personaline_line_seconds_total{kind="borrowed"} 1.5' in text
    assert 'personaline_calls_total{outcome="busy"} 0.0' in text
    assert 'personaline_protocol_errors_total{carrier="twilio"} 1.0' in text
    assert "# HELP personaline_response_seconds From the end" in text


async def test_the_openapi_document_names_the_shapes_that_are_sent(store: Store) -> None:
    document = await got(small_app(store), "/openapi.json")

    calls = document["paths"]["/api/v1/calls"]["get"]["responses"]
    events = document["paths"]["/api/v1/events"]["get"]["responses"]
    assert calls["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/CallPage"}
    assert calls["422"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorReply"}
    assert list(events["200"]["content"]) == ["text/event-stream"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert not [path for path in document["paths"] if path in ("/", "/calls/{call_id}")]


class Events:
    """A client of the stream: what it was sent, in order."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines

    def next(self) -> tuple[str, str | None, dict[str, Any]]:
        fields: dict[str, str] = {}
        for line in self._lines:
            if not line and fields:
                return fields["event"], fields.get("id"), json.loads(fields["data"])
            name, _, value = line.partition(": ")
            if name:
                fields[name] = value
        raise EOFError


@contextmanager
def listening(url: str, last_event_id: str = "") -> Iterator[Events]:
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    with httpx.stream("GET", f"{url}/api/v1/events", headers=headers, timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Events(answer.iter_lines())


def test_events_tell_each_change_once_it_is_kept(store: Store) -> None:
    with served(small_app(store), store) as url, listening(url) as events:
        assert events.next()[0] == "hello"
        begin(store)
        store.line(CALL, said(0, "line one\nline two", final=False))

        assert events.next() == ("call.started", "1", {"call_id": CALL})
        assert events.next() == ("call.answered", "2", {"call_id": CALL})
        assert events.next() == (
            "transcript.updated",
            None,
            {"call_id": CALL} | asdict(said(0, "line one\nline two", final=False)),
        )


def test_a_client_that_comes_back_is_told_what_it_missed_and_nothing_twice(store: Store) -> None:
    begin(store)
    for digit in "123":
        store.event(CALL, "dtmf", {"digit": digit}, 1.0)
    written(store)

    with served(small_app(store), store) as url, listening(url, last_event_id="3") as events:
        assert events.next()[0] == "hello"
        store.event(CALL, "dtmf", {"digit": "4"}, 2.0)

        assert [(event, data["digit"]) for event, _, data in (events.next() for _ in range(3))] == [
            ("dtmf", "2"),
            ("dtmf", "3"),
            ("dtmf", "4"),
        ]


async def test_what_happens_while_the_missed_is_read_is_told_once(store: Store) -> None:
    with store.feed.subscribe() as changes:
        begin(store)
        written(store)
        following = changes_since(store, 0, changes)
        told = [await anext(following) for _ in range(3)]
        store.event(CALL, "dtmf", {"digit": "1"}, 1.0)
        told.append(await anext(following))

    assert [change.event_id for change in told] == [None, 1, 2, 3]


def test_an_id_of_another_database_hides_nothing(store: Store) -> None:
    with served(small_app(store), store) as url, listening(url, last_event_id="5000") as events:
        events.next()
        begin(store)

        assert events.next()[:2] == ("call.started", "1")


def test_a_client_that_goes_away_is_forgotten(store: Store) -> None:
    with served(small_app(store), store) as url:
        with listening(url) as events:
            events.next()
            assert store.feed.followers == 1
        until(lambda: store.feed.followers == 0)


def test_a_client_that_does_not_read_holds_nobody_up_and_is_told_to_start_over(store: Store) -> None:
    with served(small_app(store), store) as url, listening(url) as slow, listening(url) as quick:
        slow.next()
        quick.next()
        heard: list[str] = []
        follower = threading.Thread(target=lambda: heard.extend(until_last(quick)))
        follower.start()
        until_flooded(store)
        store.feed.publish([Change("last", CALL)])
        follower.join(20)

        assert heard[-1] == "last"
        assert "hello" in until_last(slow)


def until_flooded(store: Store) -> None:
    """More than sockets and queues on the way can hold."""
    for _ in range(20):
        store.feed.publish([Change("transcript.updated", CALL, {"text": "x" * 10_000})] * 300)


def until_last(events: Events) -> list[str]:
    heard = [events.next()[0]]
    while heard[-1] != "last":
        heard.append(events.next()[0])
    return heard


def test_the_service_stops_although_somebody_listens(store: Store) -> None:
    with served(small_app(store), store) as url:
        listener = listening(url)
        events = listener.__enter__()
        events.next()
    with pytest.raises((EOFError, httpx.RemoteProtocolError)):
        events.next()
    listener.__exit__(None, None, None)

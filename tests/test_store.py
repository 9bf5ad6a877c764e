"""What is said is kept: writes, reads, the live feed."""

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect

from app.store import HELLO, Change, Feed, Store, TranscriptLine, database_url
from app.store.database import connect, migrate
from app.store.tables import metadata
from app.store.writer import Writer
from app.store.writes import LineSaid
from tests.calls import CALL, NOON, OTHER, begin, said, until, written


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(f"sqlite:///{tmp_path}/calls.db")
    yield store
    store.close()


def test_a_call_is_kept_from_its_start_to_its_end(store: Store) -> None:
    begin(store)
    store.call_ended(
        CALL, outcome="completed", reason="caller hung up", duration_s=9.5, at=NOON + timedelta(seconds=11)
    )
    written(store)

    call = store.call(CALL)

    assert call is not None
    assert (call.state, call.outcome, call.reason, call.duration_s) == ("ended", "completed", "caller hung up", 9.5)
    assert (call.started_at, call.ended_at) == (NOON, NOON + timedelta(seconds=11))
    assert [event.type for event in store.events_after(0, 10)] == ["call.started", "call.answered", "call.ended"]


def test_times_of_another_zone_come_back_as_the_same_moment_in_utc(store: Store) -> None:
    begin(store, at=NOON.astimezone(ZoneInfo("Asia/Tokyo")))
    written(store)

    call = store.call(CALL)

    assert call is not None
    assert call.started_at == NOON
    assert call.started_at.tzinfo is UTC


def test_a_line_grows_under_its_number_until_it_is_final(store: Store) -> None:
    begin(store)
    store.line(CALL, said(0, "good", final=False))
    written(store)
    store.line(CALL, TranscriptLine(1, "agent", "Good morning!", 2.0, 3.0, True, heard="Good"))
    store.line(CALL, said(0, "good morning"))
    written(store)

    assert store.transcript(CALL) == [
        said(0, "good morning"),
        TranscriptLine(1, "agent", "Good morning!", 2.0, 3.0, True, heard="Good"),
    ]


def test_hostile_words_are_kept_as_they_were_said(store: Store) -> None:
    words = "Robert'); DROP TABLE calls;-- <script>alert(1)</script> \x00 \u202e 🎈"
    begin(store)
    store.line(CALL, said(0, words))
    written(store)

    assert store.transcript(CALL)[0].text == words


def test_only_the_end_of_each_transcript_is_read_for_the_board(store: Store) -> None:
    for call_id in (CALL, OTHER):
        begin(store, call_id)
        for number in range(5):
            store.line(call_id, said(number, f"{call_id[-1]}-{number}"))
    written(store)

    ends = store.last_lines([CALL, OTHER, "none"], 2)

    assert {call_id: [line.text for line in lines] for call_id, lines in ends.items()} == {
        CALL: ["1-3", "1-4"],
        OTHER: ["2-3", "2-4"],
    }


def test_calls_are_paged_newest_first_without_gap_or_repeat(store: Store) -> None:
    """Two of them began in the same moment, at the edge of a page."""
    for number, second_of_start in enumerate([0, 1, 1, 2, 3]):
        begin(store, f"{number:032x}", NOON + timedelta(seconds=second_of_start))
    written(store)

    first = store.calls(3)
    second = store.calls(3, before=first[-1])

    assert [int(call.id, 16) for call in first + second] == [4, 3, 2, 1, 0]


def test_live_calls_and_ended_ones_are_told_apart(store: Store) -> None:
    begin(store, CALL)
    begin(store, OTHER)
    store.call_ended(OTHER, outcome="busy", reason="", duration_s=0.0, at=NOON)
    written(store)

    assert [call.id for call in store.calls(9, live=True)] == [CALL]
    assert [call.id for call in store.calls(9, live=False)] == [OTHER]
    assert len(store.calls(9)) == 2


def test_readers_see_whole_commits_while_lines_are_written(store: Store) -> None:
    begin(store)
    written(store)
    seen: list[list[int]] = [[], []]
    stop = threading.Event()

    def read(mine: list[int]) -> None:
        while not stop.is_set():
            mine.append(len(store.transcript(CALL)))

    readers = [threading.Thread(target=read, args=(mine,)) for mine in seen]
    for reader in readers:
        reader.start()
    for number in range(2_000):
        store.line(CALL, said(number, "word"))
    written(store)
    until(lambda: all(mine and mine[-1] == 2_000 for mine in seen))
    stop.set()
    for reader in readers:
        reader.join()

    assert all(mine == sorted(mine) for mine in seen)


def test_somebody_who_reads_for_long_does_not_hold_up_the_writer(store: Store, tmp_path: Path) -> None:
    begin(store)
    written(store)
    reader = sqlite3.connect(tmp_path / "calls.db")
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM lines").fetchone()

    store.line(CALL, said(0, "kept at once"))
    until(lambda: store.queued == 0, within_s=3)

    reader.close()
    assert len(store.transcript(CALL)) == 1


def test_a_write_the_database_refuses_for_good_takes_no_other_with_it(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    begin(store)
    store.line("f" * 32, said(0, "a line of a call that never began"))
    store.line(CALL, said(0, "kept"))
    written(store)

    assert [line.text for line in store.transcript(CALL)] == ["kept"]
    assert store.fault == ""
    assert "a LineSaid was refused" in caplog.text
    assert "f" * 32 in caplog.text


def test_a_waiting_line_is_replaced_by_its_newer_state_and_the_queue_has_an_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The writer is not started, so that all of it waits."""
    writer = Writer(connect(f"sqlite:///{tmp_path}/calls.db"), Feed(), queue_writes=2)

    for text in ("o", "one", "one two"):
        writer.put(LineSaid(CALL, said(0, text)))
    assert writer.queued == 1

    writer.put(LineSaid(CALL, said(1, "next")))
    writer.put(LineSaid(CALL, said(2, "too many")))
    writer.put(LineSaid(CALL, said(1, "next, longer")))

    assert writer.queued == 2
    assert caplog.text.count("no more are kept") == 1


def test_the_migrations_make_the_tables_that_the_program_uses(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/calls.db")
    migrate(engine)
    migrate(engine)

    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


async def test_a_follower_is_told_of_each_change_after_it_is_in_the_database(store: Store) -> None:
    with store.feed.subscribe() as changes:
        following = aiter(changes)
        assert (await anext(following)).type == HELLO
        begin(store)
        got = [await asyncio.wait_for(anext(following), 5) for _ in range(2)]
        store.line(CALL, said(0, "hello"))
        got.append(await asyncio.wait_for(anext(following), 5))
        assert store.transcript(CALL) == [said(0, "hello")]

    assert [change.type for change in got] == ["call.started", "call.answered", "transcript.updated"]
    assert [change.event_id for change in got] == [1, 2, None]
    assert got[2].data["text"] == "hello"
    assert store.feed.followers == 0


async def test_a_slow_follower_starts_over_and_takes_no_memory() -> None:
    feed = Feed(backlog=10)
    with feed.subscribe() as changes:
        following = aiter(changes)
        await anext(following)
        for number in range(12):
            feed.publish([Change("transcript.updated", CALL, {"number": number})])
        await asyncio.sleep(0)

        got = [await asyncio.wait_for(anext(following), 5) for _ in range(2)]

    assert [change.type for change in got] == [HELLO, "transcript.updated"]
    assert got[1].data == {"number": 11}


async def test_followers_end_when_the_feed_closes() -> None:
    feed = Feed()
    with feed.subscribe() as early:
        feed.close()
        with feed.subscribe() as late:
            async with asyncio.timeout(5):
                assert [change.type async for change in early] == [HELLO]
                assert [change async for change in late] == []


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("sqlite:///calls.db", "sqlite:///calls.db"),
        ("sqlite:////var/lib/calls.db", "sqlite:////var/lib/calls.db"),
        ("postgres://u:p@db/calls", "postgresql+psycopg://u:p@db/calls"),
        ("postgresql://u:p@db:5433/calls?sslmode=require", "postgresql+psycopg://u:p@db:5433/calls?sslmode=require"),
    ],
)
def test_plain_database_addresses_are_taken(text: str, url: str) -> None:
    assert database_url(text) == url


@pytest.mark.parametrize(
    "text", ["calls.db", "mysql://u:secret@db/calls", "sqlite:///", "sqlite://", "postgresql://u:secret@db", ""]
)
def test_any_other_address_is_answered_with_the_right_forms_and_without_the_password(text: str) -> None:
    with pytest.raises(ValueError, match=r"sqlite:///FOLDER/FILE\.db or postgresql://") as caught:
        database_url(text)

    assert "secret" not in str(caught.value)


def test_a_tilde_means_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")

    assert database_url("sqlite:///~/calls.db") == "sqlite:////home/anna/calls.db"


def test_two_stores_on_two_files_are_strangers(tmp_path: Path) -> None:
    with_call, without = Store.open(f"sqlite:///{tmp_path}/a.db"), Store.open(f"sqlite:///{tmp_path}/b.db")
    begin(with_call)
    with_call.close()
    without.close()

    engine = create_engine(f"sqlite:///{tmp_path}/b.db")
    assert set(inspect(engine).get_table_names()) >= {"calls", "lines", "events"}
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM calls").scalar() == 0
    engine.dispose()

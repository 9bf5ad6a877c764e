"""What goes wrong with a database, and what is not lost by it."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, event

from app.store import Store, StoreFault
from app.store.database import connect
from tests.calls import CALL, NOON, begin, said, until, written


def address(folder: Path) -> str:
    return f"sqlite:///{folder}/calls.db"


# A caller who says a word every 10 ms, and tells the parent when each was handed to the store.
TALK = """
import sys, time
from app.store import Store, TranscriptLine

store = Store.open(sys.argv[1])
call = "1" * 32
whose = dict(carrier="twilio", carrier_call_id="CA1", persona="operator", engine="echo", caller="", called="")
store.call_started(call, **whose)
store.call_answered(call)
for number in range(100_000):
    store.line(call, TranscriptLine(number, "caller", f"word {number}", float(number), number + 0.5, True))
    print(time.monotonic(), flush=True)
    time.sleep(0.01)
"""


def test_a_program_killed_in_the_middle_of_a_call_loses_at_most_the_last_second_of_it(tmp_path: Path) -> None:
    spoken_at_s: list[float] = []
    with subprocess.Popen(
        [sys.executable, "-c", TALK, address(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as talking:
        assert talking.stdout is not None
        while len(spoken_at_s) < 250:
            spoken_at_s.append(float(talking.stdout.readline()))
        talking.kill()
        killed_at_s = time.monotonic()

    store = Store.open(address(tmp_path))
    call, transcript, events = store.call("1" * 32), store.transcript("1" * 32), store.events_after(0, 9)
    store.close()

    assert call is not None
    assert (call.state, call.outcome) == ("ended", "interrupted")
    assert call.duration_s == pytest.approx(transcript[-1].end_s), "its last word is the last that is known of it"
    assert [line.text for line in transcript] == [f"word {number}" for number in range(len(transcript))]
    assert len(transcript) >= sum(at_s < killed_at_s - 1 for at_s in spoken_at_s) > 0
    assert events[-1].type == "call.ended"


def test_a_call_that_was_never_answered_is_closed_when_it_was_last_heard_of(tmp_path: Path) -> None:
    with killed_store(tmp_path) as store:
        store.call_started(
            CALL,
            carrier="twilio",
            carrier_call_id="",
            persona="operator",
            engine="echo",
            caller="",
            called="",
            at=NOON,
        )
        written(store)

    store = Store.open(address(tmp_path))
    call = store.call(CALL)
    store.close()

    assert call is not None
    assert (call.outcome, call.ended_at, call.duration_s) == ("interrupted", NOON, 0.0)


@contextmanager
def killed_store(folder: Path) -> Iterator[Store]:
    """A store that closes without ending its calls, as far as its file can tell: killed."""
    store = Store.open(address(folder))
    yield store
    store.close()


class SmallDisk:
    """SQLite's own limit on its file stands for the end of the disk: the very same error from the very same place."""

    pages = 1_000_000

    def apply(self, connection: Connection) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {self.pages}")


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    disk = SmallDisk()
    event.listen(Engine, "begin", disk.apply)
    yield disk
    event.remove(Engine, "begin", disk.apply)


def test_nothing_is_lost_on_a_full_disk_once_it_has_room_again(
    tmp_path: Path, disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store.open(address(tmp_path))
    begin(store)
    written(store)

    disk.pages = 1
    for number in range(200):
        store.line(CALL, said(number, "x" * 1_000, final=False))
    until(lambda: store.fault)
    assert "calls.db cannot grow: the disk is full" in store.fault
    for number in range(200):
        store.line(CALL, said(number, "y" * 1_000))
    assert store.queued >= 200
    assert len(store.transcript(CALL)) < 200, "reading goes on meanwhile"

    disk.pages = 1_000_000
    written(store)

    assert store.fault == ""
    assert [line.text for line in store.transcript(CALL)] == ["y" * 1_000] * 200
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "nothing was lost" in caplog.text
    store.close()


def test_a_service_that_stops_on_a_full_disk_says_how_much_is_lost(
    tmp_path: Path, disk: SmallDisk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.store.writer.CLOSING_S", 0.2)
    store = Store.open(address(tmp_path))
    begin(store)
    written(store)
    disk.pages = 1
    for number in range(200):
        store.line(CALL, said(number, "x" * 1_000))
    until(lambda: store.fault)

    store.close()

    assert "200 writes are lost: the service stops" in caplog.text


def test_a_write_after_the_store_closed_is_said_to_be_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store.open(address(tmp_path))
    store.close()

    store.line(CALL, said(0, "late"))

    assert "came after the store was closed" in caplog.text


def refusal(url: str) -> str:
    with pytest.raises(StoreFault) as caught:
        Store.open(url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_no_database_is_named_and_left_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "calls.db"
    file.write_text("Dear diary, " * 500)

    assert f"{file} is not an SQLite database" in refusal(address(tmp_path))
    assert file.read_text() == "Dear diary, " * 500


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    Store.open(address(tmp_path)).close()
    file = tmp_path / "calls.db"
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))

    assert f"{file} is damaged" in refusal(address(tmp_path))


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "calls.db").mkdir()

    assert "cannot be opened" in refusal(address(tmp_path))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")

    assert "the folder of database" in refusal(f"sqlite:///{tmp_path}/data/calls/calls.db")


@contextmanager
def no_longer_root() -> Iterator[None]:
    """Root may open everything: be somebody else for a moment."""
    if os.geteuid():
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("file_mode", "folder_mode", "found"),
    [(0o000, 0o777, "cannot be opened"), (0o444, 0o777, "may be read but not written"), (0o666, 0o555, "calls.db")],
)
def test_a_file_or_folder_without_permission_is_named(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, file_mode: int, folder_mode: int, found: str
) -> None:
    Store.open(address(tmp_path)).close()
    (tmp_path / "calls.db.lock").chmod(0o666)
    (tmp_path / "calls.db").chmod(file_mode)
    tmp_path.chmod(folder_mode)
    above = [tmp_path_factory.getbasetemp().parent, tmp_path_factory.getbasetemp()]
    modes = [folder.stat().st_mode for folder in above]
    for folder in above:
        folder.chmod(0o755)
    try:
        with no_longer_root():
            assert found in refusal(address(tmp_path))
    finally:
        for folder, mode in zip(above, modes, strict=True):
            folder.chmod(mode)
        tmp_path.chmod(0o755)


def test_a_database_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    Store.open(address(tmp_path)).close()
    connection = sqlite3.connect(tmp_path / "calls.db")
    with connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()

    said = refusal(address(tmp_path))

    assert "written by a newer Personaline" in said
    assert "9999" in said


def test_a_second_program_on_the_same_file_is_refused_and_the_first_keeps_its_calls(tmp_path: Path) -> None:
    first = Store.open(address(tmp_path))
    begin(first)
    written(first)

    assert "in use by another Personaline" in refusal(address(tmp_path))

    call = first.call(CALL)
    first.close()
    assert call is not None
    assert call.state == "live"
    Store.open(address(tmp_path)).close()


def test_an_unreachable_postgres_is_named_without_its_password() -> None:
    said = refusal("postgresql+psycopg://anna:secret@127.0.0.1:1/calls")

    assert "127.0.0.1:1/calls cannot be used" in said
    assert "secret" not in said


def test_a_missing_postgres_driver_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)

    with pytest.raises(StoreFault, match=r"pip install 'personaline\[postgres\]'"):
        connect("postgresql+psycopg://anna@127.0.0.1/calls")

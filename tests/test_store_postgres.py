"""The same store on PostgreSQL, on a server of the tests' own."""

import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from app.store import Store, StoreFault, database_url
from tests.calls import CALL, NOON, begin, said, until, written


def postgres_programs() -> Path:
    found = [Path(at).parent for at in [shutil.which("initdb")] if at] or sorted(
        at.parent for at in Path("/usr/lib/postgresql").glob("*/bin/initdb")
    )
    if not found:
        pytest.skip("no PostgreSQL server on this machine")
    return found[-1]


def server_user() -> str:
    """PostgreSQL refuses to run as root."""
    if os.geteuid():
        return getpass.getuser()
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    programs, user, port = postgres_programs(), server_user(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    shutil.chown(folder, user)
    data = folder / "data"

    def control(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", str(data), *arguments]
        subprocess.run(
            command, check=True, user=user if os.geteuid() == 0 else None, cwd=folder, stdout=subprocess.DEVNULL
        )

    control("initdb", "--auth=trust", "--username=anna", "--encoding=UTF8", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    control("pg_ctl", "start", "-w", "-o", options, "-l", str(folder / "log"))
    try:
        yield f"postgresql://anna@127.0.0.1:{port}/postgres"
    finally:
        control("pg_ctl", "stop", "-w", "-m", "immediate")
        shutil.rmtree(folder)


@pytest.fixture
def url(server: str) -> str:
    url = database_url(server)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()
    return url


def test_calls_are_kept_in_postgres_as_they_are_in_sqlite(url: str) -> None:
    store = Store.open(url)
    begin(store)
    store.line(CALL, said(0, "good", final=False))
    written(store)
    store.line(CALL, said(0, "good morning"))
    store.event(CALL, "dtmf", {"digit": "5"}, 2.5, at=NOON)
    store.close()

    store = Store.open(url)
    call, events = store.call(CALL), store.events_after(0, 9)
    ends = store.last_lines([CALL], 3)
    page = store.calls(5, live=False)
    transcript = store.transcript(CALL)
    store.close()

    assert call is not None
    assert (call.started_at, call.outcome) == (NOON, "interrupted")
    assert page == [call]
    assert transcript == [said(0, "good morning")] == ends[CALL]
    assert [event.type for event in events] == ["call.started", "call.answered", "dtmf", "call.ended"]
    assert events[2].data == {"digit": "5"}


def test_words_that_postgres_cannot_hold_take_no_others_with_them(url: str) -> None:
    store = Store.open(url)
    begin(store)
    store.line(CALL, said(0, "nothing \x00 here"))
    store.line(CALL, said(1, "kept"))
    written(store)
    transcript = store.transcript(CALL)
    store.close()

    assert [line.text for line in transcript] == ["kept"]


def test_nothing_is_lost_when_postgres_cuts_its_connections(url: str) -> None:
    store = Store.open(url)
    begin(store)
    written(store)

    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
    engine.dispose()
    for number in range(50):
        store.line(CALL, said(number, "word"))
    until(lambda: not store.queued and not store.fault)
    kept = len(store.transcript(CALL))
    store.close()

    assert kept == 50


def test_a_second_program_on_the_same_postgres_is_refused(url: str) -> None:
    first = Store.open(url)
    with pytest.raises(StoreFault, match="in use by another Personaline"):
        Store.open(url)
    first.close()

    Store.open(url).close()

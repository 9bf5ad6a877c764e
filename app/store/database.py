"""From DATABASE_URL to an engine whose tables are there, held by this process alone."""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from app.store.records import StoreFault

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_TIMEOUT_MS = 5_000
FORMS = "sqlite:///FOLDER/FILE.db or postgresql://USER:PASSWORD@HOST/DATABASE"

# Any fixed number does: who else takes this advisory lock in one database is another Personaline.
POSTGRES_LOCK = 0x7065_7273_6F6E_616C

SQLITE_FAULTS = {
    sqlite3.SQLITE_PERM: "may not be opened by this user: check the permissions of the file and its folder",
    sqlite3.SQLITE_BUSY: "is locked by another program: close that program",
    sqlite3.SQLITE_READONLY: "may be read but not written: check the permissions of the file and its folder",
    sqlite3.SQLITE_IOERR: "could not be read or written: the disk reports an error",
    sqlite3.SQLITE_CORRUPT: "is damaged: put a backup in its place or move it away; nothing in it was changed",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full, make room on it",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: it must be a file that this user can read and write, in such a folder",
    sqlite3.SQLITE_NOTADB: "is not an SQLite database or is damaged: move it away or point DATABASE_URL elsewhere",
}


def database_url(text: str) -> str:
    """The address in SQLAlchemy's form. Raises ValueError that says which forms are right; never shows a password."""
    if text.startswith(("postgres://", "postgresql://", "postgresql+psycopg://")):
        return _postgres_url("postgresql+psycopg://" + text.split("://", 1)[1])
    if text.startswith("sqlite:///") and len(text) > len("sqlite:///"):
        return "sqlite:///" + os.path.expanduser(text.removeprefix("sqlite:///"))
    scheme = text.split("://", 1)[0] if "://" in text else ""
    found = f"{scheme}://…" if scheme else "no scheme"
    raise ValueError(f"a database address is {FORMS}; found {found}")


def _postgres_url(url: str) -> str:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"a database address is {FORMS}; found one that cannot be taken apart") from None
    if not parsed.database:
        raise ValueError(f"a database address is {FORMS}; found no DATABASE in {parsed.render_as_string()}")
    return url


def connect(url: str) -> Engine:
    """An engine for this address; nothing has been opened yet but the folder made. Raises StoreFault."""
    try:
        engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    except ImportError:
        raise StoreFault(
            "DATABASE_URL names PostgreSQL, whose driver is not installed: pip install 'personaline[postgres]'"
        ) from None
    if engine.dialect.name == "sqlite":
        _make_folder(Path(str(engine.url.database)))
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_folder(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreFault(f"the folder of database {file} cannot be made: {error.strerror}") from error


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # Python's driver would begin transactions on its own, and not for reads and CREATE TABLE: we say BEGIN ourselves.
    connection.isolation_level = None
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def fault_of(error: SQLAlchemyError, engine: Engine) -> StoreFault:
    """One clear line for what the driver reported."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(cause, sqlite3.Error):
        # The low byte is the error; the rest of the code says where in SQLite it arose.
        said = SQLITE_FAULTS.get((getattr(cause, "sqlite_errorcode", None) or 0) & 0xFF, f"cannot be used: {cause}")
        return StoreFault(f"database {engine.url.database} {said}")
    said = str(cause or error).strip().splitlines()[0]
    return StoreFault(f"database {engine.url.render_as_string()} cannot be used: {said}")


@contextmanager
def faults_named(engine: Engine) -> Iterator[None]:
    """Raises StoreFault in place of what SQLAlchemy raises."""
    try:
        yield
    except SQLAlchemyError as error:
        raise fault_of(error, engine) from error


@contextmanager
def held_alone(engine: Engine) -> Iterator[None]:
    """Keep a second Personaline off this database: at its start it would close our live calls as interrupted.

    Raises StoreFault where another has it. A process that dies lets go by dying.
    """
    if engine.dialect.name == "sqlite":
        with _file_lock(Path(f"{engine.url.database}.lock")):
            yield
        return
    with faults_named(engine), engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": POSTGRES_LOCK}):
            raise _taken(engine.url.render_as_string())
        yield


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    # A file of its own: closing any other handle on the database file would drop SQLite's own locks on it.
    try:
        file = path.open("w")
    except OSError as error:
        raise StoreFault(f"database {path.with_suffix('')} cannot be opened: {path}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _taken(str(path.with_suffix(""))) from None
        yield


def _taken(name: str) -> StoreFault:
    return StoreFault(f"database {name} is in use by another Personaline: stop that one or set another DATABASE_URL")


def migrate(engine: Engine) -> None:
    """Bring the tables up to this program. Raises StoreFault, also for a database that is ahead of it."""
    # Six lines at every start that say nothing to whoever runs the service.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with faults_named(engine), engine.begin() as connection:
        _refuse_newer(connection, ScriptDirectory.from_config(config))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        # A database that may only be read would show itself at the first call, too late.
        connection.execute(text("UPDATE alembic_version SET version_num = version_num"))


def _refuse_newer(connection: Connection, script: ScriptDirectory) -> None:
    found = MigrationContext.configure(connection).get_current_revision()
    known: set[Any] = {revision.revision for revision in script.walk_revisions()}
    if found is not None and found not in known:
        raise StoreFault(
            f"database {connection.engine.url.render_as_string()} was written by a newer Personaline (its tables are "
            f"at {found}, this program knows {script.get_current_head()}): upgrade the program or use another database"
        )

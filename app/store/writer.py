"""The one thread that writes: takes what waits, commits it together, tells the feed. Keeps trying on a full disk."""

import logging
import threading
import time
from collections.abc import Hashable, Sequence
from itertools import islice

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError, StatementError

from app.store.database import fault_of
from app.store.feed import Change, Feed
from app.store.writes import LineSaid, Write

log = logging.getLogger("personaline.store")

QUEUE_WRITES = 50_000
BATCH_WRITES = 500
# Words that come together share a commit; well under what a killed process may lose.
PACE_S = 0.05
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 5.0
CLOSING_S = 5.0

# What no database would ever take, however often it is tried. Everything else the driver reports is an outage.
REFUSED = (IntegrityError, DataError, ProgrammingError)


class Writer(threading.Thread):
    """`put` from any thread returns at once and never raises; everything else happens on this thread."""

    def __init__(self, engine: Engine, feed: Feed, queue_writes: int = QUEUE_WRITES) -> None:
        super().__init__(name="store-writer", daemon=True)
        self.fault = ""
        self._engine = engine
        self._feed = feed
        self._queue_writes = queue_writes
        # In order of arrival. A line's newer state takes the older one's place, so a slow disk sees each line once.
        self._waiting: dict[Hashable, Write] = {}
        self._arrived = 0
        self._dropped = 0
        self._batch: Sequence[Write] = ()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._give_up_at_s = 0.0

    @property
    def queued(self) -> int:
        """Writes that are not in the database yet."""
        return len(self._waiting) + len(self._batch)

    def put(self, write: Write) -> None:
        if self._closing.is_set():
            log.error("call %s: a %s came after the store was closed and is lost", write.call_id, type(write).__name__)
            return
        with self._changed:
            self._arrived += 1
            key = write.key() if isinstance(write, LineSaid) else self._arrived
            if len(self._waiting) >= self._queue_writes and key not in self._waiting:
                self._drop()
                return
            self._waiting[key] = write
            self._changed.notify()

    def close(self) -> None:
        """Write what waits and stop. Waits for the thread, at most about CLOSING_S on a database that refuses."""
        self._give_up_at_s = time.monotonic() + CLOSING_S
        self._closing.set()
        with self._changed:
            self._changed.notify()
        self.join()

    def run(self) -> None:
        while batch := self._take():
            self._write(batch)
            self._closing.wait(PACE_S)
        if self.queued:
            log.error("%d writes are lost: the service stops and %s", self.queued, self.fault)

    def _take(self) -> Sequence[Write]:
        """Wait for writes; none when all are written and the store closes, or when it gives up."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            if self._gives_up():
                return ()
            keys = list(islice(self._waiting, BATCH_WRITES))
            self._batch = [self._waiting.pop(key) for key in keys]
            return self._batch

    def _write(self, batch: Sequence[Write]) -> None:
        """Try until it is in the database. The batch stays in memory meanwhile, and the queue behind it."""
        retry_s = FIRST_RETRY_S
        while not self._gives_up():
            try:
                changes = self._commit(batch)
            except DBAPIError as error:
                self._now_faulty(str(fault_of(error, self._engine)))
                self._closing.wait(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
            else:
                self._batch = ()
                self._now_well()
                self._feed.publish(changes)
                return

    def _commit(self, batch: Sequence[Write]) -> list[Change]:
        """Raises DBAPIError on an outage only."""
        try:
            with self._engine.begin() as connection:
                return [write.apply(connection) for write in batch]
        except (StatementError, UnicodeError, OverflowError) as error:
            if _is_outage(error):
                raise
        with self._engine.begin() as connection:
            return [change for write in batch if (change := _apply_alone(connection, write)) is not None]

    def _gives_up(self) -> bool:
        return self._closing.is_set() and bool(self.fault) and time.monotonic() > self._give_up_at_s

    def _now_faulty(self, fault: str) -> None:
        if not self.fault:
            log.error("%s. %d writes wait in memory and are tried again", fault, self.queued)
        self.fault = fault

    def _now_well(self) -> None:
        if not self.fault:
            return
        lost = (
            f"{self._dropped} writes were lost, for which memory had no room" if self._dropped else "nothing was lost"
        )
        log.warning("database %s takes writes again: %s", self._engine.url.render_as_string(), lost)
        self.fault = ""
        self._dropped = 0

    def _drop(self) -> None:
        if not self._dropped:
            log.error("%d writes wait for the database: no more are kept until it takes them", self._queue_writes)
        self._dropped += 1


def _apply_alone(connection: Connection, write: Write) -> Change | None:
    """One write that the database will never take must not hold up the others."""
    try:
        with connection.begin_nested():
            return write.apply(connection)
    except (StatementError, UnicodeError, OverflowError) as error:
        if _is_outage(error):
            raise
        reason = str(error).splitlines()[0]
        log.error("call %s: a %s was refused and is left out: %s", write.call_id, type(write).__name__, reason)
        return None


def _is_outage(error: Exception) -> bool:
    return isinstance(error, DBAPIError) and not isinstance(error, REFUSED)

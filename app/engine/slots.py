"""Who leases which row, and the frames waiting on it. Shared by the loop and the engine thread; no tensors."""

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.engine.contract import EngineFull, Pcm

INBOX_FRAMES = 4
"""Beyond this a frame would be heard more than 320 ms late: the oldest goes."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to a row. `ticket` never repeats, so what is meant for one lease cannot reach the row's next owner."""

    row: int
    ticket: int


class LeaseTable:
    """Who holds which of the rows 0..capacity-1. Any thread may call any method.

    `given` is the last ticket; a table that takes the place of another begins with its.
    """

    def __init__(self, capacity: int, given: int = 0) -> None:
        self.dropped_frames = 0
        self.given = given
        self._tickets: list[int | None] = [None] * capacity
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        return len(self._tickets)

    @property
    def in_use(self) -> int:
        return self.capacity - self._tickets.count(None)

    def lease(self) -> Lease:
        """Take a free row.

        Raises EngineFull.
        """
        with self._lock:
            if None not in self._tickets:
                raise EngineFull(f"all {self.capacity} rows are taken")
            self.given += 1
            lease = Lease(self._tickets.index(None), self.given)
            self._hold(lease)
            return lease

    def hold(self, lease: Lease) -> None:
        """Take the row of a lease that another table has given. Whoever held it holds it no more."""
        with self._lock:
            self._hold(lease)

    def release(self, lease: Lease) -> bool:
        """Free the row and forget what waits on it. False when the lease had ended already."""
        with self._lock:
            if not self.holds(lease):
                return False
            self._free(lease.row)
            return True

    def holds(self, lease: Lease) -> bool:
        return lease.row < self.capacity and self._tickets[lease.row] == lease.ticket

    def _hold(self, lease: Lease) -> None:
        self._tickets[lease.row] = lease.ticket

    def _free(self, row: int) -> None:
        self._tickets[row] = None


class SlotTable(LeaseTable):
    """Leases, and for each row an inbox of frames heard. Any thread may call any method."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._inboxes: list[deque[Pcm]] = [deque() for _ in range(capacity)]

    def push(self, lease: Lease, frame: Pcm) -> bool:
        """Queue a frame, dropping the oldest beyond `INBOX_FRAMES`. False when the lease has ended."""
        with self._lock:
            if not self.holds(lease):
                return False
            inbox = self._inboxes[lease.row]
            inbox.append(frame)
            if len(inbox) > INBOX_FRAMES:
                inbox.popleft()
                self.dropped_frames += 1
            return True

    def take(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Lease]:
        """Move at most one frame a row into `pcm` [capacity, 1920], mark those rows in `active`, name their leases."""
        leases = []
        with self._lock:
            for row, (ticket, inbox) in enumerate(zip(self._tickets, self._inboxes, strict=True)):
                active[row] = ticket is not None and bool(inbox)
                if ticket is not None and inbox:
                    pcm[row] = inbox.popleft()
                    leases.append(Lease(row, ticket))
        return leases

    def _free(self, row: int) -> None:
        super()._free(row)
        self._inboxes[row].clear()

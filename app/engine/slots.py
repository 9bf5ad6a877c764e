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


class _Slot:
    __slots__ = ("inbox", "ticket")

    def __init__(self) -> None:
        self.ticket: int | None = None
        self.inbox: deque[Pcm] = deque()


class SlotTable:
    """Rows 0..capacity-1. Any thread may call any method."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.dropped_frames = 0
        self._slots = [_Slot() for _ in range(capacity)]
        self._tickets = 0
        self._lock = threading.Lock()

    @property
    def in_use(self) -> int:
        return sum(slot.ticket is not None for slot in self._slots)

    def lease(self) -> Lease:
        """Take a free row.

        Raises EngineFull.
        """
        with self._lock:
            for row, slot in enumerate(self._slots):
                if slot.ticket is None:
                    self._tickets += 1
                    slot.ticket = self._tickets
                    return Lease(row, self._tickets)
        raise EngineFull(f"all {self.capacity} rows are taken")

    def release(self, lease: Lease) -> bool:
        """Free the row and forget what waits on it. False when the lease had ended already."""
        with self._lock:
            if not self.holds(lease):
                return False
            slot = self._slots[lease.row]
            slot.ticket = None
            slot.inbox.clear()
            return True

    def holds(self, lease: Lease) -> bool:
        return self._slots[lease.row].ticket == lease.ticket

    def push(self, lease: Lease, frame: Pcm) -> bool:
        """Queue a frame, dropping the oldest beyond `INBOX_FRAMES`. False when the lease has ended."""
        with self._lock:
            if not self.holds(lease):
                return False
            inbox = self._slots[lease.row].inbox
            inbox.append(frame)
            if len(inbox) > INBOX_FRAMES:
                inbox.popleft()
                self.dropped_frames += 1
            return True

    def take(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Lease]:
        """Move at most one frame a row into `pcm` [capacity, 1920], mark those rows in `active`, name their leases."""
        leases = []
        with self._lock:
            for row, slot in enumerate(self._slots):
                active[row] = slot.ticket is not None and bool(slot.inbox)
                if slot.ticket is not None and slot.inbox:
                    pcm[row] = slot.inbox.popleft()
                    leases.append(Lease(row, slot.ticket))
        return leases

"""Frames between two processes: for each row a ring in shared memory, which one side writes and the other reads."""

import threading
from collections.abc import Sequence
from multiprocessing.shared_memory import SharedMemory

import numpy as np
from numpy.typing import NDArray

from app.engine.contract import FRAME_SAMPLES, Pcm
from app.engine.slots import INBOX_FRAMES, Lease, LeaseTable

RING_FRAMES = 8
"""More than are ever waited for, so that the writer is not at once upon the frame that is being read."""


class FrameRings:
    """`RING_FRAMES` frames a row, the ticket of the lease that each is of, and how many were ever written to the row.

    The writer never waits: a reader that lags behind finds the oldest frames overwritten. Each side is one thread at a
    time. A frame is counted only once its samples are there. x86 shows stores in their order; other processors need the
    barrier that the lock gives between the two, on either side, which is why it is taken twice.

    `close` ends the mapping, and on the side that made the memory the memory itself.
    """

    def __init__(self, rows: int, name: str | None = None) -> None:
        self.rows = rows
        frames = rows * RING_FRAMES
        size = 8 * (rows + frames) + 4 * frames * FRAME_SAMPLES
        self._memory = SharedMemory(name, create=name is None, size=size)
        self._made = name is None
        self._fence = threading.Lock()
        buffer = self._memory.buf
        self._written: NDArray[np.int64] = np.ndarray((rows,), np.int64, buffer)
        self._tickets: NDArray[np.int64] = np.ndarray((rows, RING_FRAMES), np.int64, buffer, 8 * rows)
        self._pcm: NDArray[np.float32] = np.ndarray(
            (rows, RING_FRAMES, FRAME_SAMPLES), np.float32, buffer, 8 * (rows + frames)
        )

    @property
    def name(self) -> str:
        """What the other side opens it by."""
        return self._memory.name

    def write(self, frames: Sequence[tuple[Lease, Pcm]]) -> list[int]:
        """Write frames, float32 [1920] and no two of one row, over their rows' oldest. Gives their numbers there."""
        numbers = [int(self._written[lease.row]) for lease, _ in frames]
        with self._fence:
            for (lease, frame), number in zip(frames, numbers, strict=True):
                at = number % RING_FRAMES
                self._pcm[lease.row, at] = frame
                self._tickets[lease.row, at] = lease.ticket
        with self._fence:
            for lease, _ in frames:
                self._written[lease.row] += 1
        return numbers

    def written(self) -> NDArray[np.int64]:
        """How many frames were ever written, int64 [rows]."""
        with self._fence:
            return self._written.copy()

    def ticket(self, row: int, number: int) -> int:
        """Whose frame this is. Of a frame that has been overwritten, the later one's."""
        with self._fence:
            return int(self._tickets[row, number % RING_FRAMES])

    def read(self, lease: Lease, number: int, into: Pcm) -> bool:
        """Copy a frame, float32 [1920]. False, and `into` worth nothing: another lease's, or overwritten meanwhile."""
        row, at = lease.row, number % RING_FRAMES
        with self._fence:
            same = bool(self._tickets[row, at] == lease.ticket)
            into[:] = self._pcm[row, at]
        with self._fence:
            return same and bool(self._written[row] - number < RING_FRAMES)

    def close(self) -> None:
        """Nothing may be written or read any more. Twice is harmless."""
        self._written = self._tickets = np.zeros(0, np.int64)
        self._pcm = np.zeros(0, np.float32)
        self._memory.close()
        if self._made:
            self._made = False
            self._memory.unlink()


class RingTable(LeaseTable):
    """Leases that another process gives, and their frames from its rings. Stands where a `SlotTable` does."""

    def __init__(self, rings: FrameRings, capacity: int) -> None:
        if capacity > rings.rows:
            raise ValueError(f"the runner has {capacity} rows, and there are rings for {rings.rows}")
        super().__init__(capacity)
        self._rings = rings
        self._next = rings.written()[:capacity]

    def push(self, lease: Lease, frame: Pcm) -> bool:
        """False: frames come by the rings."""
        return False

    def take(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Lease]:
        """Move at most one frame a row into `pcm` [capacity, 1920], mark those rows in `active`, name their leases.

        The frames of a lease that this table has yet to be told of wait.
        """
        leases = []
        active[:] = False
        with self._lock:
            written = self._rings.written()[: self.capacity]
            for row in np.flatnonzero(written > self._next).tolist():
                ticket = self._tickets[row]
                if ticket is not None and self._take(Lease(row, ticket), int(written[row]), pcm[row]):
                    active[row] = True
                    leases.append(Lease(row, ticket))
        return leases

    def _hold(self, lease: Lease) -> None:
        """What lies on the row from before the lease is passed over; what came with it, faster than this, is kept."""
        super()._hold(lease)
        written = int(self._rings.written()[lease.row])
        numbers = range(max(0, written - RING_FRAMES + 1), written)
        self._next[lease.row] = next((n for n in numbers if self._rings.ticket(lease.row, n) >= lease.ticket), written)

    def _take(self, lease: Lease, written: int, into: Pcm) -> bool:
        waiting = int(self._next[lease.row])
        first = max(waiting, written - INBOX_FRAMES)
        self.dropped_frames += first - waiting
        for number in range(first, written):
            self._next[lease.row] = number
            if self._rings.ticket(lease.row, number) > lease.ticket:
                return False
            self._next[lease.row] = number + 1
            if self._rings.read(lease, number, into):
                return True
            self.dropped_frames += 1
        return False

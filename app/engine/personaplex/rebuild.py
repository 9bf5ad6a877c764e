"""Calls without end: a row is made anew as [prompt | last frames] beside the running call, then changed over.

The window of the ring is finite, and RoPE positions beyond those trained on are unknown ground. So before the prompt
falls out of the window the latest frames are read again right behind it, a part each tick, and at a position that
depends on nothing but the call itself the copy takes the row's place, between two ticks. A handoff is the same with
another persona's prompt.
"""

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.personaplex.model.lm import Lm, LmState
from app.engine.personaplex.model.ring import Ring
from app.engine.personaplex.prefix import Prefix
from app.engine.personaplex.sizes import COPIES, KEPT_FRAMES

HANDOFF_FRAMES = 250
"""How much of it, 20 s, a new persona is given: few enough to be read within one tick."""
CHUNK_FRAMES = 128
"""Read again each tick beside the calls, in one pass: it costs a GPU some milliseconds however short it is."""
LATE_FRAMES = 4
"""A row may be so many frames past its due position when its turn comes: late frames are stepped between two ticks."""

_log = logging.getLogger("personaline.engine")


class _Job:
    """One row to be made anew. Its copy takes memory from its first frame on."""

    def __init__(self, row: int, length: int, prefix: Prefix | None, first: int, due: int) -> None:
        """
        Args:
            length: of the prompt.
            prefix: None for the row's own prompt, which its ring still holds: it has not gone round.
            first: the first frame that is kept, as a position in the row's present count.
            due: the row's position at which the copy takes over.
        """
        self.row, self.length, self.prefix, self.first, self.due = row, length, prefix, first, due
        self.done = length
        self.kv: Ring | None = None

    def copy(self, state: LmState, position: int) -> Ring:
        """Of one row, with the prompt in it from the start."""
        if self.kv is None:
            self.kv = state.kv.like(self.length + max(self.due + LATE_FRAMES, position) - self.first)
            prompt = state.kv.row(self.row).first(self.length) if self.prefix is None else self.prefix.kv
            self.kv.first(self.length).copy_(prompt)
        return self.kv


class Rebuilder:
    """Works between ticks on the engine thread.

    When a row is due, all that its copy misses is read in that tick: other rows cost it time, never its place.
    """

    def __init__(self, lm: Lm, state: LmState, positions: NDArray[np.int64], prompt_frames: NDArray[np.int64]) -> None:
        """`positions` and `prompt_frames` [S] are the runner's own: each row's next position, and its prompt's end."""
        self._lm, self._state = lm, state
        self._positions, self._prompt_frames = positions, prompt_frames
        self._ring = lm.config.ring
        # Calls that began together are due at different positions.
        self._spread = max(1, self._ring // 8)
        self._jobs: list[_Job] = []
        self._sliding: set[int] = set()

    def kept_frames(self, prompt_frames: int) -> int:
        """How many a rebuild keeps; at most half of the room beside the prompt, so that the next one is far. 0: none
        is made, the window slides.
        """
        return max(0, min(KEPT_FRAMES, (self._ring - self._spread - LATE_FRAMES - prompt_frames) // 2))

    def watch(self, row: int, seed: int) -> None:
        """Begin in time to be done when the row is due. `seed` is the call's own."""
        length = int(self._prompt_frames[row])
        kept = self.kept_frames(length)
        due = self._ring - LATE_FRAMES - seed % self._spread
        in_good_time = 4 * -(-kept // CHUNK_FRAMES)
        begun = row in self._sliding or any(job.row == row for job in self._jobs)
        if kept and self._positions[row] >= due - in_good_time and not begun:
            self._jobs.append(_Job(row, length, None, max(due - kept, length), due))

    def hand_off(self, row: int, prefix: Prefix) -> bool:
        """Give a row another prompt by the next tick, with the last frames behind it. False where none would fit."""
        self.drop(row)
        length, now = len(prefix.prompt), int(self._positions[row])
        room = self._ring - self._spread - LATE_FRAMES - length
        if room <= 0:
            return False
        held = min(now - int(self._prompt_frames[row]), self._ring - 1)
        self._jobs.append(_Job(row, length, prefix, now - min(held, room, HANDOFF_FRAMES), now))
        return True

    def drop(self, row: int) -> None:
        """The row's call has ended or goes another way."""
        self._jobs = [job for job in self._jobs if job.row != row]
        self._sliding.discard(row)

    def work(self) -> None:
        """Change over the rows that are due, and go on with one of those that will be next.

        Where the GPU has no memory for another copy, that row goes on without: its prompt will fall out of its window.
        """
        for job in [job for job in self._jobs if self._positions[job.row] >= job.due]:
            self._jobs.remove(job)
            if self._read(job, self._ring):
                self._change_over(job)
        # What is less than a part is read when the row is due: a pass costs about the same however little it reads.
        nearest = sorted(self._jobs, key=lambda job: job.due - self._positions[job.row])[:COPIES]
        part = next((job for job in nearest if self._unread(job) >= CHUNK_FRAMES), None)
        if part is not None and not self._read(part, CHUNK_FRAMES):
            self._jobs.remove(part)

    def _unread(self, job: _Job) -> int:
        return int(self._positions[job.row]) - job.first - (job.done - job.length)

    def _read(self, job: _Job, most: int) -> bool:
        """Bring the copy nearer to where its row is now, by so many frames at most. False: no memory for it."""
        try:
            self._extend(job, most)
        except torch.OutOfMemoryError as error:
            self._sliding.add(job.row)
            reason = str(error).partition("\n")[0]
            _log.error("no memory to make a call anew, so its prompt will fall out of its window: %s", reason)
            return False
        return True

    def _extend(self, job: _Job, most: int) -> None:
        position = int(self._positions[job.row])
        begin = job.first + job.done - job.length
        end = min(position, begin + most)
        if begin < end:
            columns = self._columns(job.row, begin, end)
            self._lm.transformer.extend(self._lm.embed(columns), job.copy(self._state, position), job.done)
            job.done += end - begin

    def _columns(self, row: int, begin: int, end: int) -> Tensor:
        place = torch.arange(begin, end, device=self._lm.device) % self._ring
        return self._state.history[row, place]

    def _change_over(self, job: _Job) -> None:
        state, row, position = self._state, job.row, int(self._positions[job.row])
        kept = self._columns(row, job.first, position)
        state.kv.row(row).first(job.done).copy_(job.copy(state, position).first(job.done))
        state.history[row, job.length : job.done] = kept
        state.position[row] = job.done
        self._positions[row], self._prompt_frames[row] = job.done, job.length

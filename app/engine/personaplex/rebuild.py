"""Calls without end: a row is made anew as [prompt | last frames] beside the running call, then changed over.

The window of the ring is finite, and RoPE positions beyond those trained on are unknown ground. So before the prompt
falls out of the window the latest frames are read again right behind it, a part each tick, and at a position that
depends on nothing but the call itself the copy takes the row's place, between two ticks. A handoff is the same with
another persona's prompt.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.personaplex.model.lm import Lm, LmState
from app.engine.personaplex.prefix import Prefix

CHUNK_FRAMES = 128
"""Read again each tick beside the calls: some milliseconds on a GPU."""
HANDOFF_FRAMES = 250
"""How much of the conversation, 20 s, a new persona is given: few enough to be read within one tick."""


@dataclass(eq=False)
class _Job:
    row: int
    prefix: Prefix
    first: int
    """The first frame that is kept, as a position in the row's present count."""
    due: int
    """The row's position at which the copy takes over."""
    done: int = 0
    """Positions that the spare row holds of this job."""


class Rebuilder:
    """Works between ticks on the engine thread, in one row's worth of spare memory.

    What takes the spare row from a job that was under way costs that job time, never its place: when its row is due,
    all that is missing is read in that tick.
    """

    def __init__(self, lm: Lm, state: LmState, positions: NDArray[np.int64], prompt_frames: NDArray[np.int64]) -> None:
        """`positions` and `prompt_frames` [S] are the runner's own: each row's next position, and its prompt's end."""
        self._lm, self._state = lm, state
        self._positions, self._prompt_frames = positions, prompt_frames
        self._ring = lm.config.ring
        self._spare = torch.empty_like(state.kv[0])
        self._jobs: list[_Job] = []
        self._holder: _Job | None = None

    def kept_frames(self, prompt: int) -> int:
        """Of the frames before: half of the window beside the prompt, so that the next rebuild is far."""
        return (self._ring - self._spread - prompt) // 2

    @property
    def _spread(self) -> int:
        """Calls that began together are due at different positions."""
        return max(1, self._ring // 8)

    def watch(self, row: int, prefix: Prefix, seed: int) -> None:
        """Begin in time to be done when the row is due. `seed` is the call's own."""
        due = self._ring - seed % self._spread
        kept = self.kept_frames(len(prefix.prompt))
        ticks = -(-kept // (CHUNK_FRAMES - 1))
        near = self._positions[row] >= due - 2 * ticks
        if near and kept > 0 and not any(job.row == row for job in self._jobs):
            first = max(due - kept, int(self._prompt_frames[row]))
            self._jobs.append(_Job(row, prefix, first, due))

    def hand_off(self, row: int, prefix: Prefix) -> bool:
        """Give a row another prompt by the next tick, with the last frames behind it. False where none would fit."""
        self.drop(row)
        room = self._ring - self._spread - len(prefix.prompt)
        if room <= 0:
            return False
        now = int(self._positions[row])
        held = min(now - int(self._prompt_frames[row]), self._ring - 1)
        self._jobs.append(_Job(row, prefix, now - min(held, room, HANDOFF_FRAMES), now))
        return True

    def drop(self, row: int) -> None:
        """The row's call has ended or goes another way."""
        self._jobs = [job for job in self._jobs if job.row != row]

    def work(self) -> None:
        """Change over the rows that are due, and go on with the one that will be next."""
        for job in [job for job in self._jobs if self._positions[job.row] >= job.due]:
            self._read(job, self._ring)
            self._change_over(job)
            self._jobs.remove(job)
        if self._jobs:
            self._read(min(self._jobs, key=lambda job: job.due - self._positions[job.row]), CHUNK_FRAMES)

    def _read(self, job: _Job, most: int) -> None:
        """Bring the copy nearer to where its row is now, by at most so many frames."""
        length = len(job.prefix.prompt)
        if self._holder is not job:
            self._holder, job.done = job, length
            self._spare[:, :, :, :length] = job.prefix.kv
        begin = job.first + job.done - length
        end = min(int(self._positions[job.row]), begin + most)
        if begin < end:
            self._lm.transformer.extend(self._lm.embed(self._columns(job.row, begin, end)), self._spare, job.done)
            job.done += end - begin

    def _columns(self, row: int, begin: int, end: int) -> Tensor:
        place = torch.arange(begin, end, device=self._lm.device) % self._ring
        return self._state.history[row, place].to(torch.int64)

    def _change_over(self, job: _Job) -> None:
        state, row, length = self._state, job.row, len(job.prefix.prompt)
        kept = self._columns(row, job.first, int(self._positions[row]))
        state.kv[row, :, :, :, : job.done] = self._spare[:, :, :, : job.done]
        state.history[row, length : job.done] = kept.to(torch.int16)
        state.position[row] = job.done
        self._positions[row], self._prompt_frames[row] = job.done, length

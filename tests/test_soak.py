"""A thousand calls through eight rows of PersonaPlex, as fast as they go: nothing leaks, and nobody hears another."""

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from app.engine import Engine, Lease, Role, Spoken
from app.engine.personaplex.runner import PersonaPlexRunner
from tests.engine.personaplex.runners import CAPTAIN, HARBOUR, SHORT, poison, same_speech, sound, tiny_runner
from tests.engine.tiny import make_tiny_checkpoint

CALLS, ROWS = 1_000, 8
FIRST_CALLS = 200
"""Before those that count: a processor's kernels are made for each length of prompt as it comes, and are kept."""
CONTEXT = 112
LONGEST_FRAMES = 120
WITNESS_EVERY, WITNESS_FRAMES = 25, 60
PROMPTS = 150
"""More than are kept ready, so that they come and go."""
STATUS = Path("/proc/self/status")


@dataclass(eq=False)
class Caller:
    """One call's part. Every so many calls a witness calls: always the same, so it must always hear the same."""

    number: int
    lease: Lease
    frames: int
    heard: list[Spoken] = field(default_factory=list)

    @property
    def is_witness(self) -> bool:
        return self.number % WITNESS_EVERY == 0

    @property
    def voice(self) -> int:
        return 0 if self.is_witness else self.number


class Soak:
    """The engine without its thread and its clock: a tick follows the other at once."""

    def __init__(self, runner: PersonaPlexRunner, seed: int) -> None:
        self.runner, self.random = runner, random.Random(seed)
        self.engine = Engine(runner, self._deliver, [HARBOUR, CAPTAIN, SHORT])
        runner.warm_up([HARBOUR, CAPTAIN, SHORT])
        self.engine._warm.set()
        self.live: list[Caller] = []
        self.first_witness: list[Spoken] = []
        self.witnesses_alike = 0
        self.begun = self.ticks = self.frames = 0
        self.resident_bytes: list[int] = []
        self._said: dict[Lease, Spoken] = {}

    def _deliver(self, said: Sequence[tuple[Lease, Spoken]]) -> None:
        self._said = dict(said)

    def run(self, calls: int) -> None:
        """So many calls more, all to their end."""
        until = self.begun + calls
        while self.begun < until or self.live:
            if self.begun < until and self.engine.in_use < ROWS and self.random.random() < 0.7:
                self._begin()
            self._tick()
            for caller in [caller for caller in self.live if len(caller.heard) >= caller.frames]:
                self._hang_up(caller)

    def _begin(self) -> None:
        number, draw = self.begun, self.random
        role = HARBOUR if number % WITNESS_EVERY == 0 else draw.choice([HARBOUR, CAPTAIN, SHORT, self._any_role()])
        frames = WITNESS_FRAMES if number % WITNESS_EVERY == 0 else draw.randint(0, LONGEST_FRAMES)
        self.live.append(Caller(number, self.engine.lease(role), frames))
        self.begun += 1

    def _any_role(self) -> Role:
        number, greeting = self.random.randrange(PROMPTS), self.random.choice(["", "Good morning."])
        return Role(f"desk{number}", f"You are desk {number} of the harbour.", greeting)

    def _tick(self) -> None:
        pushed = {caller.lease: caller for caller in self.live if self._speak(caller)}
        self.engine._tick(time.monotonic())
        assert self._said.keys() == pushed.keys(), "a frame for each that was pushed, under the lease that pushed it"
        for lease, caller in pushed.items():
            spoken = self._said[lease]
            assert np.isfinite(spoken.pcm).all(), f"call {caller.number} sounds of a row that was given back"
            caller.heard.append(spoken)
        self._poison_free_rows()
        self.ticks, self.frames = self.ticks + 1, self.frames + len(pushed)
        self.resident_bytes.append(resident_bytes())

    def _speak(self, caller: Caller) -> bool:
        """Push the caller's next frame, and now and then do what an operator does. False: the frame was lost."""
        draw = self.random.random()
        if len(caller.heard) >= caller.frames or (draw < 0.05 and not caller.is_witness):
            return False
        if not caller.is_witness and draw > 0.97:
            assert self.engine.change(caller.lease, self.random.choice([HARBOUR, CAPTAIN, SHORT, self._any_role()]))
        elif not caller.is_witness and draw > 0.94:
            assert self.engine.say(caller.lease, "the ferry leaves at noon", self.random.choice([None, 0, 400]))
        return self.engine.push(caller.lease, sound(caller.voice, len(caller.heard)))

    def _hang_up(self, caller: Caller) -> None:
        self.live.remove(caller)
        self.engine.release(caller.lease)
        assert not self.engine.push(caller.lease, sound(caller.voice, 0))
        assert not self.engine.change(caller.lease, CAPTAIN)
        if caller.is_witness:
            # A frame is a view of all rows' sound: to keep them all would look like a leak.
            self.first_witness = self.first_witness or caller.heard
            self.witnesses_alike += same_speech(self.first_witness, caller.heard)

    def _poison_free_rows(self) -> None:
        for row in set(range(ROWS)) - {caller.lease.row for caller in self.live}:
            poison(self.runner, row)


def resident_bytes() -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read as Linux tells it")
def test_a_thousand_calls_leave_nothing_behind_and_none_hears_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random lengths, joins, hang-ups, handovers, words to say and lost frames. Rows given back are full of NaN."""
    runner = tiny_runner(make_tiny_checkpoint(tmp_path / "tiny", context=CONTEXT), ROWS)
    soak = Soak(runner, seed=4)
    soak.run(FIRST_CALLS)
    began_s, soak.ticks, soak.frames, soak.resident_bytes = time.monotonic(), 0, 0, []
    soak.run(CALLS)
    took_s = time.monotonic() - began_s
    soak.engine._tick(time.monotonic())

    quarter = soak.ticks // 4
    first, last = np.mean(soak.resident_bytes[:quarter]), np.mean(soak.resident_bytes[-quarter:])
    with capsys.disabled():
        sys.stdout.write(
            f"\n{CALLS} calls, {soak.frames} frames, {soak.ticks} ticks in {took_s:.0f} s; resident "
            f"{first / 1e6:.1f} MB in the first quarter, {last / 1e6:.1f} MB in the last ({last / first - 1:+.2%})\n"
        )
    assert (soak.engine.in_use, soak.engine.dropped_frames) == (0, 0)
    assert runner._seats == [None] * ROWS
    assert not runner._rebuilder._jobs
    assert soak.witnesses_alike == (FIRST_CALLS + CALLS) // WITNESS_EVERY
    assert abs(last / first - 1) < 0.05

"""The engine in a process of its own, with processes that are really started, and really die."""

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest

from app.engine import FRAME_SAMPLES, EngineFull, EngineProcess, Lease, Role, Runner, Spoken
from app.engine.contract import Pcm
from app.engine.echo import EchoRunner
from tests.calls import until
from tests.engine.trial_runner import (
    DIE,
    HANG,
    RAISE,
    RICH,
    WHO,
    Broken,
    Loading,
    Lowered,
    Slow,
    TrialRunner,
    dies_while_it_loads_once,
    unmade,
)

ROLE = Role("operator", "You work for a shop.")
WITHIN_S = 60.0


class Trial:
    """An engine's process, and what it said."""

    def __init__(self, make: Callable[[], Runner], rows: int = 2) -> None:
        self.said: queue.Queue[tuple[Lease, Spoken]] = queue.Queue()
        self.engine = EngineProcess(make, rows, self._deliver, [ROLE])

    def _deliver(self, batch: Sequence[tuple[Lease, Spoken]]) -> None:
        for item in batch:
            self.said.put(item)

    def lease(self, role: Role = ROLE) -> Lease:
        """As soon as a call can be taken: a busy machine may be behind its beat for a while."""
        until(lambda: self.engine.refusal is None, WITHIN_S)
        return self.engine.lease(role)

    def answers(self, lease: Lease, value: float) -> Spoken:
        """What is said to one frame of this value, on this lease and on no other."""
        assert self.engine.push(lease, frame(value))
        owner, spoken = self.said.get(timeout=WITHIN_S)
        assert owner == lease
        return spoken

    @property
    def pid(self) -> int:
        life = self.engine._life
        assert life is not None
        pid = life._process.pid
        assert pid is not None
        return pid

    @property
    def memory(self) -> list[str]:
        life = self.engine._life
        assert life is not None
        return [life.heard.name, life._spoken.name]


def frame(value: float) -> Pcm:
    return np.full(FRAME_SAMPLES, value, np.float32)


@contextlib.contextmanager
def running(make: Callable[[], Runner], rows: int = 2) -> Iterator[Trial]:
    before = {child.pid for child in multiprocessing.active_children()}
    trial = Trial(make, rows)
    trial.engine.start()
    try:
        yield trial
    finally:
        trial.engine.close()
    assert {child.pid for child in multiprocessing.active_children()} <= before, "a process was left behind"


@pytest.fixture
def trial() -> Iterator[Trial]:
    with running(partial(TrialRunner, 2)) as trial:
        until(lambda: trial.engine.ready, WITHIN_S)
        yield trial


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.process.FIRST_PAUSE_S", 0.01)


def alive(pid: int) -> bool:
    """One that nobody has reaped yet is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def gone(name: str) -> bool:
    try:
        memory = SharedMemory(name)
    except FileNotFoundError:
        return True
    memory.close()
    return False


def test_for_each_frame_heard_one_frame_is_spoken_in_another_process(trial: Trial) -> None:
    lease = trial.lease()
    noise = np.random.default_rng(1).uniform(-1, 1, (30, FRAME_SAMPLES)).astype(np.float32)
    for one in noise:
        assert trial.engine.push(lease, one)
        owner, spoken = trial.said.get(timeout=WITHIN_S)
        assert owner == lease
        np.testing.assert_array_equal(spoken.pcm, one)

    assert trial.answers(lease, WHO).said == str(trial.pid)
    assert trial.pid != os.getpid()


def test_all_that_goes_with_a_frame_arrives_with_it(trial: Trial) -> None:
    spoken = trial.answers(trial.lease(), RICH)

    assert (spoken.text, spoken.ends, spoken.interrupted, spoken.said) == ("Good ", True, True, "Good day.")
    assert [(heard.utterance, heard.text, heard.end_s, heard.final) for heard in spoken.heard] == [
        (3, "Good day.", 1.25, True)
    ]


def test_a_row_that_misses_its_tick_is_silent_and_never_says_another_rows_audio(trial: Trial) -> None:
    steady, sparse = trial.lease(), trial.lease()
    for number in range(1, 25):
        assert trial.engine.push(steady, frame(number / 100))
        if number % 5 == 0:
            assert trial.engine.push(sparse, frame(-number / 100))
        heard = [trial.said.get(timeout=WITHIN_S) for _ in range(1 + (number % 5 == 0))]
        values = {lease: round(float(spoken.pcm[0]), 2) for lease, spoken in heard}
        assert values == {steady: number / 100} | ({sparse: -number / 100} if number % 5 == 0 else {})
    assert trial.said.empty()


def test_orders_are_carried_out_in_their_order_and_not_for_a_lease_that_has_ended(trial: Trial) -> None:
    first = trial.lease(Role("first", ""))
    assert trial.engine.say(first, "Good morning.", 400)
    assert trial.engine.change(first, Role("baker", ""))
    trial.engine.release(first)
    trial.engine.release(first)
    assert not trial.engine.say(first, "Too late.")
    assert not trial.engine.change(first, Role("late", ""))
    assert not trial.engine.push(first, frame(0.5))
    second = trial.lease(Role("second", ""))

    happened = trial.answers(second, WHO).text.split("; ")
    assert second.row == first.row
    assert [one for one in happened if one.startswith(("join", "leave"))] == ["join first", "leave", "join second"]
    assert not [one for one in happened[happened.index("leave") :] if one.startswith(("say", "change"))]
    with pytest.raises(ValueError, match="start_within_ms"):
        trial.engine.say(second, " ")


def test_a_frame_of_a_call_that_has_ended_is_not_said_to_the_next_on_its_row(trial: Trial) -> None:
    first = trial.lease()
    trial.answers(first, 0.25)
    for _ in range(4):
        trial.engine.push(first, frame(0.5))
    trial.engine.release(first)
    second = trial.lease()

    assert second.row == first.row
    assert float(trial.answers(second, 0.75).pcm[0]) == 0.75


def test_a_full_engine_refuses_the_next_caller(trial: Trial) -> None:
    trial.lease()
    trial.lease()
    until(lambda: trial.engine.refusal is None, WITHIN_S)

    with pytest.raises(EngineFull, match="all 2 rows") as full:
        trial.engine.lease(ROLE)
    assert full.value.reason == "full"


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("command", [DIE, RAISE])
def test_a_process_that_dies_ends_its_calls_and_another_takes_new_ones(trial: Trial, command: float) -> None:
    lease, other = trial.lease(), trial.lease()
    first, memory = trial.pid, trial.memory
    trial.engine.push(lease, frame(command))
    until(lambda: not trial.engine.holds(lease) and not trial.engine.holds(other), WITHIN_S)
    assert trial.engine.in_use == 0
    trial.engine.release(lease)

    until(lambda: trial.engine.restarts == 1 and trial.engine.ready, WITHIN_S)
    assert not alive(first)
    assert all(gone(name) for name in memory)
    assert trial.engine.fault is None
    assert not trial.engine.push(lease, frame(0.5))
    after = trial.lease()
    assert after.ticket > other.ticket
    assert trial.answers(after, WHO).said == str(trial.pid)


@pytest.mark.usefixtures("hasty")
def test_a_process_that_hangs_takes_no_new_calls_and_is_replaced(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    lease, first = trial.lease(), trial.pid
    trial.engine.push(lease, frame(HANG))
    until(lambda: trial.engine.refusal is not None, WITHIN_S)
    with pytest.raises(EngineFull, match="behind its beat"):
        trial.engine.lease(ROLE)
    assert trial.engine.holds(lease), "an engine that is late may yet go on"

    monkeypatch.setattr("app.engine.process.HANGS_AFTER_S", 1.0)
    until(lambda: not trial.engine.holds(lease), WITHIN_S)
    until(lambda: trial.engine.restarts == 1 and trial.engine.ready, WITHIN_S)
    assert not alive(first)
    assert trial.answers(trial.lease(), WHO).said == str(trial.pid)


@pytest.mark.parametrize(("make", "found"), [(partial(Broken, 1), "/no/such"), (unmade, "torch is not installed")])
def test_what_a_user_must_mend_is_said_and_not_tried_again(
    make: Callable[[], Runner], found: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running(make) as trial:
        until(lambda: trial.engine.fault is not None, WITHIN_S)
        trial.engine._thread.join(WITHIN_S)

        assert found in str(trial.engine.fault)
        assert found in caplog.text
        assert not trial.engine.ready
        assert trial.engine.restarts == 0
        with pytest.raises(EngineFull) as full:
            trial.engine.lease(ROLE)
        assert full.value.reason == "not_ready"


@pytest.mark.usefixtures("hasty")
def test_a_process_that_dies_while_it_loads_is_tried_again(tmp_path: Path) -> None:
    with running(partial(dies_while_it_loads_once, tmp_path / "note"), rows=1) as trial:
        until(lambda: trial.engine.ready, WITHIN_S)

        assert trial.engine.restarts == 1
        assert float(trial.answers(trial.lease(), 0.5).pcm[0]) == 0.5


def test_nobody_gets_a_row_before_the_models_are_loaded_and_loading_can_be_given_up() -> None:
    with running(partial(Loading, 1)) as trial:
        until(lambda: bool(multiprocessing.active_children()), WITHIN_S)
        with pytest.raises(EngineFull, match="not ready"):
            trial.engine.lease(ROLE)


def test_a_runner_may_find_that_it_carries_fewer_rows() -> None:
    with running(partial(Lowered, 5), rows=5) as trial:
        assert trial.engine.capacity == 5
        until(lambda: trial.engine.ready, WITHIN_S)

        assert trial.engine.capacity == 1
        assert float(trial.answers(trial.lease(), 0.5).pcm[0]) == 0.5


def test_an_engine_that_cannot_keep_the_beat_refuses_new_calls_and_serves_those_it_has() -> None:
    with running(partial(Slow, 2)) as trial:
        lease = trial.lease()
        while trial.engine.refusal is None:
            trial.answers(lease, 0.5)

        with pytest.raises(EngineFull, match="behind its beat") as full:
            trial.engine.lease(ROLE)
        assert full.value.reason == "behind"
        assert trial.engine.late_ticks >= 3
        assert trial.engine.tick_s > 0.08
        assert float(trial.answers(lease, 0.25).pcm[0]) == 0.25
        trial.engine.release(lease)
        assert trial.lease()


def test_ctrl_c_and_sigterm_to_the_whole_group_leave_the_engine_to_its_parent(trial: Trial) -> None:
    lease, pid = trial.lease(), trial.pid
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)

    assert trial.answers(lease, WHO).said == str(pid)


def test_an_engine_that_hangs_is_ended_by_force_at_the_end(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("app.engine.process.END_WITHIN_S", 0.5)
    pid, memory = trial.pid, trial.memory
    trial.engine.push(trial.lease(), frame(HANG))
    until(lambda: trial.engine.refusal is not None, WITHIN_S)
    trial.engine.close()

    assert not alive(pid)
    assert all(gone(name) for name in memory)
    assert "by force" in caplog.text


def test_what_the_process_logs_is_logged_here(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "personaline.engine")
    with running(partial(TrialRunner, 2)) as trial:
        until(lambda: trial.engine.ready, WITHIN_S)
    records = [record for record in caplog.records if record.message == "trial: 1 roles"]

    assert [(record.levelname, record.name) for record in records] == [("INFO", "personaline.engine")]


_ORPHAN = """
import functools, os, signal, sys, time
from app.engine import EngineProcess
from app.engine.echo import EchoRunner

if __name__ == "__main__":
    engine = EngineProcess(functools.partial(EchoRunner, 1), 1, lambda batch: None)
    engine.start()
    while not engine.ready:
        time.sleep(0.01)
    print(engine._life._process.pid, engine._life.heard.name, engine._life._spoken.name, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["killed", "forgotten"])
def test_the_engine_ends_with_its_parent_however_that_ended(tmp_path: Path, how: str) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(_ORPHAN, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, script, how], env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )
    pid, *memory = done.stdout.split()

    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr
    assert how == "killed" or "leaked" not in done.stderr
    until(lambda: not alive(int(pid)), WITHIN_S)
    until(lambda: all(gone(name) for name in memory), WITHIN_S)


def test_a_runner_that_cannot_be_taken_to_another_process_is_a_fault_that_says_so() -> None:
    with running(lambda: EchoRunner(1)) as trial:
        until(lambda: trial.engine.fault is not None, WITHIN_S)

        assert "pickle" in str(trial.engine.fault).lower()

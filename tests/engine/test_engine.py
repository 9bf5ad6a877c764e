"""The engine thread with runners that are really run."""

import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from app.engine import FRAME_SAMPLES, Engine, EngineFault, EngineFull, Lease, Role, Spoken
from app.engine.contract import Pcm
from app.engine.echo import EchoRunner

ROLE = Role("operator", "You work for a shop.")
Said = queue.Queue[tuple[Lease, Spoken]]


def frame(value: float) -> Pcm:
    return np.full(FRAME_SAMPLES, value, np.float32)


def running(runner: EchoRunner, said: Said) -> Engine:
    def deliver(batch: Sequence[tuple[Lease, Spoken]]) -> None:
        for item in batch:
            said.put(item)

    engine = Engine(runner, deliver)
    engine.start()
    return engine


def ready(engine: Engine) -> bool:
    deadline = threading.Event()
    for _ in range(500):
        if engine.ready or engine.fault is not None:
            return engine.ready
        deadline.wait(0.01)
    return False


@pytest.fixture
def said() -> Said:
    return queue.Queue()


@pytest.fixture
def engine(said: Said) -> Iterator[Engine]:
    engine = running(EchoRunner(rows=2), said)
    assert ready(engine)
    yield engine
    engine.close()


def test_for_each_frame_heard_one_frame_is_spoken(engine: Engine, said: Said) -> None:
    lease = engine.lease(ROLE)
    for value in (0.1, 0.2, 0.3):
        engine.push(lease, frame(value))

    spoken = [said.get(timeout=5)[1].pcm[0] for _ in range(3)]

    assert spoken == pytest.approx([0.1, 0.2, 0.3])


def test_two_callers_never_hear_each_other(engine: Engine, said: Said) -> None:
    leases = [engine.lease(ROLE), engine.lease(ROLE)]
    for _ in range(3):
        for number, lease in enumerate(leases):
            engine.push(lease, frame(0.25 + number))

    heard = [said.get(timeout=5) for _ in range(6)]

    assert {lease: {float(spoken.pcm[0]) for owner, spoken in heard if owner == lease} for lease in leases} == {
        leases[0]: {0.25},
        leases[1]: {1.25},
    }


def test_nobody_gets_a_row_before_the_models_are_loaded(said: Said) -> None:
    loading = threading.Event()

    class Slow(EchoRunner):
        def warm_up(self, roles: Sequence[Role]) -> None:
            loading.wait(10)

    engine = running(Slow(rows=1), said)
    with pytest.raises(EngineFull, match="not ready"):
        engine.lease(ROLE)
    loading.set()

    assert ready(engine)
    engine.close()


def test_an_engine_that_cannot_start_says_why_and_takes_no_calls(said: Said) -> None:
    class Broken(EchoRunner):
        def warm_up(self, roles: Sequence[Role]) -> None:
            raise EngineFault("CASCADE_LLM: /no/such.gguf is not there")

    engine = running(Broken(rows=1), said)

    assert not ready(engine)
    assert "no/such.gguf" in str(engine.fault)
    with pytest.raises(EngineFull):
        engine.lease(ROLE)
    engine.close()


def test_a_runner_that_fails_in_mid_call_is_told_to_everybody(said: Said, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(EchoRunner):
        def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Spoken | None]:
            raise RuntimeError("device lost")

    engine = running(Failing(rows=1), said)
    assert ready(engine)
    lease = engine.lease(ROLE)
    engine.push(lease, frame(0.1))
    engine._thread.join(5)

    assert isinstance(engine.fault, RuntimeError)
    assert not engine.ready
    assert not engine.holds(lease)
    assert "device lost" in caplog.text


def test_work_for_which_no_caller_should_wait_comes_after_the_frames_are_delivered() -> None:
    happened: queue.Queue[str] = queue.Queue()

    class Working(EchoRunner):
        def between(self) -> None:
            happened.put("work")

    engine = Engine(Working(rows=1), lambda batch: happened.put(f"{len(batch)} delivered"))
    engine.start()
    assert ready(engine)
    engine.push(engine.lease(ROLE), frame(0.1))
    seen = [happened.get(timeout=5) for _ in range(10)]
    engine.close()

    assert "1 delivered" in seen
    assert {before for before, after in itertools.pairwise(seen) if after == "work"} <= {"0 delivered", "1 delivered"}


def test_frames_that_waited_together_are_made_up_for_within_a_beat(said: Said) -> None:
    """Two at once: the second does not wait for the time when the third will be there."""
    stepped: list[float] = []

    class Timed(EchoRunner):
        def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Spoken | None]:
            stepped.append(time.monotonic())
            return super().step(pcm, active)

    engine = running(Timed(rows=1), said)
    assert ready(engine)
    lease = engine.lease(ROLE)
    tries = 0
    while not any(second - first < 0.05 for first, second in itertools.pairwise(stepped)):
        tries += 1
        assert tries < 30, "never two frames in one beat"
        threading.Event().wait(0.1)
        engine.push(lease, frame(0.1))
        engine.push(lease, frame(0.2))
        assert [said.get(timeout=5)[1].pcm[0] for _ in range(2)] == pytest.approx([0.1, 0.2])
    engine.close()


def test_a_runner_that_finds_while_it_warms_up_that_it_carries_fewer_rows_gives_no_more(said: Said) -> None:
    class Lowered(EchoRunner):
        def warm_up(self, roles: Sequence[Role]) -> None:
            self.rows = 1

    engine = running(Lowered(rows=3), said)
    assert ready(engine)
    lease = engine.lease(ROLE)
    with pytest.raises(EngineFull, match="all 1 rows"):
        engine.lease(ROLE)
    engine.push(lease, frame(0.1))

    assert engine.capacity == 1
    assert said.get(timeout=5)[1].pcm[0] == pytest.approx(0.1)
    engine.close()


def test_an_engine_behind_its_beat_takes_no_new_call_and_keeps_those_it_has(said: Said) -> None:
    class Slow(EchoRunner):
        def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Spoken | None]:
            threading.Event().wait(0.1)
            return super().step(pcm, active)

    engine = running(Slow(rows=2), said)
    assert ready(engine)
    lease = engine.lease(ROLE)
    while engine.refusal is None:
        engine.push(lease, frame(0.1))
        said.get(timeout=5)

    with pytest.raises(EngineFull, match="behind its beat") as full:
        engine.lease(ROLE)
    assert full.value.reason == "behind"
    assert engine.late_ticks >= 3
    assert engine.holds(lease)
    engine.release(lease)
    assert engine.holds(engine.lease(ROLE)), "with nobody there, nobody is harmed"
    engine.close()


class Watched(EchoRunner):
    """Tells in which order, and on which thread, it was given its orders."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.happened: list[str] = []
        self.threads: set[str] = set()
        self.held = threading.Event()
        self.held.set()
        self.stepping = threading.Event()

    def join(self, row: int, role: Role) -> None:
        self._note(f"join {role.name}")

    def leave(self, row: int) -> None:
        self._note("leave")

    def say(self, row: int, text: str, start_within_ms: int | None) -> None:
        self._note(f"say {text} within {start_within_ms}")

    def change(self, row: int, role: Role) -> None:
        self._note(f"change to {role.name}")

    def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Spoken | None]:
        self.stepping.set()
        self.held.wait(10)
        return super().step(pcm, active)

    def _note(self, what: str) -> None:
        self.happened.append(what)
        self.threads.add(threading.current_thread().name)


def test_a_row_is_left_before_it_is_joined_again(said: Said) -> None:
    runner = Watched(rows=1)
    engine = running(runner, said)
    assert ready(engine)
    engine.release(engine.lease(Role("first", "")))
    lease = engine.lease(Role("second", ""))
    engine.push(lease, frame(0.5))
    said.get(timeout=5)

    assert runner.happened == ["join first", "leave", "join second"]
    engine.close()


def test_orders_are_carried_out_in_the_order_they_were_given_and_on_the_engine_thread(said: Said) -> None:
    runner = Watched(rows=1)
    engine = running(runner, said)
    assert ready(engine)
    lease = engine.lease(ROLE)
    assert engine.say(lease, "Good morning.")
    assert engine.change(lease, Role("baker", ""))
    assert engine.say(lease, "One moment.", start_within_ms=400)
    engine.push(lease, frame(0.5))
    said.get(timeout=5)
    engine.release(lease)
    engine.push(engine.lease(Role("next", "")), frame(0.5))
    said.get(timeout=5)
    engine.close()

    assert runner.happened == [
        "join operator",
        "say Good morning. within None",
        "change to baker",
        "say One moment. within 400",
        "leave",
        "join next",
    ]
    assert runner.threads == {"engine"}


def test_what_was_meant_for_a_call_never_reaches_the_next_one_on_its_row(said: Said) -> None:
    """The first call ends in the middle of a tick, with orders of its own still waiting for the tick's end."""
    runner = Watched(rows=1)
    engine = running(runner, said)
    assert ready(engine)
    lease = engine.lease(Role("first", ""))
    runner.held.clear()
    engine.push(lease, frame(0.5))
    assert runner.stepping.wait(5)
    assert engine.say(lease, "Good morning.")
    assert engine.change(lease, Role("baker", ""))
    engine.release(lease)
    second = engine.lease(Role("second", ""))
    assert not engine.say(lease, "Too late.")
    assert not engine.change(lease, Role("late", ""))
    runner.held.set()
    engine.push(second, frame(0.5))
    while said.get(timeout=5)[0] != second:
        pass
    engine.close()

    assert runner.happened == ["join first", "leave", "join second"]


@pytest.mark.parametrize(("text", "start_within_ms"), [("", None), (" \n", 100), ("Hello.", -1)])
def test_words_that_cannot_be_said_are_refused(engine: Engine, text: str, start_within_ms: int | None) -> None:
    with pytest.raises(ValueError, match="start_within_ms"):
        engine.say(engine.lease(ROLE), text, start_within_ms)

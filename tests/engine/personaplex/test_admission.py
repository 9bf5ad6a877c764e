"""How many calls a tick carries: found with few looks, kept for the next start, and never the reason that one fails."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.engine.personaplex.admission import (
    Admission,
    admit,
    calls_in_time,
    kept_or_measured,
    key_of,
    largest_in_time,
)
from app.engine.personaplex.model.lm import Lm, LmState
from app.engine.personaplex.model.mimi import Mimi
from app.engine.personaplex.model.weights import find_checkpoint, load
from app.engine.personaplex.runner import PersonaPlexRunner
from app.engine.personaplex.tick import Tick, widths_for
from app.engine.personaplex.timing import Spread
from app.engine.personaplex.voices import unpack_voices, voice_file
from tests.engine.personaplex.runners import HARBOUR, Call, Stage, same_speech
from tests.engine.tiny import make_tiny_checkpoint, tiny_configs

CPU = torch.device("cpu")
ROWS = 6


@pytest.fixture(scope="module")
def ticking(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tick, LmState]:
    """A tick of several widths, as a GPU's has them."""
    found = find_checkpoint(make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), context=40))
    lm, mimi = Lm(found.lm, CPU, torch.float32), Mimi(found.mimi_config, CPU)
    load(found.model, lm.entries())
    load(found.mimi, mimi.entries())
    mimi.pack()
    state = LmState.of(found.lm, ROWS, CPU, torch.float32)
    tick = Tick(lm, mimi, state, mimi.state(ROWS), graphs=False)
    tick.widths = widths_for(ROWS)
    return tick, state


class Machine:
    """Ticks as long as given for each number of calls; by default 10 ms a call. Counts the looks at it."""

    def __init__(self, *looks: list[float]) -> None:
        self._waiting = list(looks)
        self.looks: list[int] = []

    def __call__(self, calls: int) -> Spread:
        self.looks.append(calls)
        return Spread.of(self._waiting.pop(0) if self._waiting else [10.0 * calls])


# --- in a runner


def measuring(checkpoint: Path, file: Path | None, rows: int = 3) -> PersonaPlexRunner:
    found = find_checkpoint(checkpoint)
    voices = unpack_voices(found.voices, checkpoint / "voices")
    runner = PersonaPlexRunner(
        found, rows, CPU, torch.float32, lambda name: voice_file(voices, name), seed=1, measured=file
    )
    runner.warm_up([HARBOUR])
    return runner


def test_a_call_says_the_same_whether_ticks_were_measured_before_it_or_not(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "ticks.json"
    apart, measured = measuring(tiny, None), measuring(tiny, file)
    said = [Stage(runner).alone(0, Call(1, HARBOUR, 30)) for runner in (apart, measured)]

    assert file.exists()
    assert same_speech(*said)


def test_a_runner_takes_no_more_calls_than_its_tick_carries(tiny: Path, tmp_path: Path) -> None:
    """As an earlier start has found it."""
    file = tmp_path / "ticks.json"
    measuring(tiny, file)
    [key] = json.loads(file.read_text())
    file.write_text(json.dumps({key: {"calls": 2, "p99_ms": 59.0, "most": 3}}))
    runner = measuring(tiny, file)
    said = Stage(runner).alone(1, Call(1, HARBOUR, 5))

    assert runner.rows == 2
    assert len(said) == 5


# --- measuring


def test_ticks_are_really_measured_and_every_row_is_at_the_beginning_again(ticking: tuple[Tick, LmState]) -> None:
    tick, state = ticking
    found, none = (calls_in_time(tick, state, ROWS, budget_ms) for budget_ms in (60_000, 0))

    assert (found.calls, found.most) == (ROWS, ROWS)
    assert 0 < found.p99_ms < 60_000
    assert (none.calls, none.most) == (1, ROWS)
    assert not state.position.any()


@pytest.mark.parametrize(
    ("budget_ms", "calls"), [(61, 6), (60, 4), (41, 4), (40, 2), (21, 2), (20, 1), (10.5, 1), (10, 1), (1, 1)]
)
def test_the_most_calls_that_stay_under_the_budget_are_taken_and_one_always(budget_ms: float, calls: int) -> None:
    machine = Machine()

    assert largest_in_time([1, 2, 4, 6], machine, budget_ms) == (calls, 10.0 * calls)
    assert machine.looks[0] == 6
    assert len(machine.looks) <= 3


def test_many_widths_are_known_after_a_few_looks() -> None:
    machine = Machine()

    assert largest_in_time(widths_for(200), machine, budget_ms=850) == (80, 800.0)
    assert len(machine.looks) <= 5


def test_one_slow_tick_among_quick_ones_is_looked_at_again() -> None:
    """What is slow now and then at both looks is not in time."""
    spoilt, quick = [5.0] * 9 + [500.0], [5.0] * 10

    assert largest_in_time([1, 2], Machine(spoilt, quick)) == (2, 5.0)
    assert largest_in_time([1, 2], Machine(spoilt, spoilt, quick)) == (1, 5.0)


# --- keeping


def found(calls: int, most: int = 6) -> Callable[[], Admission]:
    return lambda: Admission(calls, 10.0 * calls, most)


def unasked() -> Admission:
    raise AssertionError("measured again")


def test_what_was_measured_is_not_measured_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "personaline.engine")
    file = tmp_path / "new" / "ticks.json"
    first = kept_or_measured(file, "H100", 6, found(4))
    again = kept_or_measured(file, "H100", 6, unasked)

    assert first == again == Admission(4, 40.0, 6)
    assert caplog.messages == [
        "4 calls at once: memory allows 6, the tick 4 (p99 40.0 ms of 60, measured)",
        "4 calls at once: memory allows 6, the tick 4 (p99 40.0 ms of 60, measured at an earlier start)",
    ]


def test_a_start_finds_what_the_start_before_it_measured(
    ticking: tuple[Tick, LmState], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "personaline.engine")
    first, again = (admit(*ticking, ROWS, tmp_path / "ticks.json", "CPU") for _ in range(2))

    assert first == again
    said = [message for message in caplog.messages if "memory allows" in message]
    assert [message.endswith("measured at an earlier start)") for message in said] == [False, True]


def test_another_gpu_or_setting_is_measured_for_itself_and_both_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "ticks.json"
    one, other = (kept_or_measured(file, key, 6, found(calls)) for key, calls in (("H100", 5), ("L4", 2)))

    assert [kept_or_measured(file, key, 6, unasked) for key in ("H100", "L4")] == [one, other]
    assert one != other
    assert [path.name for path in tmp_path.iterdir()] == ["ticks.json"]


def test_less_memory_than_last_time_needs_no_measuring_and_more_only_where_the_tick_was_not_the_limit() -> None:
    by_time, by_memory = Admission(48, 55.0, 80), Admission(80, 40.0, 80)

    assert by_time.of(30) == by_time.of(30) == Admission(30, 55.0, 30)
    assert by_time.of(100) == Admission(48, 55.0, 100)
    assert by_memory.of(79) == Admission(79, 40.0, 79)
    assert by_memory.of(81) is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"H100": 3}', '{"H100": {"calls": 3}}', '{"H100": {"calls": 9, "p99_ms": 1, "most": 3}}',
     '{"H100": {"calls": "x", "p99_ms": 1, "most": 3}}', "\xff"],
)  # fmt: skip
def test_a_damaged_file_is_a_line_of_the_log_and_is_made_anew(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "ticks.json"
    file.write_text(content, encoding="latin-1")

    assert kept_or_measured(file, "H100", 6, found(3)).calls == 3
    assert "ticks.json: damaged (" in caplog.text
    assert kept_or_measured(file, "H100", 6, unasked).calls == 3


def test_a_file_that_cannot_be_written_is_a_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")

    assert kept_or_measured(tmp_path / "file" / "ticks.json", "H100", 6, found(3)).calls == 3
    assert "ticks.json: cannot be written (" in caplog.text


def test_even_one_call_too_slow_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept_or_measured(tmp_path / "ticks.json", "T4", 6, lambda: Admission(1, 99.0, 6))

    assert "even one call's tick takes 99.0 ms of the 80 that it has" in caplog.text


def test_the_key_names_all_that_a_tick_depends_on() -> None:
    lm, mimi = tiny_configs()
    usual = (CPU, torch.bfloat16, lm, mimi, "bf16", "int8", True)
    key = key_of(*usual)
    others = [
        key_of(CPU, torch.float16, lm, mimi, "bf16", "int8", True),
        key_of(CPU, torch.bfloat16, replace(lm, context=99), mimi, "bf16", "int8", True),
        key_of(CPU, torch.bfloat16, lm, replace(mimi, n_filters=8), "bf16", "int8", True),
        key_of(CPU, torch.bfloat16, lm, mimi, "int8", "int8", True),
        key_of(CPU, torch.bfloat16, lm, mimi, "bf16", "bf16", True),
        key_of(CPU, torch.bfloat16, lm, mimi, "bf16", "int8", False),
    ]

    assert key == key_of(*usual)
    assert len({key, *others}) == 7
    assert f"torch {torch.__version__}" in key

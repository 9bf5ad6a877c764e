"""The bench of the beat: its simulation by hand-made cases, and one short run of the real thing."""

from collections import deque
from pathlib import Path

import numpy as np
import pytest

from app import bench_beat
from app.bench_beat import ModelRunner, lateness
from app.simulate import beat
from app.simulate.beat import AHEAD_MS, BEAT_MS, Gpu, Lateness, aligned, frames, play, unaligned

GPU = Gpu("test", 10.0, 0.5)
PUNCTUAL = Lateness(0.0)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The carrier's clock is ours."""
    monkeypatch.setattr(beat, "DRIFT", 0.0)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("way", "groups", "rows"), [("1", 1, 8), ("late", 1, 8), ("2", 2, 4), ("4", 4, 2)])
def test_frames_on_time_wait_for_their_lead_and_their_groups_tick(way: str, groups: int, rows: int) -> None:
    phases_ms = [call % groups * BEAT_MS / groups - AHEAD_MS for call in range(8)]
    outcome = play(way, phases_ms, GPU, PUNCTUAL, seconds=20)

    assert outcome.wait_ms == pytest.approx(AHEAD_MS + GPU.tick_ms(rows))
    assert outcome.busy == pytest.approx(groups * GPU.tick_ms(rows) / BEAT_MS, rel=0.02)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("before_ms", [0.5, 7.0, 19.5])
def test_with_the_engines_beat_a_frame_waits_for_one_of_four_ticks(before_ms: float) -> None:
    phases_ms = [20 * call - before_ms for call in range(4)]
    outcome = play("engine", phases_ms, GPU, PUNCTUAL, seconds=20)

    assert outcome.wait_ms == pytest.approx(before_ms + GPU.tick_ms(1))
    assert outcome.busy == pytest.approx(4 * GPU.tick_ms(1) / BEAT_MS, rel=0.02)


@pytest.mark.usefixtures("exact")
def test_where_a_tick_takes_longer_than_its_time_the_engine_steps_as_many_as_there_are() -> None:
    slow = Gpu("slow", 60.0, 1.0)
    outcome = play("engine", unaligned(8), slow, PUNCTUAL, seconds=60)

    assert outcome.busy == pytest.approx(1, abs=0.01)
    assert outcome.p99_ms < 2 * slow.tick_ms(8)


@pytest.mark.usefixtures("exact")
def test_a_gpu_that_never_waits_makes_a_lone_call_wait_for_its_step_alone() -> None:
    assert play("ready", unaligned(1), GPU, PUNCTUAL, seconds=20).wait_ms == pytest.approx(GPU.tick_ms(1))


def test_one_late_packet_makes_the_rest_of_a_call_late_where_all_wait_for_one_tick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one_late(phases_ms: object, lateness: object, until_ms: float, seed: int) -> deque[tuple[float, int]]:
        on_time = [number * BEAT_MS - AHEAD_MS for number in range(1, 200)]
        return deque((at_ms + (15 if number == 20 else 0), 0) for number, at_ms in enumerate(on_time))

    monkeypatch.setattr(beat, "frames", one_late)
    one, late, engine = (play(way, [0.0], GPU, PUNCTUAL, seconds=15) for way in ("1", "late", "engine"))

    assert one.p99_ms == pytest.approx(AHEAD_MS + BEAT_MS + GPU.tick_ms(1))
    assert one.wait_ms > AHEAD_MS + BEAT_MS / 2
    assert late.wait_ms == pytest.approx(AHEAD_MS + GPU.tick_ms(1), abs=0.2)
    assert engine.wait_ms == pytest.approx(AHEAD_MS + GPU.tick_ms(1), abs=0.2)


def test_aligned_calls_are_complete_before_their_groups_tick_and_at_most_a_packet_sooner() -> None:
    for call, phase_ms in enumerate(aligned(50, groups=4)):
        assert AHEAD_MS <= call % 4 * 20 - phase_ms <= AHEAD_MS + 20


def test_frames_come_in_the_order_of_their_time_and_of_each_call_in_its_own() -> None:
    found = frames(unaligned(5), Lateness(2.0, 0.2, 200.0), 10_000, seed=3)

    assert list(found) == sorted(found)
    assert {call for _, call in found} == set(range(5))
    assert {sum(call == one for _, call in found) for one in range(5)} <= {124, 125, 126}


@pytest.mark.parametrize("late_ms", [0.0, 1.0, 9.0, 14.5])
@pytest.mark.parametrize("which", [0, 50])
def test_lateness_is_told_from_where_ticks_began(late_ms: float, which: int) -> None:
    began_s = np.linspace(12.3456, 12.3456 + 0.08 * 99, 100)
    began_s[which] += late_ms / 1000

    found = lateness(began_s)
    assert found[which] == pytest.approx(late_ms / 1000, abs=1e-9)
    assert np.delete(found, which) == pytest.approx(0, abs=1e-9)


def test_the_modelled_runner_notes_its_ticks_whether_or_not_anybody_speaks(tmp_path: Path) -> None:
    runner = ModelRunner(2, 0.01, tmp_path / "ticks.npy")
    runner.warm_up([])
    pcm, active = np.ones((2, 1_920), np.float32), np.array([True, False])
    spoken = runner.step(pcm, active)
    runner.between()
    runner.between()
    runner.close()

    assert [one is not None for one in spoken] == [True, False]
    began_s, took_s, gpu_s = np.load(tmp_path / "ticks.npy").T
    assert gpu_s.tolist() == pytest.approx([0.006, 0.01])
    assert (took_s >= gpu_s).all()
    assert began_s[1] > began_s[0] + took_s[0]


def test_ways_are_told_as_markdown() -> None:
    lines = bench_beat.ways([1, 4], [GPU], seconds=5)

    assert [line.count("|") for line in lines if line.startswith("|")] == [4] * (2 + len(bench_beat.WAYS))


async def test_the_bench_measures_the_engine_in_both_places_with_live_calls(tmp_path: Path) -> None:
    rows = await bench_beat.bench_beat([2], 1.0, 0.8, 1, tmp_path, lambda text: None)

    assert [(row.engine, row.calls) for row in rows] == [("thread", 2), ("process", 2)]
    assert all(0 < row.host_ms[0] <= row.host_ms[1] <= row.host_ms[2] for row in rows)
    lines = bench_beat.table(rows, 1.0, 1)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1

"""The beat, with its times given."""

import pytest

from app.engine.beat import BEHIND_TICKS, Beat

EPOCH_S = 1_000.0


def played(ticks_ms: list[float], looks_ms: float = 0.0) -> tuple[Beat, list[tuple[float, bool]]]:
    """A beat whose ticks and looks take so long: when each began, in ms, and if it was a tick."""
    beat = Beat(EPOCH_S)
    beat.begin(EPOCH_S + 0.001)
    now_s, began = EPOCH_S + 0.001, list[tuple[float, bool]]()
    costs = iter(ticks_ms)
    while True:
        began_s = now_s = max(now_s, beat.next_s)
        cost_ms = next(costs, None) if beat.on_tick else looks_ms
        if cost_ms is None:
            return beat, began
        now_s += cost_ms / 1000
        began.append((round((began_s - EPOCH_S) * 1000, 3), beat.on_tick))
        beat.ended(began_s, now_s)


def ticks(began: list[tuple[float, bool]]) -> list[float]:
    return [at_ms for at_ms, is_tick in began if is_tick]


def test_ticks_are_eighty_milliseconds_apart_with_looks_between() -> None:
    _, began = played([5.0, 5.0])

    assert began == [
        (80, True), (100, False), (120, False), (140, False),
        (160, True), (180, False), (200, False), (220, False),
    ]  # fmt: skip


def looks(began: list[tuple[float, bool]]) -> list[float]:
    return [at_ms for at_ms, is_tick in began if not is_tick]


def test_a_long_tick_is_followed_by_the_looks_that_it_left_time_for() -> None:
    assert looks(played([30.0])[1]) == [110, 120, 140]
    assert looks(played([70.0], looks_ms=1.0)[1]) == [150, 151, 152]
    assert looks(played([80.0])[1]) == [160, 160, 160]
    assert looks(played([81.0])[1]) == []


def test_a_look_is_taken_only_if_one_as_long_as_the_longest_would_be_over_before_the_tick() -> None:
    _, began = played([45.0, 45.0, 45.0], looks_ms=30.0)

    assert looks(began) == [125, 205, 285]
    assert ticks(began) == [80, 160, 240]


def test_a_look_that_made_a_tick_late_is_not_soon_tried_again() -> None:
    _, began = played([45.0] * 400, looks_ms=60.0)

    assert looks(began)[0] == 125
    assert ticks(began)[:3] == [80, 185, 240]
    assert len(looks(began)) == 1
    assert len(looks(played([45.0] * 1_000, looks_ms=60.0)[1])) == 2


def test_a_late_tick_is_followed_at_once_by_the_next_until_the_beat_is_caught_up() -> None:
    beat, began = played([190.0, 10.0, 10.0, 10.0])

    assert ticks(began) == [80, 270, 280, 320]
    assert beat.late_ticks == 2
    assert ticks(began)[-1] % 80 == 0


def test_a_stall_of_more_than_four_beats_is_not_caught_up_tick_by_tick() -> None:
    _, began = played([1_000.0, 1.0, 1.0])

    assert ticks(began) == [80, 1_080, 1_120]


@pytest.mark.parametrize(("late", "behind"), [(1, False), (BEHIND_TICKS - 1, False), (BEHIND_TICKS, True)])
def test_one_late_tick_is_an_accident_and_several_are_being_behind(late: int, behind: bool) -> None:
    beat, began = played([85.0] * late)
    now_s = EPOCH_S + began[-1][0] / 1000 + 0.085

    assert beat.late_ticks == late
    assert beat.behind(now_s) is behind
    assert not beat.behind(now_s + 2.1)


def test_late_ticks_that_lie_far_apart_are_each_an_accident() -> None:
    beat, began = played(([85.0] + [1.0] * 14) * 5)

    assert beat.late_ticks == 5
    assert not beat.behind(EPOCH_S + began[-1][0] / 1000)


@pytest.mark.parametrize("after_ms", [0.0, 0.5, 79.5, 80.5, 12_345.6])
def test_the_next_tick_is_never_further_than_one_beat_and_never_now(after_ms: float) -> None:
    until_s = Beat(EPOCH_S).until_tick_s(EPOCH_S + after_ms / 1000)

    assert 0 < until_s <= 0.08
    assert (after_ms / 1000 + until_s) % 0.08 == pytest.approx(0, abs=1e-6) or (
        after_ms / 1000 + until_s
    ) % 0.08 == pytest.approx(0.08, abs=1e-6)

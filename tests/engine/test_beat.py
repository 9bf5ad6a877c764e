"""The beat, with its times given."""

import pytest

from app.engine.beat import BEHIND_TICKS, Beat

EPOCH_S = 1_000.0


def played(ticks_ms: list[float]) -> tuple[Beat, list[tuple[float, bool]]]:
    """A beat whose ticks take so long: when each began, in ms, and if it was the first of its beat."""
    beat = Beat(EPOCH_S)
    beat.begin(EPOCH_S + 0.001)
    now_s, began = EPOCH_S + 0.001, list[tuple[float, bool]]()
    for cost_ms in ticks_ms:
        began_s = max(now_s, beat.due_s)
        began.append((round((began_s - EPOCH_S) * 1000, 3), beat.on_beat))
        now_s = began_s + cost_ms / 1000
        beat.ended(began_s, now_s)
    return beat, began


def times(began: list[tuple[float, bool]]) -> list[float]:
    return [at_ms for at_ms, _ in began]


def test_ticks_are_twenty_milliseconds_apart_and_every_fourth_begins_a_beat() -> None:
    _, began = played([5.0] * 2_000)

    assert times(began) == pytest.approx([20.0 * number for number in range(1, 2_001)])
    assert [at_ms % 80 for at_ms, first in began[1:] if first] == pytest.approx([0.0] * 500)


def test_a_tick_that_takes_longer_is_followed_at_once_by_the_next_which_takes_the_place_of_those_missed() -> None:
    _, began = played([5.0, 33.0, 5.0, 5.0, 5.0])

    assert times(began) == [20, 40, 73, 80, 100]


def test_a_beat_whose_first_tick_was_missed_begins_with_the_next() -> None:
    _, began = played([1.0, 1.0, 1.0, 95.0, 1.0, 1.0, 1.0])

    assert began[3:] == [(80, True), (175, True), (180, False), (200, False)]
    assert [first for _, first in played([50.0] * 9)[1]] == [True, False, True, True, False, True, True, False, True]


def test_a_stall_is_not_made_up_for_tick_by_tick() -> None:
    _, began = played([1.0, 1_000.0, 1.0, 1.0])

    assert times(began) == [20, 40, 1_040, 1_060]


@pytest.mark.parametrize(("late", "behind"), [(1, False), (BEHIND_TICKS - 1, False), (BEHIND_TICKS, True)])
def test_one_late_tick_is_an_accident_and_several_are_being_behind(late: int, behind: bool) -> None:
    beat, began = played([85.0] * late)
    now_s = EPOCH_S + began[-1][0] / 1000 + 0.085

    assert beat.late_ticks == late
    assert beat.behind(now_s) is behind
    assert not beat.behind(now_s + 2.1)


def test_late_ticks_that_lie_far_apart_are_each_an_accident() -> None:
    beat, began = played(([85.0] + [1.0] * 60) * 5)

    assert beat.late_ticks == 5
    assert not beat.behind(EPOCH_S + began[-1][0] / 1000)


def test_ticks_that_follow_each_other_without_a_rest_are_not_late() -> None:
    beat, _ = played([79.0] * 100)

    assert beat.late_ticks == 0


def test_a_tick_that_begins_more_than_a_beat_late_is_late_however_short() -> None:
    beat = Beat(EPOCH_S)
    beat.begin(EPOCH_S + 0.001)
    beat.ended(EPOCH_S + 0.103, EPOCH_S + 0.104)

    assert beat.late_ticks == 1

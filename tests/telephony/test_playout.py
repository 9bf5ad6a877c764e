"""The carrier's buffer by our clock, with its times given."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telephony.playout import AHEAD_MAX_MS, LEAD_MS, UNREST_MS, Playout


def test_what_was_sent_is_played_as_time_passes_and_then_nothing_is_left() -> None:
    playout = Playout()
    assert playout.held_ms(100.0) == 0
    playout.sent(60, 100.0)
    playout.sent(80, 100.0)

    assert playout.held_ms(100.0) == pytest.approx(140)
    assert playout.held_ms(100.05) == pytest.approx(90)
    assert playout.held_ms(101.0) == 0
    playout.sent(80, 101.0)
    assert playout.held_ms(101.0) == pytest.approx(80), "time in which nothing was there to play is not made up for"


def test_what_was_flushed_is_held_no_more() -> None:
    playout = Playout()
    playout.sent(200, 5.0)
    playout.flushed(5.1)
    playout.sent(80, 5.1)

    assert playout.held_ms(5.1) == pytest.approx(80)


def test_the_carrier_is_given_no_more_than_the_bound() -> None:
    playout = Playout()
    sent = 0
    while playout.takes(80, 7.0):
        playout.sent(80, 7.0)
        sent += 80

    assert sent == 160
    assert not playout.takes(80, 7.01)
    assert playout.takes(80, 7.021)


@pytest.mark.parametrize(
    ("held_ms", "waiting_ms", "surplus_ms"),
    [(0, 0, -60), (45, 0, 0), (60, 0, 0), (75, 0, 0), (85, 0, 25), (0, 80, 20), (140, 240, 320)],
)
def test_the_surplus_is_all_that_would_make_the_next_words_late_but_for_the_beats_own_unrest(
    held_ms: float, waiting_ms: float, surplus_ms: float
) -> None:
    playout = Playout()
    playout.sent(held_ms, 9.0)

    assert playout.surplus_ms(waiting_ms, 9.0) == pytest.approx(surplus_ms)


@given(st.lists(st.tuples(st.floats(0, 0.4), st.booleans()), max_size=80))
def test_whatever_the_delays_the_bound_holds_and_quiet_frames_bring_the_lead_back(
    frames: list[tuple[float, bool]],
) -> None:
    """Each frame comes so long after the one before; those that are quiet are sent as the surplus says."""
    playout, now_s = Playout(), 50.0
    for delay_s, quiet in frames:
        now_s += delay_s
        surplus_ms = playout.surplus_ms(0, now_s)
        if quiet:
            playout.sent(max(0.0, 80 - surplus_ms), now_s)
            assert playout.held_ms(now_s) <= AHEAD_MAX_MS
            if surplus_ms <= 80:
                assert playout.held_ms(now_s) == pytest.approx(LEAD_MS + 80, abs=UNREST_MS + 1e-6)
        elif playout.takes(80, now_s):
            playout.sent(80, now_s)
        assert playout.held_ms(now_s) <= AHEAD_MAX_MS + 1e-6

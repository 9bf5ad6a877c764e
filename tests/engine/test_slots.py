import numpy as np
import pytest

from app.engine import FRAME_SAMPLES, EngineFull
from app.engine.slots import INBOX_FRAMES, SlotTable

SILENCE = np.zeros(FRAME_SAMPLES, np.float32)


def frame(value: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.full(FRAME_SAMPLES, value, np.float32)


def taken(slots: SlotTable) -> tuple[list[float], list[bool]]:
    pcm, active = np.zeros((slots.capacity, FRAME_SAMPLES), np.float32), np.zeros(slots.capacity, np.bool_)
    slots.take(pcm, active)
    return [float(row[0]) for row in pcm], active.tolist()


def test_a_late_frame_never_reaches_the_next_caller() -> None:
    """The row changes hands while the first caller's last frame is still in flight."""
    slots = SlotTable(capacity=1)
    first = slots.lease()
    slots.release(first)
    second = slots.lease()

    assert second.row == first.row
    assert not slots.push(first, SILENCE)
    assert slots.push(second, SILENCE)
    assert not slots.holds(first)


def test_what_waited_for_one_caller_is_gone_when_the_row_is_leased_again() -> None:
    slots = SlotTable(capacity=1)
    first = slots.lease()
    slots.push(first, frame(0.5))
    slots.release(first)
    slots.lease()

    assert taken(slots) == ([0.0], [False])


def test_a_full_house_refuses_the_next_caller_until_somebody_leaves() -> None:
    slots = SlotTable(capacity=2)
    first = slots.lease()
    slots.lease()

    with pytest.raises(EngineFull, match="all 2 rows"):
        slots.lease()
    assert slots.release(first)
    assert slots.lease().row == first.row


def test_a_lease_ends_once() -> None:
    slots = SlotTable(capacity=1)
    lease = slots.lease()

    assert slots.release(lease)
    assert not slots.release(lease)
    assert slots.in_use == 0


def test_each_row_gives_its_oldest_frame_and_rows_without_one_are_not_active() -> None:
    slots = SlotTable(capacity=3)
    first, _, third = slots.lease(), slots.lease(), slots.lease()
    slots.push(first, frame(0.1))
    slots.push(first, frame(0.2))
    slots.push(third, frame(0.3))

    assert taken(slots)[1] == [True, False, True]
    assert taken(slots)[0][0] == pytest.approx(0.2)


def test_an_inbox_nobody_empties_keeps_the_newest_frames_and_counts_the_rest() -> None:
    slots = SlotTable(capacity=1)
    lease = slots.lease()
    for number in range(INBOX_FRAMES + 3):
        slots.push(lease, frame(number))

    assert slots.dropped_frames == 3
    assert taken(slots)[0] == [3.0]

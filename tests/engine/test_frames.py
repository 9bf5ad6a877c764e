"""Both ends of the rings, here in one process."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine import FRAME_SAMPLES, Lease
from app.engine.contract import Pcm
from app.engine.frames import RING_FRAMES, FrameRings, RingTable
from app.engine.slots import INBOX_FRAMES, SlotTable


@pytest.fixture
def rings() -> Iterator[FrameRings]:
    made = FrameRings(rows=3)
    yield made
    made.close()


def frame(value: float) -> Pcm:
    return np.full(FRAME_SAMPLES, value, np.float32)


def taken(table: SlotTable | RingTable) -> dict[Lease, float]:
    pcm, active = np.zeros((table.capacity, FRAME_SAMPLES), np.float32), np.zeros(table.capacity, np.bool_)
    leases = table.take(pcm, active)
    assert sorted(lease.row for lease in leases) == np.flatnonzero(active).tolist()
    return {lease: float(pcm[lease.row, 0]) for lease in leases}


def test_what_one_side_writes_the_other_reads_bit_for_bit_past_the_rings_wrap(rings: FrameRings) -> None:
    there, into = FrameRings(3, rings.name), np.zeros(FRAME_SAMPLES, np.float32)
    noise = np.random.default_rng(1)
    for row in (2, 0):
        for number in range(3 * RING_FRAMES):
            frame = noise.standard_normal(FRAME_SAMPLES).astype(np.float32)
            assert rings.write([(Lease(row, 5), frame)]) == [number]
            assert there.read(Lease(row, 5), number, into)
            np.testing.assert_array_equal(into, frame)
    assert there.written().tolist() == [3 * RING_FRAMES, 0, 3 * RING_FRAMES]
    there.close()


def test_a_frame_that_was_overwritten_or_is_another_leases_cannot_be_read(rings: FrameRings) -> None:
    into = np.zeros(FRAME_SAMPLES, np.float32)
    for number in range(RING_FRAMES):
        rings.write([(Lease(0, 1), frame(number))])

    assert not rings.read(Lease(0, 1), 0, into), "the writer may be upon it now"
    assert rings.read(Lease(0, 1), 1, into)
    assert not rings.read(Lease(0, 2), 1, into)


def test_a_lease_that_is_told_of_after_its_first_frames_loses_none_of_them(rings: FrameRings) -> None:
    old, new = Lease(0, 1), Lease(0, 2)
    table = RingTable(rings, 3)
    table.hold(old)
    rings.write([(old, frame(0.1))])
    rings.write([(new, frame(0.2))])
    rings.write([(new, frame(0.3))])

    assert taken(table) == {old: pytest.approx(0.1)}
    assert taken(table) == {}, "the next frame is of a lease that is yet to come"
    table.release(old)
    assert taken(table) == {}
    table.hold(new)
    assert [taken(table), taken(table), taken(table)] == [{new: pytest.approx(0.2)}, {new: pytest.approx(0.3)}, {}]
    assert table.dropped_frames == 0


def test_what_waited_for_one_caller_is_gone_when_the_row_is_leased_again(rings: FrameRings) -> None:
    table = RingTable(rings, 3)
    table.hold(Lease(1, 1))
    for _ in range(RING_FRAMES + 2):
        rings.write([(Lease(1, 1), frame(0.5))])
    table.release(Lease(1, 1))
    table.hold(Lease(1, 2))

    assert taken(table) == {}
    assert table.dropped_frames == 0, "nobody's frame was missed"


def test_a_table_that_begins_late_passes_over_what_was_there(rings: FrameRings) -> None:
    rings.write([(Lease(0, 1), frame(0.5))])
    table = RingTable(rings, 2)

    assert taken(table) == {}


def test_a_runner_with_more_rows_than_rings_is_refused(rings: FrameRings) -> None:
    with pytest.raises(ValueError, match="4 rows, and there are rings for 3"):
        RingTable(rings, 4)


@given(st.lists(st.sampled_from(["push", "push", "push", "take", "renew"]), max_size=60), st.integers(0, 2))
def test_a_table_on_rings_does_what_a_table_of_inboxes_does(steps: list[str], row: int) -> None:
    """Frames pushed, taken and dropped, and the row passed on, in any order and past the wrap."""
    rings, plain = FrameRings(rows=3), SlotTable(3)
    table, lease = RingTable(rings, 3), Lease(row, 1)
    for both in (table, plain):
        both.hold(lease)
    for number, step in enumerate(steps, 1):
        if step == "push":
            rings.write([(lease, frame(number))])
            assert plain.push(lease, frame(number))
        elif step == "take":
            assert taken(table) == taken(plain)
        else:
            # Dropped frames are counted when they are found missing; a lease that has ended misses none.
            assert [both.release(lease) for both in (table, plain)] == [True, True]
            lease = Lease(row, lease.ticket + 1)
            for both in (table, plain):
                both.hold(lease)
    for _ in range(INBOX_FRAMES + 1):
        assert taken(table) == taken(plain)
    if "renew" not in steps:
        assert table.dropped_frames == plain.dropped_frames
    rings.close()

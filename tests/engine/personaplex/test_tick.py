"""A tick of some first rows, and what lets it be captured: no word from the host, and nothing that moves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from app.engine.contract import FRAME_SAMPLES
from app.engine.personaplex.model import rows
from app.engine.personaplex.model.config import LmConfig, MimiConfig
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.mimi import Mimi
from app.engine.personaplex.model.ring import Kv
from app.engine.personaplex.model.weights import find_checkpoint, load
from app.engine.personaplex.tick import TEXT_RANKS, Tick, widths_for

META, CPU = torch.device("meta"), torch.device("cpu")
ROWS = 5


def tick_of(checkpoint: Path, count: int = ROWS) -> tuple[Tick, LmState]:
    """Rows that choose freely, each its own seed, as a runner sets them up."""
    found = find_checkpoint(checkpoint)
    lm, mimi = Lm(found.lm, CPU, torch.float32), Mimi(found.mimi_config, CPU)
    load(found.model, lm.entries())
    load(found.mimi, mimi.entries())
    mimi.pack()
    state = LmState.of(found.lm, count, CPU, torch.float32)
    state.choice.seed.copy_(torch.arange(count))
    state.choice.text_temperature.fill_(0.7)
    state.choice.text_top_k.fill_(25)
    state.choice.audio_temperature.fill_(0.8)
    state.choice.audio_top_k.fill_(50)
    return Tick(lm, mimi, state, mimi.state(count), graphs=True), state


def heard(frame: int, count: int = ROWS) -> NDArray[np.float32]:
    noise = np.random.default_rng(frame).standard_normal((count, FRAME_SAMPLES))
    return (0.1 * noise).astype(np.float32)


def test_a_tick_of_some_first_rows_says_what_a_tick_of_all_does(tiny: Path) -> None:
    """And moves the same state, also when the number of rows changes between ticks."""
    (whole, one), (narrow, other) = tick_of(tiny), tick_of(tiny)
    narrow.widths = widths_for(ROWS)
    assert narrow.widths == (1, 2, 4, ROWS)
    for frame, who in enumerate([[0], [0, 1], [0, 1, 3], [1], [0, 4], [0, 1, 2, 3, 4], [0], [2]]):
        active = np.isin(np.arange(ROWS), who)
        right, found = (tick(heard(frame), active, Reach(frame + 1, 25, 50)) for tick in (whole, narrow))
        for all_rows, first_rows in zip(right, found, strict=True):
            np.testing.assert_allclose(np.asarray(first_rows)[active], np.asarray(all_rows)[active], atol=1e-5)

    assert other.position.equal(one.position)
    for row, length in enumerate(one.position.tolist()):
        # A row that skips a tick may hold anything in the slot that it will write next.
        for state in (one, other):
            state.kv.values[row, :, :, :, length:] = 0
            state.history[row, length:] = 0
    for ours, theirs in zip(rows.leaves(other), rows.leaves(one), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_more_ranks_than_any_row_asks_for_choose_the_same_tokens(tiny: Path) -> None:
    """A captured tick ranks for the freest row there could be."""
    (asked, _), (widest, state) = tick_of(tiny), tick_of(tiny)
    active = np.ones(ROWS, np.bool_)
    most = Reach(state.kv.slots, TEXT_RANKS, 2048)
    for frame in range(12):
        right, found = asked(heard(frame), active, Reach(frame + 1, 25, 50)), widest(heard(frame), active, most)
        assert found[1].tolist() == right[1].tolist()
        np.testing.assert_allclose(found[0], right[0], atol=1e-5)


def test_what_a_tick_gives_is_not_overwritten_by_the_next(tiny: Path) -> None:
    tick, _ = tick_of(tiny)
    active = np.ones(ROWS, np.bool_)
    first = tick(heard(0), active, Reach(1, 25, 50))
    kept = [np.array(array) for array in first]
    tick(heard(1), active, Reach(2, 25, 50))

    assert all(np.array_equal(np.asarray(now), then) for now, then in zip(first, kept, strict=True))


def test_frames_for_fewer_rows_than_there_are_move_only_those(tiny: Path) -> None:
    tick, state = tick_of(tiny)
    tick(heard(0), np.ones(ROWS, np.bool_), Reach(1, 25, 50))
    tick(heard(1, 3), np.array([True, False, True]), Reach(2, 25, 50))

    assert state.position.tolist() == [2, 1, 2, 1, 1]


@pytest.mark.parametrize("kv", ["bf16", "int8", "fp8"])
def test_a_whole_tick_of_the_real_model_asks_nothing_of_the_device_and_moves_nothing(kv: Kv) -> None:
    """What a CUDA graph needs: on the meta device whatever is read back is an error."""
    lm, mimi = Lm(LmConfig(), META, torch.bfloat16), Mimi(MimiConfig(), META)
    mimi.pack()
    states = LmState.of(lm.config, 3, META, torch.bfloat16, kv), mimi.state(3)
    tick = Tick(lm, mimi, *states, graphs=True)
    before = [id(tensor) for state in states for tensor in rows.leaves(state)]

    for width in (1, 2, 3):
        tick._step(width, Reach(lm.config.ring, TEXT_RANKS, lm.config.card))

    assert [id(tensor) for state in states for tensor in rows.leaves(state)] == before


def test_every_number_of_rows_has_a_width_that_is_not_much_wider() -> None:
    for most in (1, 3, 75, 150, 256):
        widths = widths_for(most)
        assert widths[-1] == most
        for count in range(1, most + 1):
            assert min(width for width in widths if width >= count) <= count * 2

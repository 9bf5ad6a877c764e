from dataclasses import fields
from math import prod
from typing import Any

import pytest
import torch

from app.engine.personaplex.model.config import CODEBOOKS, LmConfig, MimiConfig
from app.engine.personaplex.model.lm import Lm, LmState
from app.engine.personaplex.model.mimi import Mimi
from app.engine.personaplex.sizes import (
    RESERVE_BYTES,
    Footprint,
    codec_elements,
    codec_row_bytes,
    footprint,
    lm_elements,
    rows_that_fit,
)
from tests.engine.tiny import lm_shapes, mimi_shapes, tiny_configs

REAL = (LmConfig(), MimiConfig())
META = torch.device("meta")
"""Tensors with shapes and no memory behind them."""


def held_bytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.nbytes
    return sum(held_bytes(getattr(state, field.name)) for field in fields(state))


def test_the_real_model_takes_the_published_sizes() -> None:
    """Parameters and bytes as counted from the published checkpoint's tensors."""
    lm, mimi = REAL
    found = footprint(lm, mimi, element_bytes=2)

    assert lm_elements(lm, lm.dep_q) == 8_371_408_896
    assert lm_elements(lm, CODEBOOKS) == 7_687_729_152
    assert found.weights_bytes == 15_375_458_304
    assert found.prefix_bytes_per_frame == 524_288
    assert codec_elements(mimi, mimi.codebooks_in_file) + mimi.codebooks_in_file == 96_151_393


def test_a_call_takes_its_ring_its_history_and_its_codec_streams() -> None:
    lm, mimi = REAL
    row_bytes = footprint(lm, mimi, element_bytes=2).row_bytes
    parts = 2_999 * 524_288 + 2_999 * 17 * 4 + codec_row_bytes(mimi)

    assert parts < row_bytes < parts + 64 * 1024
    # The published codec keeps 250 slots a ring; one of them is never seen.
    assert codec_row_bytes(mimi) == pytest.approx(16.48e6, rel=0.005)


@pytest.mark.parametrize(("lm", "mimi"), [REAL, tiny_configs(), tiny_configs(context=24)])
def test_sizes_agree_with_the_keys_of_the_files(lm: LmConfig, mimi: MimiConfig) -> None:
    flags = mimi.codebooks_in_file

    assert lm_elements(lm, lm.dep_q) == sum(map(prod, lm_shapes(lm).values()))
    assert codec_elements(mimi, mimi.codebooks_in_file) == sum(map(prod, mimi_shapes(mimi).values())) - flags


@pytest.mark.parametrize(("lm", "mimi"), [REAL, tiny_configs(), tiny_configs(context=24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_agree_with_what_the_networks_allocate(lm: LmConfig, mimi: MimiConfig, dtype: torch.dtype) -> None:
    found = footprint(lm, mimi, dtype.itemsize)
    language, codec = Lm(lm, META, dtype).entries(), Mimi(mimi, META).entries()
    codec_bytes = held_bytes(Mimi(mimi, META).state(1))
    state_bytes = held_bytes(LmState.of(lm, 1, META, dtype)) + codec_bytes

    assert found.weights_bytes == sum(entry.into.nbytes for entry in language.values() if entry.into is not None)
    assert found.codec_weights_bytes == sum(entry.into.nbytes for entry in codec.values() if entry.into is not None)
    assert codec_row_bytes(mimi) == codec_bytes
    assert 0 <= found.row_bytes - state_bytes < 16 * 1024


def test_wider_numbers_take_twice_the_room_but_the_codec_stays() -> None:
    narrow, wide = footprint(*REAL, element_bytes=2), footprint(*REAL, element_bytes=4)

    assert wide.weights_bytes == 2 * narrow.weights_bytes
    assert wide.prefix_bytes_per_frame == 2 * narrow.prefix_bytes_per_frame
    assert wide.codec_weights_bytes == narrow.codec_weights_bytes


def test_the_workspace_holds_four_rows_being_made_anew_the_prompts_kept_ready_and_little_else() -> None:
    found = footprint(*REAL, element_bytes=2)
    frames = 4 * (150 + 500) + 1_200

    assert frames * 524_288 < found.workspace_bytes < frames * 524_288 + 2**28


def test_as_many_calls_fit_as_leave_the_reserve_free() -> None:
    found = Footprint(
        weights_bytes=15, codec_weights_bytes=5, row_bytes=10, prefix_bytes_per_frame=1, workspace_bytes=30
    )

    assert found.needed_bytes(3) == RESERVE_BYTES + 80
    assert rows_that_fit(found, RESERVE_BYTES + 79) == 2
    assert rows_that_fit(found, RESERVE_BYTES + 80) == 3
    assert rows_that_fit(found, RESERVE_BYTES + 89) == 3


def test_no_call_fits_where_not_even_the_weights_do() -> None:
    found = footprint(*REAL, element_bytes=2)

    assert rows_that_fit(found, 0) == 0
    assert rows_that_fit(found, found.needed_bytes(0)) == 0
    assert rows_that_fit(found, found.needed_bytes(1)) == 1

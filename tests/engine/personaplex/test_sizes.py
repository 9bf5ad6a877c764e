import weakref
from collections.abc import Callable
from dataclasses import fields
from math import prod
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.engine.personaplex.model.config import CODEBOOKS, LmConfig, MimiConfig
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.mimi import Mimi
from app.engine.personaplex.model.ops import Plain
from app.engine.personaplex.model.quantize import Weights
from app.engine.personaplex.model.ring import Kv, Layer
from app.engine.personaplex.sizes import (
    COPIES,
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
@pytest.mark.parametrize("weights", get_args(Weights))
@pytest.mark.parametrize("kv", get_args(Kv))
def test_sizes_agree_with_what_the_networks_allocate(
    lm: LmConfig, mimi: MimiConfig, dtype: torch.dtype, weights: Weights, kv: Kv
) -> None:
    found = footprint(lm, mimi, dtype.itemsize, weights, kv)
    language, codec = Lm(lm, META, dtype, weights).entries(), Mimi(mimi, META).entries()
    codec_bytes = held_bytes(Mimi(mimi, META).state(1))
    state_bytes = held_bytes(LmState.of(lm, 1, META, dtype, kv)) + codec_bytes

    assert found.weights_bytes == sum(entry.into.nbytes for entry in language.values() if entry.into is not None)
    assert found.codec_weights_bytes == sum(entry.into.nbytes for entry in codec.values() if entry.into is not None)
    assert codec_row_bytes(mimi) == codec_bytes
    assert 0 <= found.row_bytes - state_bytes < 16 * 1024


def test_the_real_model_in_a_byte_a_number_takes_about_half() -> None:
    """Large matrices in a byte a number, the others in two; 0.81 GB of keys and values a call."""
    found = footprint(*REAL, 2, "int8", "int8")
    large = 32 * (4 * 4_096**2 + 3 * 4_096 * 11_264) + 48 * (4 * 1_024**2 + 3 * 1_024 * 2_816) + 8 * 1_024 * 4_096
    keys = 2 * 32 * (4_096 + 32 * 4)

    assert found.weights_bytes == pytest.approx(large + 2 * (7_687_729_152 - large), rel=0.001)
    assert found.prefix_bytes_per_frame == keys
    assert 2_999 * keys == pytest.approx(0.811e9, rel=0.001)
    assert found == footprint(*REAL, 2, "fp8", "fp8")
    half = footprint(*REAL, 2, "int4").weights_bytes
    assert half == pytest.approx((0.5 + 4 / 128) * large + 2 * (7_687_729_152 - large), rel=0.001)


class Peak(TorchDispatchMode):
    """The most bytes that lived at once among tensors made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most_bytes = self._bytes = 0
        self._sizes: dict[int, int] = {}
        self._given: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tensors_in((args, kwargs)):
            if tensor.untyped_storage()._cdata not in self._sizes:
                self._sizes[tensor.untyped_storage()._cdata] = 0
                self._given.append(tensor)
        made = func(*args, **kwargs or {})
        for tensor in tensors_in(made):
            self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._sizes:
            return
        self._sizes[place] = size
        self._bytes += size
        self.most_bytes = max(self.most_bytes, self._bytes)
        weakref.finalize(storage, self._drop, place)

    def _drop(self, place: int) -> None:
        self._bytes -= self._sizes.pop(place)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class NoAttention(Plain):
    """Plain attention widens a layer's keys, a hundred megabytes a row; a GPU's kernel makes nothing of the kind."""

    def attend(self, q: torch.Tensor, cache: Layer, held: torch.Tensor, reach: int) -> torch.Tensor:
        return q.flatten(1)


@pytest.mark.parametrize("rows", [2, 8])
def test_a_step_of_the_real_model_makes_no_more_than_is_counted_for_it(rows: int) -> None:
    """Counted on tensors without memory."""
    lm, mimi = Lm(REAL[0], META, torch.bfloat16), Mimi(REAL[1], META)
    mimi.pack()
    lm.transformer._ops = NoAttention()
    state, streams = LmState.of(REAL[0], rows, META, torch.bfloat16), mimi.state(rows)
    pcm, active = torch.empty(rows, 1_920, device=META), torch.empty(rows, dtype=torch.bool, device=META)
    with Peak() as heard:
        codes = mimi.encode(streams, pcm, active)
    with Peak() as thought:
        frame = lm.step(state, codes, active, Reach(2_999, 1_000, 2_048))
    with Peak() as said:
        mimi.decode(streams, frame[:, 1:], active)

    peaks = [peak.most_bytes / rows for peak in (heard, thought, said)]
    counted = footprint(*REAL, 2).step_bytes_per_row
    assert 0.9 * counted < max(peaks) < counted


def test_wider_numbers_take_twice_the_room_but_the_codec_stays() -> None:
    narrow, wide = footprint(*REAL, element_bytes=2), footprint(*REAL, element_bytes=4)

    assert wide.weights_bytes == 2 * narrow.weights_bytes
    assert wide.prefix_bytes_per_frame == 2 * narrow.prefix_bytes_per_frame
    assert wide.codec_weights_bytes == narrow.codec_weights_bytes
    assert wide.step_bytes_per_row == narrow.step_bytes_per_row


def test_the_workspace_holds_the_prompts_kept_ready_and_little_else_and_a_copy_is_650_frames() -> None:
    found = footprint(*REAL, element_bytes=2)

    assert found.copy_bytes == 650 * 524_288
    assert 1_200 * 524_288 < found.workspace_bytes < 1_200 * 524_288 + 2**28


def test_as_many_calls_fit_as_leave_the_reserve_free() -> None:
    """Up to four calls each bring a copy of 5, which all others share."""
    found = Footprint(
        weights_bytes=15, codec_weights_bytes=5, row_bytes=8, step_bytes_per_row=2, prefix_bytes_per_frame=1,
        copy_bytes=5, workspace_bytes=10,
    )  # fmt: skip

    assert COPIES == 4
    assert [found.needed_bytes(calls) - RESERVE_BYTES for calls in range(7)] == [30, 45, 60, 75, 90, 100, 110]
    for free, calls in {0: 0, 44: 0, 45: 1, 74: 2, 75: 3, 89: 3, 90: 4, 99: 4, 100: 5, 109: 5, 110: 6}.items():
        assert rows_that_fit(found, RESERVE_BYTES + free) == calls


def test_no_call_fits_where_not_even_the_weights_do() -> None:
    found = footprint(*REAL, element_bytes=2)

    assert rows_that_fit(found, 0) == 0
    assert rows_that_fit(found, found.needed_bytes(0)) == 0
    assert rows_that_fit(found, found.needed_bytes(1)) == 1

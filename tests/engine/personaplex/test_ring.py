"""Keys and values in a byte an element: how near they stay, and that every way into a ring gives the same bytes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from app.engine.personaplex.model import rows
from app.engine.personaplex.model.calibrate import even_keys
from app.engine.personaplex.model.lm import Lm
from app.engine.personaplex.model.ops import Fused
from app.engine.personaplex.model.ring import Kv, Ring, kv_dtype, quantised
from tests.engine.tiny import tiny_configs

CPU = torch.device("cpu")
KINDS: list[Kv] = ["bf16", "int8", "fp8"]
RING = 47
every_kind = pytest.mark.parametrize("kv", KINDS)


def random_lm(seed: int = 0, dtype: torch.dtype = torch.float32) -> Lm:
    """Weights that make keys with some large channels, to which queries pay little attention: as real ones do."""
    draw = torch.Generator().manual_seed(seed)
    lm = Lm(tiny_configs(RING + 1)[0], CPU, dtype)
    for key, entry in lm.entries().items():
        weight = torch.randn(entry.shape, generator=draw) * entry.shape[-1] ** -0.5
        if key.endswith("alpha"):
            weight = torch.ones(entry.shape)
        if key.endswith("self_attn.in_proj_weight") and key.startswith("transformer"):
            q, k, _ = weight.view(3, lm.config.num_heads, lm.config.head_dim, -1)
            k[:, 4:8] *= 50
            q[:, 4:8] /= 50
        if entry.into is not None:
            entry.into.copy_(weight[: entry.rows].reshape(entry.into.shape))
    return lm


def some_inputs(lm: Lm, count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, lm.config.dim, generator=torch.Generator().manual_seed(seed)).to(lm.dtype)


def step_by_step(lm: Lm, x: Tensor, kv: Ring, start: int = 0) -> Tensor:
    """One row's positions, each in a step of its own: [T, D]."""
    active = torch.ones(1, dtype=torch.bool)
    hidden = [lm.transformer.step(one[None], kv, torch.tensor([at]), active, at + 1) for at, one in enumerate(x, start)]
    return torch.cat(hidden)


@contextmanager
def kernels(lm: Lm) -> Iterator[None]:
    """The same weights, run by the kernels that a GPU would run."""
    plain = lm.transformer._ops, lm.depformer._ops
    lm.transformer._ops = lm.depformer._ops = Fused()
    yield
    lm.transformer._ops, lm.depformer._ops = plain


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 1 / 16)])
def test_a_value_of_one_byte_is_off_by_half_a_step_of_its_tokens_largest(dtype: torch.dtype, most: float) -> None:
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(2)) * torch.tensor([1e-4, 1.0, 300.0])[:, None]

    stored, scale = quantised(x, dtype)

    error = (stored.float() * scale[..., None] - x).abs().amax(-1)
    assert bool((error <= x.abs().amax(-1) * most * 1.001).all())


def test_a_vector_of_zeros_is_kept_as_zeros() -> None:
    stored, scale = quantised(torch.zeros(2, 8), torch.int8)

    assert not stored.any()
    assert bool((scale > 0).all())


@every_kind
def test_a_prompt_read_at_once_and_position_by_position_leaves_the_same_ring(kv: Kv) -> None:
    lm = random_lm()
    x = some_inputs(lm, 30)
    at_once, one_by_one = (Ring.of(lm.config, 1, RING, CPU, kv_dtype(kv, lm.dtype)) for _ in range(2))

    whole, steps = lm.transformer.extend(x, at_once, 0), step_by_step(lm, x, one_by_one)

    torch.testing.assert_close(steps, whole, atol=2e-2 if kv != "bf16" else 1e-4, rtol=1e-3)
    assert apart(at_once.layer(1).read(30, torch.float32), one_by_one.layer(1).read(30, torch.float32)) < 0.01


@every_kind
@pytest.mark.parametrize("length", [3, 46, 130])
def test_the_kernels_step_a_whole_model_as_plain_torch_does(kv: Kv, length: int) -> None:
    """Also with the ring gone round twice."""
    lm = random_lm()
    x = some_inputs(lm, length + 4)
    plain, fused = (Ring.of(lm.config, 1, RING, CPU, kv_dtype(kv, lm.dtype)) for _ in range(2))
    step_by_step(lm, x[:length], plain)
    fused.copy_(plain)

    right = step_by_step(lm, x[length:], plain, length)
    with kernels(lm):
        found = step_by_step(lm, x[length:], fused, length)

    torch.testing.assert_close(found, right, atol=1e-4 if kv == "bf16" else 2e-2, rtol=1e-3)


def test_a_row_without_a_call_is_not_read_by_the_kernels() -> None:
    """Its ring is full of NaN; the others do not hear of it."""
    lm = random_lm()
    x = some_inputs(lm, 2)
    kv = Ring.of(lm.config, 2, RING, CPU, torch.float32)
    kv.values[1].fill_(torch.nan)
    position, active = torch.tensor([0, 20]), torch.tensor([True, False])

    with kernels(lm):
        both = lm.transformer.step(x, kv, position, active, 1)
        alone = lm.transformer.step(x[:1], Ring.of(lm.config, 1, RING, CPU, torch.float32), position[:1], active[:1], 1)

    assert torch.allclose(both[0], alone[0], atol=1e-5)
    assert both[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evened_keys_change_nothing_that_is_said(dtype: torch.dtype) -> None:
    """Powers of two: bit for bit, in any precision."""
    lm = random_lm(dtype=dtype)
    x = some_inputs(lm, 20)
    before = lm.transformer.extend(x, Ring.of(lm.config, 1, 20, CPU, dtype), 0)

    even_keys(lm, some_inputs(lm, 40, seed=3))

    assert lm.transformer.extend(x, Ring.of(lm.config, 1, 20, CPU, dtype), 0).equal(before)


def test_a_byte_is_enough_for_keys_of_very_different_channels_once_they_are_evened() -> None:
    errors = []
    for evened in (False, True):
        lm = random_lm()
        exact = lm.transformer.extend(some_inputs(lm, 40), Ring.of(lm.config, 1, 40, CPU, torch.float32), 0)
        if evened:
            even_keys(lm, some_inputs(lm, 40, seed=3))
        found = lm.transformer.extend(some_inputs(lm, 40), Ring.of(lm.config, 1, 40, CPU, torch.int8), 0)
        errors.append(apart(found, exact))

    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 3


@every_kind
def test_a_row_of_a_ring_is_kept_put_back_and_forgotten(kv: Kv) -> None:
    lm = random_lm()
    ring = Ring.of(lm.config, 3, RING, CPU, kv_dtype(kv, lm.dtype))
    lm.transformer.step(some_inputs(lm, 3), ring, torch.tensor([0, 5, 9]), torch.ones(3, dtype=torch.bool), longest=10)

    kept = rows.snapshot(ring, 1)
    assert ring.layer(0).values[1].float().abs().sum() > 0
    rows.clear(ring, 1)
    assert ring.layer(0).values[1].float().abs().sum() == 0
    rows.restore(ring, 0, kept)
    assert ring.row(0).layer(1).read(RING, torch.float32).equal(kept.layer(1).read(RING, torch.float32))


@every_kind
def test_chosen_slots_go_from_one_ring_to_another(kv: Kv) -> None:
    lm = random_lm()
    source = Ring.of(lm.config, 1, 60, CPU, kv_dtype(kv, lm.dtype))
    lm.transformer.extend(some_inputs(lm, 60), source, 0)
    into, out_of = torch.tensor([4, 0, 9]), torch.tensor([50, 59, 13])
    target = source.like(RING)

    target.copy_slots(into, source, out_of)

    for layer in range(lm.config.num_layers):
        found, right = (ring.layer(layer).read(ring.slots, torch.float32) for ring in (target, source))
        assert found[:, :, :, into].equal(right[:, :, :, out_of])

"""The kernels against their plain twins: on a GPU where there is one, in Triton's interpreter elsewhere."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from app.engine.contract import EngineFault
from app.engine.personaplex.model.kernels import available

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")

from app.engine.personaplex.model.kernels import fused, ring

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INT8, FP8 = torch.int8, torch.float8_e4m3fn
LARGEST = {INT8: 127.0, FP8: 448.0}
every_kind = pytest.mark.parametrize(
    "kind", [torch.float32, torch.bfloat16, INT8, FP8], ids=["f32", "bf16", "int8", "fp8"]
)


@pytest.fixture(autouse=True)
def _device_and_seed() -> Iterator[None]:
    torch.manual_seed(0)
    with DEVICE:
        yield


def computed(kind: torch.dtype) -> torch.dtype:
    """What the model computes in where its ring is of this kind."""
    return torch.float32 if kind in LARGEST else kind


def assert_near(found: Tensor, expected: Tensor) -> None:
    """As near as the dtype of what was found allows; the interpreter cuts off what bfloat16 cannot hold."""
    tolerance = 6e-2 if found.dtype is torch.bfloat16 else 2e-5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def stored(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if kind not in LARGEST:
        return x.to(kind), None
    scale = (x.abs().amax(-1) / LARGEST[kind]).clamp(min=1e-8)
    whole = x / scale[..., None]
    return ((whole + 0.5).floor().clamp(-127, 127) if kind is INT8 else whole).to(kind), scale


def read(values: Tensor, scales: Tensor | None) -> Tensor:
    exact = values.to(torch.float32)
    return exact if scales is None else exact * scales[..., None]


def raw(values: Tensor) -> Tensor:
    return values.view(torch.uint8) if values.dtype is FP8 else values


def random_ring(kind: torch.dtype, *shape: int) -> tuple[Tensor, Tensor | None]:
    """Values [S, L, 2, H, P, head_dim] of very different sizes, and their scales."""
    return stored(torch.randn(shape) * torch.rand(*shape[:-1], 1) * 3, kind)


def layer_of(values: Tensor, scales: Tensor | None, layer: int, rows: int) -> tuple[Tensor, Tensor | None]:
    return values[:rows, layer], None if scales is None else scales[:rows, layer]


def rotation(position: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Float32 [W, head_dim / 2] each, of positions [W]."""
    angle = position[:, None] * torch.exp(torch.arange(width // 2) * (-math.log(10_000) * 2 / width))
    return angle.cos(), angle.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [W, H, head_dim], in float32."""
    even, odd = x.to(torch.float32).unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None], sin[:, None]
    return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)


def attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query [H, head_dim] over keys and values [H, T, head_dim]: [H * head_dim], in float64."""
    wide = functional.scaled_dot_product_attention(q[:, None].double(), keys.double(), values.double())
    return wide[:, 0].flatten()


def over_slots(q: Tensor, values: Tensor, scales: Tensor | None, held: Tensor) -> Tensor:
    both = read(values, scales)
    rows = [
        attention(q[row], *both[row, :, :, :count]) if count else torch.zeros(q[0].numel(), dtype=torch.float64)
        for row, count in enumerate(held.tolist())
    ]
    return torch.stack(rows)


@every_kind
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_over_the_ring_is_attention_over_the_last_positions_in_time(kind: torch.dtype, splits: int) -> None:
    """Rows start at different positions, some of them beyond the wrap, and pass it further."""
    rows, heads, slots, width, steps = 3, 2, 11, 16, 14
    values, scales = random_ring(kind, rows, 1, 2, heads, slots, width)
    layer = layer_of(values, scales, 0, rows)
    start = torch.tensor([0, 7, 25])
    past = [torch.randn(int(count), 2, heads, width) for count in start]
    for row, positions in enumerate(past):
        some, some_scales = stored(positions, kind)
        for at in range(len(positions)):
            raw(layer[0])[row, :, :, at % slots] = raw(some)[at]
            if layer[1] is not None and some_scales is not None:
                layer[1][row, :, :, at % slots] = some_scales[at]
        past[row] = read(some, some_scales)
    for step in range(steps):
        position = start + step
        qkv = torch.randn(rows, 3, heads, width).to(computed(kind))
        cos, sin = rotation(position, width)
        q = ring.append(qkv, cos, sin, *layer, position % slots)
        new = torch.stack((turned(qkv[:, 1], cos, sin), qkv[:, 2].to(torch.float32)), 1)
        past = [torch.cat((row, read(*stored(one[None], kind)))) for row, one in zip(past, new, strict=True)]
        if step % 4 in (0, 1):
            found = ring.attend(q, *layer, (position + 1).clamp(max=slots), splits)
            in_time = [attention(one, *row[-slots:].permute(1, 2, 0, 3)) for one, row in zip(q, past, strict=True)]
            assert_near(found, torch.stack(in_time))


@every_kind
@pytest.mark.parametrize(
    ("rows", "splits", "width", "slots"),
    [(1, 32, 64, 250), (5, 1, 16, 700), (5, 2, 128, 90), (2, 7, 32, 60), (3, None, 8, 50)],
)
def test_attention_reads_what_each_row_holds_and_no_more(
    kind: torch.dtype, rows: int, splits: int | None, width: int, slots: int
) -> None:
    """What lies beyond is nothing that a number could be made of, so it would be seen in every sum."""
    heads = 2
    values, scales = random_ring(kind, rows + 1, 2, 2, heads, slots, width)
    layer = layer_of(values, scales, 1, rows)
    held = torch.randint(1, slots, (rows,))
    held[1:2], held[2:3] = slots, 1
    q = torch.randn(rows, heads, width).to(computed(kind))
    expected = over_slots(q, *layer, held)
    beyond = torch.arange(slots) >= held[:, None]
    spoilt = layer[0] if layer[1] is None else layer[1]
    spoilt.movedim(3, 1)[beyond] = math.nan

    found = ring.attend(q, *layer, held, splits)

    assert_near(found, expected)


@every_kind
@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_that_holds_nothing_gets_zeros_and_is_not_read(kind: torch.dtype, splits: int) -> None:
    values, scales = random_ring(kind, 3, 1, 2, 2, 40, 16)
    layer = layer_of(values, scales, 0, 3)
    held = torch.tensor([0, 40, 0])
    q = torch.randn(3, 2, 16).to(computed(kind))
    expected = over_slots(q, *layer, held)
    spoilt = layer[0] if layer[1] is None else layer[1]
    spoilt[held == 0] = math.nan

    found = ring.attend(q, *layer, held, splits)

    assert not found[held == 0].any()
    assert_near(found, expected)


@every_kind
@pytest.mark.parametrize("width", [16, 64, 128])
def test_a_position_is_kept_in_its_slot_and_nothing_else_of_the_ring_is_touched(kind: torch.dtype, width: int) -> None:
    rows, heads, slots = 3, 2, 9
    values, scales = random_ring(kind, rows + 2, 3, 2, heads, slots, width)
    layer = layer_of(values, scales, 1, rows)
    expected, expected_scales = raw(values).clone(), None if scales is None else scales.clone()
    position = torch.randint(0, 5000, (rows,))
    slot = position % slots
    # Part of something wider: rows are contiguous, the whole is not.
    qkv = (
        torch.randn(rows, 3 * heads * width + 16).to(computed(kind))[:, : 3 * heads * width].view(rows, 3, heads, width)
    )
    cos, sin = rotation(position, width)

    q = ring.append(qkv, cos, sin, *layer, slot)

    new, new_scales = stored(torch.stack((turned(qkv[:, 1], cos, sin), qkv[:, 2].to(torch.float32)), 1), kind)
    row = torch.arange(rows)
    expected[row, 1, :, :, slot] = raw(new)
    if expected_scales is not None and new_scales is not None and scales is not None:
        expected_scales[row, 1, :, :, slot] = new_scales
        torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0)
    tolerance = 2**-7 if kind is torch.bfloat16 else 0  # cut off, and not rounded, in the interpreter
    torch.testing.assert_close(raw(values), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(q, turned(qkv[:, 0], cos, sin).to(q.dtype), rtol=tolerance, atol=0)


def test_float8_bytes_are_those_that_torch_makes() -> None:
    """Over all of its exponents, halfway between neighbours, and where it has no exponent left."""
    width, tokens = 128, 40
    exact = torch.arange(127, dtype=torch.uint8).view(FP8).to(torch.float32)
    halfway = (exact[:-1] + exact[1:]) / 2
    x = torch.randn(tokens, width) * torch.exp2(torch.randint(-14, 9, (tokens, width)).float())
    x[0, :127], x[1, :126], x[2, :126] = exact, halfway, -halfway
    x = x.clamp(-448, 448)
    x[:, -1] = 448.0  # its scale is then 1
    values, scales = stored(torch.zeros(tokens, 1, 2, 1, 3, width), FP8)
    qkv = torch.stack((x, x, x), 1)[:, :, None]
    still = torch.zeros(tokens, width // 2)

    ring.append(qkv, still + 1, still, *layer_of(values, scales, 0, tokens), torch.full((tokens,), 1))

    for part in (0, 1):
        assert torch.equal(raw(values)[:, 0, part, 0, 1], x.to(FP8).view(torch.uint8))


def test_a_ring_of_another_layout_is_refused() -> None:
    values, scales = random_ring(INT8, 2, 1, 2, 2, 8, 16)
    assert scales is not None
    q, held = torch.zeros(2, 2, 16), torch.tensor([1, 1])

    with pytest.raises(EngineFault, match="slots side by side"):
        ring.attend(q, values[:, 0].transpose(2, 3), scales[:, 0], held)
    with pytest.raises(EngineFault, match="strides of scales"):
        ring.attend(q, values[:, 0], torch.zeros(2, 2, 2, 9)[..., :8], held)
    with pytest.raises(EngineFault, match="a power of two"):
        ring.attend(torch.zeros(2, 2, 12), torch.zeros(2, 2, 2, 8, 12), None, held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 1024), (3, 600)])
def test_a_sum_and_its_norm_are_those_of_torch(dtype: torch.dtype, rows: int, width: int) -> None:
    x, y = (torch.randn(rows, width + 8).to(dtype)[:, :width] for _ in range(2))
    alpha = torch.randn(width).to(dtype)
    tolerance = 2**-6 if dtype is torch.bfloat16 else 1e-5

    total, normed = fused.add_norm(x, y, alpha)
    alone, alone_normed = fused.add_norm(x, None, alpha)

    torch.testing.assert_close(total, x + y, rtol=tolerance, atol=0 if dtype is torch.float32 else 2**-7)
    expected = functional.rms_norm(total, (width,), alpha, 1e-8)
    torch.testing.assert_close(normed, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(alone, x)
    torch.testing.assert_close(
        alone_normed, functional.rms_norm(x, (width,), alpha, 1e-8), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(1, 40), (4, 1024), (3, 2500)])
def test_a_gate_is_that_of_torch(dtype: torch.dtype, rows: int, width: int) -> None:
    both = (torch.randn(rows, 2 * width + 8) * 4).to(dtype)[:, : 2 * width]
    gate, value = both.chunk(2, -1)

    tolerance = 2**-6 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(fused.silu_mul(both), functional.silu(gate) * value, rtol=tolerance, atol=1e-6)


def test_kernels_are_there_on_a_gpu_or_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not available(torch.device("cpu"))
    assert available(torch.device("cuda"))


@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), pytest.param(86, marks=pytest.mark.slow),
                   pytest.param(89, marks=pytest.mark.slow), 90]
)  # fmt: skip
def test_kernels_compile_for_a_gpu_without_spilling_registers(capability: int, tmp_path: Path) -> None:
    """By the compiler that Triton brings: it needs no GPU, but an interpreter that is not on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"from tests.engine.personaplex import test_kernels; test_kernels.compile_all({capability})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)

    assert len(kernels) == (10 if capability < 89 else 13)
    for name, found in kernels.items():
        assert found["stack_bytes"] == 0, f"{name} spills"
        if name.startswith("attend"):
            # Keys and values of each stage's tile; `cg` copies are of 16 bytes, the only size it has.
            assert found["copies"] == 2 * ring._DEPTH * ring._STAGES, f"{name} reads less than 16 bytes at a time"
            assert found["registers"] <= 128, f"{name}: fewer than four programs on a multiprocessor"
            assert found["shared_bytes"] <= 32 * 1024


def compile_all(capability: int) -> None:
    """Compile every kernel as PersonaPlex-7B in bfloat16 launches it, and print what came out as JSON."""
    kinds = {"bf16": 0, "int8": 1} | ({"fp8": 2} if capability >= 89 else {})
    found = {}
    for name, kind in kinds.items():
        cache = {"values": "*u8" if kind else "*bf16", "scales": "*fp32" if kind else None}
        shape = {"row_slots": "i32", "head_slots": "i32", "DIM": 128, "KIND": kind}
        append = {"qkv": "*bf16", "cos": "*fp32", "sin": "*fp32", "slot": "*i64", "q": "*bf16", "qkv_row": "i32"}
        found[f"append {name}"] = _compiled(ring._append, capability, 1, append | cache | shape)
        for whole in (True, False):
            lanes = {"LANES": ring._lanes(128, 1 if kind else 2), "DEPTH": ring._DEPTH, "STAGES": ring._STAGES}
            given = {"q": "*bf16", "held": "*i64", "out": "*bf16" if whole else "*fp32", "factor": "fp32",
                     "weights": None if whole else "*fp32", "WHOLE": whole}  # fmt: skip
            kernel_name = f"attend {name} {'whole' if whole else 'split'}"
            found[kernel_name] = _compiled(ring._attend, capability, ring._WARPS, given | lanes | cache | shape)
    join = {"parts": "*fp32", "weights": "*fp32", "out": "*bf16", "splits": "i32", "MOST": 32, "DIM": 128}
    found["join"] = _compiled(ring._join, capability, ring._WARPS, join)
    for y in ("*bf16", None):
        norm = {"x": "*bf16", "y": y, "alpha": "*bf16", "total": "*bf16", "normed": "*bf16", "epsilon": "fp32",
                "x_row": "i32", "y_row": "i32", "width": "i32", "BLOCK": 4096}  # fmt: skip
        found[f"add_norm {y}"] = _compiled(fused._add_norm, capability, 8, norm)
    gate = {"both": "*bf16", "out": "*bf16", "both_row": "i32", "width": "i32", "BLOCK": fused._BLOCK}
    found["silu_mul"] = _compiled(fused._silu_mul, capability, 4, gate)
    print(json.dumps(found))  # noqa: T201


def _compiled(kernel: Any, capability: int, warps: int, given: dict[str, Any]) -> dict[str, int]:
    """`given` has a type for what changes from launch to launch, and a value for what is compiled in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: given[name] if isinstance(given[name], str) else "constexpr" for name in names}
    constants = {(names.index(name),): value for name, value in given.items() if not isinstance(value, str)}
    # Pointers and rows of the real model are multiples of 16; a head's slots, 2999, are not.
    even = {
        name for name, kind in signature.items() if kind.startswith("*") or name.endswith(("row", "row_slots", "width"))
    }
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    binary = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)], capture_output=True, text=True, check=True
    )
    sizes = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert sizes is not None, usage
    return {
        "registers": int(sizes[1]),
        "stack_bytes": int(sizes[2]),
        "shared_bytes": made.metadata.shared,
        "copies": made.asm["ptx"].count("cp.async.cg.shared.global"),
    }

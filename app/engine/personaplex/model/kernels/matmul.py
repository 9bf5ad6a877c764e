"""Rows of activations times a quantised matrix: its bytes are read once, and become numbers on the way to the product.

How the work is cut into blocks is reckoned, by `_plan`, and not tried out at the start: a dozen widths times nine
shapes of matrix would be a hundred trials, and two cuts that come out nearly even could take turns from one start to
the next, and with them the last bits of every sum.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton has no types of its own: what a kernel is given, it types at the first launch.

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_LEAST_ROWS = 16
"""A tensor core's tile."""
_MOST_ROWS = {"int8": 128, "fp8": 128, "int4": 64}
"""Of activations in one block. int4 has two tiles of them at once, and with 128 rows its registers spill."""
_OUTPUTS = (32, 64, 128)
_SPLITS = (1, 2, 4, 8)
_SPLIT_COST_BYTES = 150_000
"""What a second kernel takes, taken to be some 3 us, in bytes that one multiprocessor would read meanwhile."""
_SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def _by_rows(
    x, data, scales, out, rows, outputs, inputs, share, x_stride, data_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """int8 and fp8: one scale an output. Block (row block, output block, split) of the grid sums `share` inputs."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    start = tl.program_id(2) * share
    end = tl.minimum(start + share, inputs)
    k = start + tl.arange(0, INPUTS)
    x_place = x + m[:, None] * x_stride + k[None, :]
    data_place = data + n[None, :] * data_stride + k[:, None]
    in_m, in_n = (m < rows)[:, None], (n < outputs)[None, :]
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(start, end, INPUTS):
        if EVEN:
            some = tl.load(x_place, mask=in_m, other=0.0)
            stored = tl.load(data_place, mask=in_n, other=0.0)
        else:
            real = first + tl.arange(0, INPUTS) < end
            some = tl.load(x_place, mask=in_m & real[None, :], other=0.0)
            stored = tl.load(data_place, mask=in_n & real[:, None], other=0.0)
        sums = tl.dot(some, stored.to(some.dtype), sums, input_precision="ieee")
        x_place += INPUTS
        data_place += INPUTS
    sums *= tl.load(scales + n, mask=n < outputs, other=0.0)[None, :]
    place = out + (tl.program_id(2) * rows + m[:, None]) * outputs + n[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=in_m & in_n)


@triton.jit(do_not_specialize=["rows"])
def _by_groups(
    x, data, scales, out, rows, outputs, groups, share, x_stride, data_stride, zeros_stride, group_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """int4: a scale and a zero each output and group of 2 * HALF inputs. As `_by_rows`; `share` counts groups."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    start = tl.program_id(2) * share
    end = tl.minimum(start + share, groups)
    k = tl.arange(0, BLOCK)
    x_place = x + m[:, None] * x_stride + start * 2 * HALF + k[None, :]
    data_place = data + n[None, :] * data_stride + start * HALF + k[:, None]
    scale_place = scales + n
    in_m, in_n = (m < rows)[:, None], (n < outputs)[None, :]
    in_x, in_data = in_m & (k < HALF)[None, :], in_n & (k < HALF)[:, None]
    first = tl.minimum(start, groups - 1) * group_stride
    scale = tl.load(scale_place + first, mask=n < outputs, other=0.0)
    zero = tl.load(scale_place + first + zeros_stride, mask=n < outputs, other=0.0)
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for group in range(start, end):
        low = tl.load(x_place, mask=in_x, other=0.0)
        high = tl.load(x_place + HALF, mask=in_x, other=0.0)
        stored = tl.load(data_place, mask=in_data, other=0)
        # The next group's are fetched while this one is multiplied: they feed no product, so nothing else does it.
        coming = tl.minimum(group + 1, end - 1) * group_stride
        next_scale = tl.load(scale_place + coming, mask=n < outputs, other=0.0)
        next_zero = tl.load(scale_place + coming + zeros_stride, mask=n < outputs, other=0.0)
        minus = zero.to(low.dtype)[None, :]
        low_half, high_half = (stored & 15).to(tl.int8), (stored >> 4).to(tl.int8)
        part = tl.dot(low, low_half.to(low.dtype) - minus, input_precision="ieee")
        part = tl.dot(high, high_half.to(low.dtype) - minus, part, input_precision="ieee")
        sums += part * scale.to(tl.float32)[None, :]
        scale, zero = next_scale, next_zero
        x_place += 2 * HALF
        data_place += HALF
    place = out + (tl.program_id(2) * rows + m[:, None]) * outputs + n[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=in_m & in_n)


@triton.jit
def _add_splits(parts, out, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of the splits, always in the same order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = place < count
    sums = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(parts + split * count + place, mask=real, other=0.0)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=real)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a product is cut up: a block's size, and how many blocks share the inputs of the same outputs."""

    rows: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


def matmul(x: Tensor, data: Tensor, scales: Tensor, kind: str) -> Tensor:
    """x [M, in] times a matrix [out, in] as `quantize.Quantized` lays it out: [M, out] in x's dtype.

    Products are summed in float32, and scales multiply the sums. Any M: beyond one block of rows, blocks that need the
    same part of the matrix run side by side, so that most of it is still read from memory once.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, inputs = x.shape
    outputs = len(data)
    plan = _plan(rows, outputs, inputs, kind, _multiprocessors(x.device))
    out = x.new_empty(rows, outputs)
    sums = out if plan.splits == 1 else x.new_empty(plan.splits, rows, outputs, dtype=torch.float32)
    grid = (triton.cdiv(rows, plan.rows), triton.cdiv(outputs, plan.outputs), plan.splits)
    launch = {
        "ROWS": plan.rows, "OUTPUTS": plan.outputs,
        "num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    if kind == "int4":
        groups = scales.shape[1]
        half = inputs // groups // 2
        block = max(16, triton.next_power_of_2(half))
        _by_groups[grid](
            x, data, scales, sums, rows, outputs, groups, triton.cdiv(groups, plan.splits),
            x.stride(0), data.stride(0), scales.stride(0), scales.stride(1), HALF=half, BLOCK=block, **launch,
        )  # fmt: skip
    else:
        share = triton.cdiv(triton.cdiv(inputs, plan.inputs), plan.splits) * plan.inputs
        _by_rows[grid](
            x, data, scales, sums, rows, outputs, inputs, share, x.stride(0), data.stride(0),
            INPUTS=plan.inputs, EVEN=inputs % plan.inputs == 0, **launch,
        )  # fmt: skip
    if sums is not out:
        count = out.numel()
        _add_splits[(triton.cdiv(count, _SUM_BLOCK),)](
            sums, out, count, SPLITS=plan.splits, BLOCK=_SUM_BLOCK, num_warps=4, enable_fp_fusion=True
        )  # fmt: skip
    return out


@lru_cache(maxsize=1024)
def _plan(rows: int, outputs: int, inputs: int, kind: str, multiprocessors: int) -> _Plan:
    """The cut that reads least for each multiprocessor, by `_cost_bytes`."""
    high = min(_MOST_ROWS[kind], max(_LEAST_ROWS, triton.next_power_of_2(rows)))

    def cost(cut: tuple[int, int]) -> float:
        return _cost_bytes(rows, outputs, inputs, kind, multiprocessors, high, *cut)

    wide, splits = min(((wide, splits) for wide in _OUTPUTS for splits in _SPLITS), key=cost)
    # One stage's tiles take at most 24 KB, and four stages keep three: 72 KB, or up to 108 KB on Hopper, which keeps
    # converted tiles as well. Compiled for 8.0, 8.6, 8.9 and 9.0 no more than 16 bytes of registers spill.
    deep = {16: 256 if wide < 128 else 128, 32: 128}.get(high, 64)
    stages = 6 if kind == "int4" and high == _LEAST_ROWS else 4
    return _Plan(high, wide, deep, splits, 8 if high * wide > 4096 else 4, stages)


def _cost_bytes(
    rows: int, outputs: int, inputs: int, kind: str, multiprocessors: int, high: int, wide: int, splits: int
) -> float:
    """What the busiest multiprocessor moves. Activations are read again by every block of outputs, if only from the
    second cache: wide blocks read them seldom, but of a small matrix there are too few of these to go round, unless
    several share its inputs. That takes sums in memory, and a second kernel that adds them up.
    """
    blocks: int = triton.cdiv(rows, high) * triton.cdiv(outputs, wide) * splits
    block_bytes = inputs / splits * (2 * min(rows, high) + wide * (0.5 if kind == "int4" else 1.0))
    extra_bytes = _SPLIT_COST_BYTES + 8 * splits * rows * outputs / multiprocessors if splits > 1 else 0
    return block_bytes * max(1.0, blocks / multiprocessors) + extra_bytes


@cache
def _multiprocessors(device: torch.device) -> int:
    """On a CPU, where only the interpreter runs, a number like any other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128

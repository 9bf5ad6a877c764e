"""What stands between two matrices, each in one pass over its rows."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton has no types of its own: what a kernel is given, it types at the first launch.

import triton
import triton.language as tl
from torch import Tensor

_EPSILON = 1e-8
_BLOCK = 1024


def add_norm(x: Tensor, y: Tensor | None, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The residual sum and its RMS norm.

    Args:
        x, y: [W, D], each row contiguous, of one dtype; no y adds nothing.
        alpha: [D].

    Returns:
        x + y, which is x itself without y, and its norm times alpha: [W, D], in the dtype of x. The norm is computed in
        float32 from the sum as rounded.
    """
    rows, width = x.shape
    total, normed = x if y is None else x.new_empty(rows, width), x.new_empty(rows, width)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        x, y, alpha, total, normed, x.stride(0), 0 if y is None else y.stride(0), width, _EPSILON,
        BLOCK=block, num_warps=max(1, min(8, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return total, normed


def silu_mul(both: Tensor) -> Tensor:
    """[W, 2 * N], each row contiguous -> [W, N]: SiLU of the first half, times the second."""
    rows, width = len(both), both.shape[1] // 2
    out = both.new_empty(rows, width)
    _silu_mul[triton.cdiv(width, _BLOCK), rows](
        both, out, both.stride(0), width, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False
    )
    return out


@triton.jit
def _add_norm(x, y, alpha, total, normed, x_row, y_row, width, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    real = channel < width
    value = tl.load(x + row * x_row + channel, mask=real, other=0.0).to(tl.float32)
    if y is not None:
        value += tl.load(y + row * y_row + channel, mask=real, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * width + channel, rounded, mask=real)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    by = tl.load(alpha + channel, mask=real, other=0.0).to(tl.float32)
    tl.store(normed + row * width + channel, (value * scale * by).to(normed.dtype.element_ty), mask=real)


@triton.jit
def _silu_mul(both, out, both_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = channel < width
    gate = tl.load(both + row * both_row + channel, mask=real, other=0.0).to(tl.float32)
    value = tl.load(both + row * both_row + width + channel, mask=real, other=0.0).to(tl.float32)
    # Rounded in between, as two operations of torch do.
    opened = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + channel, (opened * value).to(out.dtype.element_ty), mask=real)

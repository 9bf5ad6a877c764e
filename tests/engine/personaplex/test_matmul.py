"""The weight-only kernels in Triton's interpreter, against the matrix that the stored numbers stand for.

The interpreter multiplies no bfloat16: float32 shows that the sums are right, float16 the way to half precision.
"""

import os

import pytest
import torch
from torch import Tensor

from app.engine.personaplex.model.quantize import Kind, Quantized

pytest.importorskip("triton")
os.environ["TRITON_INTERPRET"] = "1"  # asked for when a kernel is made

from app.engine.personaplex.model.kernels.matmul import _plan, matmul

CPU = torch.device("cpu")
EPSILON = {torch.float32: 2e-6, torch.float16: 2e-3}
every_kind = pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def quantised(kind: Kind, outputs: int, inputs: int) -> Quantized:
    matrix = Quantized.empty(kind, outputs, inputs, CPU)
    matrix.copy_(some(outputs, inputs))
    return matrix


def product(x: Tensor, matrix: Quantized) -> Tensor:
    return matmul(x, matrix.data, matrix.scales, matrix.kind)


def assert_same(found: Tensor, x: Tensor, matrix: Quantized) -> None:
    exact = x.double() @ matrix.dequantised(torch.float32).double().T
    assert found.dtype == x.dtype
    assert (found.double() - exact).abs().max() <= EPSILON[x.dtype] * exact.abs().max()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 17, 64, 130])
def test_any_number_of_rows_times_a_matrix_that_no_block_divides(rows: int, dtype: torch.dtype, kind: Kind) -> None:
    for outputs, inputs in ((48, 64), (33, 176), (70, 352)):
        x, matrix = some(rows, inputs, dtype=dtype), quantised(kind, outputs, inputs)

        assert_same(product(x, matrix), x, matrix)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_odd_number_of_inputs(kind: Kind) -> None:
    x, matrix = some(5, 301), quantised(kind, 7, 301)

    assert_same(product(x, matrix), x, matrix)


@every_kind
@pytest.mark.parametrize("inputs", [8192, 7040, 8960])
def test_inputs_shared_out_among_blocks_are_all_counted_once(inputs: int, kind: Kind) -> None:
    """55 groups of 128 and 70: the last of eight blocks gets fewer than the others, or none."""
    x, matrix = some(40, inputs), quantised(kind, 48, inputs)

    assert _plan(40, 48, inputs, kind, 128).splits == 8
    assert_same(product(x, matrix), x, matrix)
    assert torch.equal(product(x, matrix), product(x, matrix))


@every_kind
def test_a_part_of_a_stack_and_rows_that_lie_apart(kind: Kind) -> None:
    """As the depformer has them: step j's matrix of a stack, and inputs that lie between those of other steps."""
    stack, wide = quantised(kind, 4 * 24, 64), some(6, 5, 64)

    for matrix in stack.chunk(4):
        assert_same(product(wide[:, 3], matrix), wide[:, 3], matrix)


@every_kind
def test_columns_first_inputs_are_taken_too(kind: Kind) -> None:
    x, matrix = some(64, 9).T, quantised(kind, 16, 64)

    assert_same(product(x, matrix), x, matrix)


@every_kind
def test_a_row_is_the_same_whatever_the_others_hold(kind: Kind) -> None:
    matrix, one = quantised(kind, 40, 256), some(12, 256)
    other = one.clone()
    other[1:] = 1e4

    assert torch.equal(product(one, matrix)[0], product(other, matrix)[0])


@every_kind
@pytest.mark.parametrize("multiprocessors", [20, 58, 84, 132, 170])
def test_the_cut_of_a_product_covers_it_and_fits_a_small_gpus_shared_memory(kind: Kind, multiprocessors: int) -> None:
    """All shapes of the real model, and every width a graph is made for. 99 KB is what the smallest of them gives."""
    shapes = [(12288, 4096), (4096, 4096), (22528, 4096), (4096, 11264), (8192, 4096), (3072, 1024), (1024, 1024)]
    for outputs, inputs in [*shapes, (5632, 1024), (1024, 2816)]:
        for rows in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 500):
            plan = _plan(rows, outputs, inputs, kind, multiprocessors)
            x_bytes = 2 * plan.rows * (128 if kind == "int4" else plan.inputs)
            matrix_bytes = plan.outputs * (64 if kind == "int4" else plan.inputs)
            assert (x_bytes + matrix_bytes) * (plan.stages - 1) <= 99 * 1024
            assert inputs % plan.inputs == 0
            assert plan.rows >= min(rows, 64)

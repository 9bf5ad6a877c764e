"""A matrix that multiplies rows of activations, laid out for the processor that it is on."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from app.engine.personaplex.model import kernels
from app.engine.personaplex.model.quantize import Matrix, Quantized

SEVERAL = 2
"""Rows to expect where a frame alone is more than one: inside the codec."""
_HALF_PRECISION = (torch.bfloat16, torch.float16)


class Linear:
    """`x [..., in]` -> `[..., out]`, without a bias, as everywhere in these networks."""

    def __init__(self, weight: Matrix) -> None:
        """`weight` [out, in], often a view into a stack that the loader fills."""
        self._weight = weight
        self._blocked: Tensor | None = None
        self._shards: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._shards is not None:
            return _by_shards(x, self._shards)
        if self._blocked is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._blocked, None, "none", [], "")  # type: ignore[no-any-return]
        if isinstance(self._weight, Quantized):
            return _quantised(x, self._weight)
        # Of windows that overlap torch would make many small products, one for each row.
        return functional.linear(x.reshape(-1, x.shape[-1]), self._weight).view(*x.shape[:-1], -1)

    def scale_rows(self, factor: Tensor) -> None:
        """Multiply the outputs by `factor` [out], exactly where these are powers of two. Before `pack`."""
        if isinstance(self._weight, Quantized):
            self._weight.scale_rows(factor)
        else:
            self._weight.copy_(self._weight * factor.to(self._weight)[:, None])

    def pack(self, rows: int = 1) -> None:
        """Once, when the weights are there; `rows` is how many rows will mostly be multiplied.

        On a CPU in float32 all that counts is how fast a matrix is read. One row: a BLAS leaves it to one thread, so
        each thread gets a share of the outputs, in the order that reads best for the matrix's shape. Several rows:
        oneDNN's blocked layout.
        """
        weight = self._weight
        if isinstance(weight, Quantized) or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return
        if rows == 1:
            self._shards = _shards(weight)
        elif torch.backends.mkldnn.is_available():
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        else:
            return
        self._weight = weight.new_empty(0)


def _quantised(x: Tensor, weight: Quantized) -> Tensor:
    """By the kernel in half precision on a GPU; elsewhere some outputs at a time, as the numbers they stand for."""
    if x.is_cuda and x.dtype in _HALF_PRECISION and kernels.available(x.device):
        # It imports Triton, which only a GPU's torch brings.
        from app.engine.personaplex.model.kernels.matmul import matmul

        rows = x.reshape(-1, x.shape[-1])
        return matmul(rows, weight.data, weight.scales, weight.kind).view(*x.shape[:-1], len(weight))
    parts = [functional.linear(x, weight[rows].dequantised(x.dtype)) for rows in weight.slices()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _shards(weight: Tensor) -> Tensor:
    """[N, in, out / N] of a weight [out, in]."""
    outputs, inputs = weight.shape
    shards = weight.reshape(math.gcd(outputs, torch.get_num_threads()), -1, inputs).transpose(1, 2)
    return shards.contiguous() if outputs > inputs else shards


def _by_shards(x: Tensor, shards: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    outputs = torch.bmm(rows.expand(len(shards), *rows.shape), shards)
    return outputs.transpose(0, 1).reshape(*x.shape[:-1], -1)

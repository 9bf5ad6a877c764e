"""A matrix that multiplies rows of activations, laid out for the processor that it is on."""

import torch
from torch import Tensor
from torch.nn import functional

SEVERAL = 2
"""Rows to expect where a frame alone is more than one: inside the codec."""


class Linear:
    """`x [..., in]` -> `[..., out]`, without a bias, as everywhere in these networks."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` [out, in], often a view into a stack that the loader fills."""
        self._weight = weight
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return functional.linear(x, self._weight)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")  # type: ignore[no-any-return]

    def pack(self, rows: int = 1) -> None:
        """Once, when the weights are there; `rows` is how many rows will mostly be multiplied.

        On a CPU in float32 oneDNN takes over from the BLAS of the torch build: it reads a matrix about twice as fast
        on processors that MKL does not favour. Its blocked layout pays from two rows on.
        """
        weight = self._weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return
        if rows > 1:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        else:
            self._packed = weight.contiguous().to_mkldnn()
        self._weight = weight.new_empty(0)

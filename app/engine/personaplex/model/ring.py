"""The ring cache: keys and values of every row's latest positions, as they are or in a byte an element."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from app.engine.personaplex.model.config import LmConfig

Kv = Literal["bf16", "int8", "fp8"]
"""How keys and values are kept; "bf16" stands for the model's own dtype, whatever that is."""

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_LEAST_SCALE = 1e-8


def kv_dtype(kv: Kv, dtype: torch.dtype) -> torch.dtype:
    """What a ring of this kind holds where the model computes in `dtype`."""
    return {"bf16": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv]


def is_quantised(dtype: torch.dtype) -> bool:
    return dtype in _LARGEST


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stored numbers [..., head_dim] and float32 scales [...]: one for each token and head."""
    largest = _LARGEST[dtype]
    exact = x.to(torch.float32)
    scale = (exact.abs().amax(-1) / largest).clamp(min=_LEAST_SCALE)
    whole = exact / scale[..., None]
    if dtype is torch.int8:
        whole = (whole + 0.5).floor().clamp(-largest, largest)
    return whole.to(dtype), scale


@dataclass
class Layer:
    """One layer of a ring: values [S, 2, H, P, head_dim], keys first; scales float32 [S, 2, H, P], or None."""

    values: Tensor
    scales: Tensor | None

    def put(self, at: tuple[Tensor | slice, ...], both: Tensor) -> None:
        """Keep keys and values [..., head_dim] at the places that the index `at` names."""
        if self.scales is None:
            self.values[at] = both
            return
        stored, self.scales[at] = quantised(both, self.values.dtype)
        _raw(self.values)[at] = _raw(stored)

    def read(self, reach: int, dtype: torch.dtype) -> Tensor:
        """Keys and values of the first `reach` slots, [S, 2, H, reach, head_dim]."""
        values = self.values[:, :, :, :reach]
        if self.scales is None:
            return values.to(dtype)
        return (values.to(torch.float32) * self.scales[:, :, :, :reach, None]).to(dtype)


@dataclass
class Ring:
    """Keys and values of S rows, L layers and P slots; keys are kept after rotation at their absolute position.

    `values` [S, L, 2, H, P, head_dim], keys first. `scales` float32 [S, L, 2, H, P]: what a stored value is multiplied
    by; [S, 0] where values are not quantised.

    One scale a token and head cannot serve channels of very different sizes, as keys have them: they are evened out
    beforehand, by `calibrate.even_keys`.
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, config: LmConfig, rows: int, slots: int, device: torch.device, dtype: torch.dtype) -> "Ring":
        shape = (rows, config.num_layers, 2, config.num_heads, slots, config.head_dim)
        scales = shape[:-1] if is_quantised(dtype) else (rows, 0)
        return cls(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(scales, device=device))

    @property
    def slots(self) -> int:
        return self.values.shape[4]

    def like(self, slots: int) -> "Ring":
        """An empty ring of one row of the same kind."""
        layers, two, heads, _, width = self.values.shape[1:]
        shape = (1, layers, two, heads, slots, width)
        scales = shape[:-1] if self.scales.shape[1] else (1, 0)
        return Ring(self.values.new_empty(shape), self.scales.new_empty(scales))

    def layer(self, index: int) -> Layer:
        return Layer(self.values[:, index], self.scales[:, index] if self.scales.shape[1] else None)

    def row(self, row: int) -> "Ring":
        """A view of one row."""
        return Ring(self.values[row : row + 1], self.scales[row : row + 1])

    def first(self, slots: int) -> "Ring":
        """A view of the first slots."""
        scales = self.scales[:, :, :, :, :slots] if self.scales.shape[1] else self.scales
        return Ring(self.values[:, :, :, :, :slots], scales)

    def copy_(self, other: "Ring") -> None:
        """Take over all slots of a ring of the same kind and shape, on this or another device."""
        self.values.copy_(other.values)
        self.scales.copy_(other.scales)

    def copy_slots(self, into: Tensor, other: "Ring", out_of: Tensor) -> None:
        """Take over some slots: int64 [N] of this ring and of the other."""
        for ours, theirs in zip(self._parts(), other._parts(), strict=True):
            ours[:, :, :, :, into] = theirs[:, :, :, :, out_of]

    def to(self, device: torch.device) -> "Ring":
        return Ring(self.values.to(device), self.scales.to(device))

    def pinned(self) -> "Ring":
        """In host memory that a GPU copies from without a detour."""
        return Ring(self.values.pin_memory(), self.scales.pin_memory())

    def _parts(self) -> Iterator[Tensor]:
        yield _raw(self.values)
        if self.scales.shape[1]:
            yield self.scales


def _raw(values: Tensor) -> Tensor:
    """torch cannot index numbers of a float byte; their bytes it can."""
    return values.view(torch.uint8) if values.dtype is torch.float8_e4m3fn else values

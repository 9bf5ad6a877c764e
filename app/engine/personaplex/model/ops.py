"""The operations between a layer's matrices, twice: in plain torch for every device, and as kernels for NVIDIA's GPUs.

Both are given the same tensors and give the same results up to rounding; the tests hold one against the other.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from app.engine.personaplex.model import kernels
from app.engine.personaplex.model.ring import Layer

EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines for a set of positions, float32 [..., 1, head_dim / 2].

    Source: RoFormer, arXiv:2104.09864, with pairs of neighbouring channels.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, position: Tensor, frequencies: Tensor) -> "Rotation":
        angle = position.to(torch.float32)[..., None, None] * frequencies
        return cls(angle.cos(), angle.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """Turn x [..., H, head_dim]."""
        even, odd = x.to(torch.float32).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * self.cos - odd * self.sin, even * self.sin + odd * self.cos), -1)
        return turned.flatten(-2).to(x.dtype)


def frequencies(head_dim: int, max_period: float, device: torch.device) -> Tensor:
    pair = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    return torch.exp(pair * (-math.log(max_period) * 2 / head_dim))


def rms_norm(x: Tensor, alpha: Tensor) -> Tensor:
    """Computed in float32 whatever the dtype, as Moshi was trained."""
    return functional.rms_norm(x, alpha.shape, alpha, EPSILON)


class Ops(Protocol):
    """What a layer does with rows of activations, one position each."""

    def held(self, position: Tensor, active: Tensor, ring: int) -> Tensor:
        """How many slots each row attends to, int64 [S], the one of its `position` int64 [S] included."""
        ...

    def append(self, qkv: Tensor, turn: Rotation, cache: Layer, slot: Tensor) -> Tensor:
        """Turn queries and keys, keep keys and values.

        Args:
            qkv: [S, 3, H, head_dim].
            slot: int64 [S], where each row's position belongs.

        Returns:
            The queries, [S, H, head_dim].
        """
        ...

    def attend(self, q: Tensor, cache: Layer, held: Tensor, reach: int) -> Tensor:
        """Attention of one query a row over the first `held` int64 [S] slots, none of them beyond `reach`: [S, D]."""
        ...

    def add_norm(self, x: Tensor, y: Tensor | None, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """x + y and its norm, both [S, D]; None adds nothing."""
        ...

    def gate(self, both: Tensor) -> Tensor:
        """[S, 2 * N] -> [S, N]: the first half opens the second (SiLU)."""
        ...


class Plain:
    """In torch's own operations."""

    def held(self, position: Tensor, active: Tensor, ring: int) -> Tensor:
        return (position + 1).clamp(max=ring)

    def append(self, qkv: Tensor, turn: Rotation, cache: Layer, slot: Tensor) -> Tensor:
        q, k = turn(qkv[:, :2]).unbind(1)
        row = torch.arange(len(qkv), device=qkv.device)
        cache.put((row, slice(None), slice(None), slot), torch.stack((k, qkv[:, 2]), 1))
        return q

    def attend(self, q: Tensor, cache: Layer, held: Tensor, reach: int) -> Tensor:
        mask = torch.arange(reach, device=q.device) < held[:, None, None, None]
        keys, values = cache.read(reach, q.dtype).unbind(1)
        return functional.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask).flatten(1)

    def add_norm(self, x: Tensor, y: Tensor | None, alpha: Tensor) -> tuple[Tensor, Tensor]:
        total = x if y is None else x + y
        return total, rms_norm(total, alpha)

    def gate(self, both: Tensor) -> Tensor:
        gate, value = both.chunk(2, -1)
        return functional.silu(gate) * value


class Fused:
    """As kernels, each of which reads and writes its rows once. Attention reads only the slots that a row holds."""

    def __init__(self) -> None:
        # They import Triton, which only a GPU's torch brings.
        from app.engine.personaplex.model.kernels import fused, ring

        self._fused, self._ring = fused, ring

    def held(self, position: Tensor, active: Tensor, ring: int) -> Tensor:
        # A row without a call costs no memory traffic.
        return (position + 1).clamp(max=ring) * active

    def append(self, qkv: Tensor, turn: Rotation, cache: Layer, slot: Tensor) -> Tensor:
        cos, sin = turn.cos.flatten(1), turn.sin.flatten(1)
        return self._ring.append(qkv, cos, sin, cache.values, cache.scales, slot)

    def attend(self, q: Tensor, cache: Layer, held: Tensor, reach: int) -> Tensor:
        return self._ring.attend(q, cache.values, cache.scales, held)

    def add_norm(self, x: Tensor, y: Tensor | None, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return self._fused.add_norm(x, y, alpha)

    def gate(self, both: Tensor) -> Tensor:
        return self._fused.silu_mul(both)


def ops_for(device: torch.device) -> Ops:
    return Fused() if device.type == "cuda" and kernels.available(device) else Plain()

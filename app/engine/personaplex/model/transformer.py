"""The temporal transformer: one position a step over a ring of keys and values, or many positions in one pass."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from app.engine.personaplex.model.config import LmConfig
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.linear import Linear

_EPSILON = 1e-8
_KEYS_BLOCK = 64
"""Attention reads whole blocks of slots, so that sums do not depend on how long the other rows' calls are."""


def rms_norm(x: Tensor, alpha: Tensor) -> Tensor:
    """Computed in float32 whatever the dtype, as Moshi was trained."""
    return functional.rms_norm(x, alpha.shape, alpha, _EPSILON)


def gated(x: Tensor, into: Linear, out: Linear) -> Tensor:
    """The feed-forward block: the first half of `into` opens the second (SiLU)."""
    gate, value = into(x).chunk(2, -1)
    return out(functional.silu(gate) * value)


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


class _Layer:
    def __init__(self, config: LmConfig, device: torch.device, dtype: torch.dtype) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        dim, hidden = config.dim, config.hidden
        self.norm1, self.norm2 = empty(dim), empty(dim)
        self._raw = [empty(3 * dim, dim), empty(dim, dim), empty(2 * hidden, dim), empty(dim, hidden)]
        self.qkv, self.out, self.gate_in, self.gate_out = map(Linear, self._raw)

    def entries(self, place: str) -> dict[str, Entry]:
        dim = len(self.norm1)
        names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "gating.linear_in.weight",
                 "gating.linear_out.weight")  # fmt: skip
        named = {f"{place}.{name}": Entry(tuple(w.shape), w) for name, w in zip(names, self._raw, strict=True)}
        named[f"{place}.norm1.alpha"] = Entry((1, 1, dim), self.norm1)
        named[f"{place}.norm2.alpha"] = Entry((1, 1, dim), self.norm2)
        return named

    def pack(self, rows: int) -> None:
        self._raw.clear()
        for matrix in (self.qkv, self.out, self.gate_in, self.gate_out):
            matrix.pack(rows)


class Transformer:
    """Keys are kept after rotation at their absolute position, so a slot needs no label: the ring holds the last
    `config.ring` positions in any order, and softmax does not ask for one. Engine thread only.
    """

    def __init__(self, config: LmConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self._layers = [_Layer(config, device, dtype) for _ in range(config.num_layers)]
        self._out_norm = torch.empty(config.dim, device=device, dtype=dtype)
        self._frequencies = frequencies(config.head_dim, config.max_period, device)

    def entries(self) -> dict[str, Entry]:
        named = {"out_norm.alpha": Entry((1, 1, self.config.dim), self._out_norm)}
        for index, layer in enumerate(self._layers):
            named |= layer.entries(f"transformer.layers.{index}")
        return named

    def pack(self, rows: int) -> None:
        for layer in self._layers:
            layer.pack(rows)

    def step(self, x: Tensor, kv: Tensor, position: Tensor, longest: int) -> Tensor:
        """One position of every row.

        Args:
            x: [S, D] inputs.
            kv: [S, L, 2, H, ring, head_dim]; the slot of each row's position is written.
            position: int64 [S], absolute.
            longest: at least the most positions that any row of interest holds, this one included.

        Returns:
            [S, D], normalised: for the text head and the depformer.
        """
        ring = self.config.ring
        reach = min(ring, -(-longest // _KEYS_BLOCK) * _KEYS_BLOCK)
        held = (position + 1).clamp(max=ring)
        mask = torch.arange(reach, device=x.device) < held[:, None, None, None]
        row, slot = torch.arange(len(x), device=x.device), position % ring
        turn = Rotation.at(position[:, None], self._frequencies)
        for index, layer in enumerate(self._layers):
            q, k, v = self._qkv(layer, x, turn)
            cache = kv[:, index]
            cache[row, 0, :, slot] = k
            cache[row, 1, :, slot] = v
            found = functional.scaled_dot_product_attention(
                q[:, :, None], cache[:, 0, :, :reach], cache[:, 1, :, :reach], attn_mask=mask
            )
            x = self._after_attention(layer, x, found.reshape(x.shape))
        return rms_norm(x, self._out_norm)

    def extend(self, x: Tensor, kv: Tensor, start: int) -> Tensor:
        """Many positions of one call in one pass, after `start` positions that `kv` holds already.

        Args:
            x: [T, D] inputs of positions start .. start + T - 1.
            kv: [L, 2, H, P, head_dim] in the order of positions, P at least start + T; the new ones are written.

        Returns:
            [T, D], normalised.
        """
        end = start + len(x)
        position = torch.arange(start, end, device=x.device)
        behind = position[:, None] - torch.arange(end, device=x.device)
        mask = (behind >= 0) & (behind < self.config.ring)
        turn = Rotation.at(position[:, None], self._frequencies)
        for index, layer in enumerate(self._layers):
            q, k, v = (part.transpose(0, 1) for part in self._qkv(layer, x, turn))
            kv[index, 0, :, start:end] = k
            kv[index, 1, :, start:end] = v
            keys, values = kv[index, :, None, :, :end]
            found = functional.scaled_dot_product_attention(q[None], keys, values, attn_mask=mask)
            x = self._after_attention(layer, x, found[0].transpose(0, 1).reshape(x.shape))
        return rms_norm(x, self._out_norm)

    def _qkv(self, layer: _Layer, x: Tensor, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        heads = layer.qkv(rms_norm(x, layer.norm1)).view(len(x), 3, self.config.num_heads, -1)
        q, k = turn(heads[:, :2]).unbind(1)
        return q, k, heads[:, 2]

    def _after_attention(self, layer: _Layer, x: Tensor, found: Tensor) -> Tensor:
        x = x + layer.out(found)
        return x + gated(rms_norm(x, layer.norm2), layer.gate_in, layer.gate_out)

"""The temporal transformer: one position a step over a ring of keys and values, or many positions in one pass."""

import torch
from torch import Tensor
from torch.nn import functional

from app.engine.personaplex.model.config import LmConfig
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.linear import Linear
from app.engine.personaplex.model.ops import Rotation, frequencies, ops_for, rms_norm
from app.engine.personaplex.model.quantize import Matrix, Weights, empty_matrix
from app.engine.personaplex.model.ring import Ring

_KEYS_BLOCK = 64
"""Attention reads whole blocks of slots, so that sums do not depend on how long the other rows' calls are."""


class _Layer:
    def __init__(self, config: LmConfig, device: torch.device, dtype: torch.dtype, weights: Weights) -> None:
        def matrix(rows: int, inputs: int) -> Matrix:
            return empty_matrix(weights, rows, inputs, device, dtype)

        dim, hidden = config.dim, config.hidden
        self.norm1, self.norm2 = (torch.empty(dim, device=device, dtype=dtype) for _ in range(2))
        self._raw = [matrix(3 * dim, dim), matrix(dim, dim), matrix(2 * hidden, dim), matrix(dim, hidden)]
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

    def __init__(self, config: LmConfig, device: torch.device, dtype: torch.dtype, weights: Weights = "bf16") -> None:
        self.config = config
        self._layers = [_Layer(config, device, dtype, weights) for _ in range(config.num_layers)]
        self._out_norm = torch.empty(config.dim, device=device, dtype=dtype)
        self._frequencies = frequencies(config.head_dim, config.max_period, device)
        self._ops = ops_for(device)

    def entries(self) -> dict[str, Entry]:
        named = {"out_norm.alpha": Entry((1, 1, self.config.dim), self._out_norm)}
        for index, layer in enumerate(self._layers):
            named |= layer.entries(f"transformer.layers.{index}")
        return named

    def pack(self, rows: int) -> None:
        for layer in self._layers:
            layer.pack(rows)

    def step(self, x: Tensor, kv: Ring, position: Tensor, active: Tensor, longest: int) -> Tensor:
        """One position of every row.

        Args:
            x: [S, D] inputs.
            kv: of S rows; the slot of each row's position is written.
            position: int64 [S], absolute.
            active: bool [S]. What comes out for another row means nothing, and nothing is read for it where that saves
                time.
            longest: at least the most positions that any active row holds, this one included.

        Returns:
            [S, D], normalised: for the text head and the depformer.
        """
        ring, ops = self.config.ring, self._ops
        reach = min(ring, -(-longest // _KEYS_BLOCK) * _KEYS_BLOCK)
        held, slot = ops.held(position, active, ring), position % ring
        turn = Rotation.at(position[:, None], self._frequencies)
        y: Tensor | None = None
        for index, layer in enumerate(self._layers):
            cache = kv.layer(index)
            x, normed = ops.add_norm(x, y, layer.norm1)
            q = ops.append(self._heads(layer, normed), turn, cache, slot)
            x, normed = ops.add_norm(x, layer.out(ops.attend(q, cache, held, reach)), layer.norm2)
            y = layer.gate_out(ops.gate(layer.gate_in(normed)))
        return ops.add_norm(x, y, self._out_norm)[1]

    def extend(self, x: Tensor, kv: Ring, start: int) -> Tensor:
        """Many positions of one call in one pass, after `start` positions that `kv` holds already.

        Args:
            x: [T, D] inputs of positions start .. start + T - 1.
            kv: of one row, its slots in the order of positions, at least start + T; the new ones are written.

        Returns:
            [T, D], normalised.
        """
        end = start + len(x)
        position = torch.arange(start, end, device=x.device)
        behind = position[:, None] - torch.arange(end, device=x.device)
        mask = (behind >= 0) & (behind < self.config.ring)
        turn = Rotation.at(position[:, None], self._frequencies)
        new = (slice(None), slice(None), slice(None), slice(start, end))
        for index, layer in enumerate(self._layers):
            heads, cache = self._heads(layer, rms_norm(x, layer.norm1)), kv.layer(index)
            q, k = turn(heads[:, :2]).transpose(0, 2).unbind(1)
            cache.put(new, torch.stack((k, heads[:, 2].transpose(0, 1)))[None])
            keys, values = cache.read(end, x.dtype).unbind(1)
            found = functional.scaled_dot_product_attention(q[None], keys, values, attn_mask=mask)
            x = x + layer.out(found[0].transpose(0, 1).reshape(x.shape))
            x = x + layer.gate_out(self._ops.gate(layer.gate_in(rms_norm(x, layer.norm2))))
        return rms_norm(x, self._out_norm)

    def scale_keys(self, scale: Tensor) -> None:
        """Divide every key by `scale` float32 [L, H, head_dim / 2], one for each pair of channels that turn together,
        and multiply the queries by it: nothing that attention gives changes, and nothing at all where scales are powers
        of two. Before `pack`.
        """
        for layer, pairs in zip(self._layers, scale, strict=True):
            channels = pairs.repeat_interleave(2, -1).flatten()
            layer.qkv.scale_rows(torch.cat((channels, 1 / channels, torch.ones_like(channels))))

    def _heads(self, layer: _Layer, normed: Tensor) -> Tensor:
        return layer.qkv(normed).view(len(normed), 3, self.config.num_heads, -1)

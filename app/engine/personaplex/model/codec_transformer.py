"""The transformers on both sides of Mimi's quantizer: a few steps a frame over a ring of keys and values."""

import torch
from torch import Tensor
from torch.nn import functional

from app.engine.personaplex.model.config import MimiConfig
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.linear import SEVERAL, Linear
from app.engine.personaplex.model.ops import Rotation, frequencies

_EPSILON = 1e-5
_ALIGNED = 16


class _Layer:
    def __init__(self, config: MimiConfig, device: torch.device) -> None:
        width, hidden = config.d_model, config.dim_feedforward

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device)

        self._raw = {
            "self_attn.in_proj_weight": empty(3 * width, width),
            "self_attn.out_proj.weight": empty(width, width),
            "linear1.weight": empty(hidden, width),
            "linear2.weight": empty(width, hidden),
            "layer_scale_1.scale": empty(width),
            "layer_scale_2.scale": empty(width),
        }
        self._norms = {f"norm{n}.{part}": empty(width) for n in (1, 2) for part in ("weight", "bias")}
        self.qkv, self.out, self.widen, self.narrow = map(Linear, list(self._raw.values())[:4])

    def entries(self, place: str) -> dict[str, Entry]:
        return {f"{place}.{name}": Entry(tuple(w.shape), w) for name, w in (self._raw | self._norms).items()}

    def pack(self) -> None:
        """The layer scales go into the matrices before them."""
        self._raw["self_attn.out_proj.weight"].mul_(self._raw["layer_scale_1.scale"][:, None])
        self._raw["linear2.weight"].mul_(self._raw["layer_scale_2.scale"][:, None])
        self._raw.clear()
        for matrix in (self.qkv, self.out, self.widen, self.narrow):
            matrix.pack(SEVERAL)

    def norm(self, x: Tensor, number: int) -> Tensor:
        weight, bias = self._norms[f"norm{number}.weight"], self._norms[f"norm{number}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, _EPSILON)


class CodecTransformer:
    """Layers without a final norm. Keys are kept after rotation at their absolute position, so a slot needs no label:
    softmax does not ask for an order.
    """

    def __init__(self, place: str, config: MimiConfig, device: torch.device) -> None:
        self._place, self._config = f"{place}.transformer.layers", config
        self._layers = [_Layer(config, device) for _ in range(config.num_layers)]
        self._frequencies = frequencies(config.d_model // config.num_heads, config.max_period, device)

    def entries(self) -> dict[str, Entry]:
        named: dict[str, Entry] = {}
        for index, layer in enumerate(self._layers):
            named |= layer.entries(f"{self._place}.{index}")
        return named

    def pack(self) -> None:
        for layer in self._layers:
            layer.pack()

    def kv(self, rows: int) -> Tensor:
        """The rings of new streams: float32 [S, L, 2, H, ring, head_dim]."""
        heads = self._config.num_heads
        shape = (rows, len(self._layers), 2, heads, self._config.ring, self._config.d_model // heads)
        return torch.zeros(shape, device=self._frequencies.device)

    def __call__(self, x: Tensor, kv: Tensor, position: Tensor) -> Tensor:
        """The next T steps of every row.

        Args:
            x: [S, T, D].
            kv: as made by `kv`; the slots of the new steps are written.
            position: int64 [S], of the first new step, absolute.

        Returns:
            [S, T, D].
        """
        positions = position[:, None] + torch.arange(x.shape[1], device=x.device)
        row, slot = torch.arange(len(x), device=x.device)[:, None], positions % self._config.ring
        turn, seen = Rotation.at(positions, self._frequencies), self._seen(positions)
        for index, layer in enumerate(self._layers):
            q, k, v = self._qkv(layer, x, turn)
            cache = kv[:, index]
            cache[row, 0, :, slot] = k
            cache[row, 1, :, slot] = v
            keys, values = cache.unbind(1)
            found = functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen)
            x = x + layer.out(found.transpose(1, 2).flatten(2))
            x = x + layer.narrow(functional.gelu(layer.widen(layer.norm(x, 2))))
        return x

    def _qkv(self, layer: _Layer, x: Tensor, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        heads = layer.qkv(layer.norm(x, 1)).view(*x.shape[:2], 3 * self._config.num_heads, -1)
        turned, v = heads.tensor_split((2 * self._config.num_heads,), dim=2)
        q, k = turn(turned).chunk(2, dim=2)
        return q, k, v

    def _seen(self, positions: Tensor) -> Tensor:
        """Which slots each new step attends to: float32 [S, 1, T, ring], 0 for those and -inf for the others.

        All new steps are written before the first attends. In a full ring they have taken the oldest slots, so the
        first of a frame sees one key fewer than the last: the reference streams like this, and its codes show it.
        """
        newest = positions[:, -1:]
        held = newest - (newest - torch.arange(self._config.ring, device=positions.device)) % self._config.ring
        seen = (held >= 0)[:, None] & (held[:, None] <= positions[:, :, None])
        # Every layer would make these numbers of the truth values, and on a GPU lay them out again in rows of 16 bytes.
        steps, slots = seen.shape[1:]
        rows = torch.zeros(len(seen), 1, steps, -(-slots // _ALIGNED) * _ALIGNED, device=held.device)
        return rows[..., :slots].masked_fill_(~seen[:, None], -torch.inf)

"""The depformer: from one hidden state and a text token, the agent's eight codes, one after the other.

A checkpoint holds sixteen steps. The last eight guess the user's codes, which a live call always brings itself, and
nothing that is used depends on them: their weights are never read.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from app.engine.personaplex.model.config import CODEBOOKS, LmConfig
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.linear import Linear
from app.engine.personaplex.model.ops import ops_for
from app.engine.personaplex.model.quantize import Matrix, Weights, empty_matrix

Draw = Callable[[int, Tensor], Tensor]
"""(codebook, logits [S, card]) -> codes int64 [S]."""


class _Step:
    """The weights of one codebook in one layer."""

    def __init__(self, qkv: Matrix, out: Matrix, gate_in: Matrix, gate_out: Matrix) -> None:
        self.qkv, self.out, self.gate_in, self.gate_out = Linear(qkv), Linear(out), Linear(gate_in), Linear(gate_out)

    def pack(self, rows: int) -> None:
        for matrix in (self.qkv, self.out, self.gate_in, self.gate_out):
            matrix.pack(rows)


class _Layer:
    """Norms are shared by all steps; the matrices are not."""

    def __init__(self, config: LmConfig, device: torch.device, dtype: torch.dtype, weights: Weights) -> None:
        def matrix(rows: int, inputs: int) -> Matrix:
            return empty_matrix(weights, rows, inputs, device, dtype)

        dim, hidden = config.depformer_dim, config.depformer_hidden
        self._dep_q, self._dim = config.dep_q, dim
        self.norm1, self.norm2 = (torch.empty(dim, device=device, dtype=dtype) for _ in range(2))
        self._qkv, self._out = matrix(CODEBOOKS * 3 * dim, dim), matrix(CODEBOOKS * dim, dim)
        self._gates = [(matrix(2 * hidden, dim), matrix(dim, hidden)) for _ in range(CODEBOOKS)]
        qkvs: Sequence[Matrix] = self._qkv.chunk(CODEBOOKS)
        outs: Sequence[Matrix] = self._out.chunk(CODEBOOKS)
        self.steps = [_Step(qkv, out, *gate) for qkv, out, gate in zip(qkvs, outs, self._gates, strict=True)]

    def entries(self, place: str) -> dict[str, Entry]:
        dim, steps = self._dim, self._dep_q
        named = {
            f"{place}.norm1.alpha": Entry((1, 1, dim), self.norm1),
            f"{place}.norm2.alpha": Entry((1, 1, dim), self.norm2),
            f"{place}.self_attn.in_proj_weight": Entry((steps * 3 * dim, dim), self._qkv, len(self._qkv)),
            f"{place}.self_attn.out_proj.weight": Entry((steps * dim, dim), self._out, len(self._out)),
        }
        shapes = [tuple(gate.shape) for gate in self._gates[0]]
        for step in range(steps):
            used = self._gates[step] if step < CODEBOOKS else (None, None)
            for name, shape, gate in zip(("linear_in", "linear_out"), shapes, used, strict=True):
                named[f"{place}.gating.{step}.{name}.weight"] = Entry(shape, gate)
        return named

    def pack(self, rows: int) -> None:
        for step in self.steps:
            step.pack(rows)
        self._qkv = self._out = self.norm1.new_empty(0)
        self._gates.clear()


class Depformer:
    """Engine thread only. Source: Moshi, arXiv:2410.00037, section 3.4."""

    def __init__(self, config: LmConfig, device: torch.device, dtype: torch.dtype, weights: Weights = "bf16") -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        self.config = config
        dim, card = config.depformer_dim, config.card
        self._layers = [_Layer(config, device, dtype, weights) for _ in range(config.depformer_num_layers)]
        inputs = empty_matrix(weights, CODEBOOKS * dim, config.dim, device, dtype)
        self._input, self._inputs = Linear(inputs), inputs.chunk(CODEBOOKS)
        self._text_table = empty(config.text_card + 1, dim)
        self._tables = empty(CODEBOOKS - 1, card + 1, dim)
        self._heads = empty(CODEBOOKS, card, dim)
        self._head = [Linear(head) for head in self._heads]
        self._ops = ops_for(device)

    def entries(self) -> dict[str, Entry]:
        c = self.config
        named = {"depformer_text_emb.weight": Entry((c.text_card + 1, c.depformer_dim), self._text_table)}
        for index, layer in enumerate(self._layers):
            named |= layer.entries(f"depformer.layers.{index}")
        groups: tuple[tuple[str, Sequence[Matrix] | Tensor, int, tuple[int, int]], ...] = (
            ("depformer_in", self._inputs, c.dep_q, (c.depformer_dim, c.dim)),
            ("depformer_emb", self._tables, c.dep_q - 1, (c.card + 1, c.depformer_dim)),
            ("linears", self._heads, c.dep_q, (c.card, c.depformer_dim)),
        )
        for name, stack, count, shape in groups:
            for j in range(count):
                named[f"{name}.{j}.weight"] = Entry(shape, stack[j] if j < len(stack) else None)
        return named

    def pack(self, rows: int) -> None:
        for layer in self._layers:
            layer.pack(rows)
        for matrix in (self._input, *self._head):
            matrix.pack(rows)
        self._inputs, self._heads = (), self._tables.new_empty(0)

    def run(self, hidden: Tensor, text: Tensor, draw: Draw, steps: int = CODEBOOKS) -> Tensor:
        """The codes of the next position, int64 [S, steps].

        Args:
            hidden: [S, D] from the temporal transformer.
            text: int64 [S], the text token of the next position.
            draw: chooses a code a row from a codebook's logits.
            steps: how many codebooks, from the first.
        """
        rows, heads = len(hidden), self.config.depformer_num_heads
        inputs = self._input(hidden).view(rows, CODEBOOKS, -1)
        width = self.config.depformer_dim // heads
        cache = hidden.new_empty(len(self._layers), 2, rows, heads, steps, width)
        codes: list[Tensor] = []
        for j in range(steps):
            before = self._text_table[text] if j == 0 else self._tables[j - 1][codes[-1]]
            codes.append(draw(j, self._head[j](self._through_layers(j, inputs[:, j] + before, cache))))
        return torch.stack(codes, 1)

    def _through_layers(self, j: int, x: Tensor, cache: Tensor) -> Tensor:
        """Step j, [S, D]; `cache` [layers, 2, S, H, steps, head_dim] is what the steps of this frame keep."""
        add_norm = self._ops.add_norm
        y: Tensor | None = None
        for layer, held in zip(self._layers, cache, strict=True):
            step = layer.steps[j]
            x, normed = add_norm(x, y, layer.norm1)
            x, normed = add_norm(x, step.out(_attend(step.qkv(normed), held, j)), layer.norm2)
            y = step.gate_out(self._ops.gate(step.gate_in(normed)))
        assert y is not None, "a depformer has layers"
        return x + y


def _attend(qkv: Tensor, held: Tensor, j: int) -> Tensor:
    """Of one layer of step j: [S, 3 * D] -> [S, D]. `held` [2, S, H, steps, head_dim]: what this frame's steps keep."""
    rows, heads = held.shape[1:3]
    each = qkv.view(rows, 3, heads, -1)
    held[:, :, :, j] = each[:, 1:].transpose(0, 1)
    if j == 0:
        return each[:, 2].flatten(1)
    keys, values = held[:, :, :, : j + 1]
    return functional.scaled_dot_product_attention(each[:, 0, :, None], keys, values).flatten(1)

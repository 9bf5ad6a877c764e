"""Weights that say nothing, made where they are used: how long a tick takes does not depend on their values."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.quantize import Quantized
from app.engine.personaplex.model.ring import Ring, is_quantised

_SEED = 7


def fill_weights(entries: Mapping[str, Entry], device: torch.device, dtype: torch.dtype) -> None:
    """Every tensor that a checkpoint would bring, bounded so that activations stay about as large as speech's.

    Not zeros: a GPU that multiplies zeros draws less power, and may run faster than it ever will.
    """
    draw = torch.Generator(device).manual_seed(_SEED)
    for key, entry in entries.items():
        low, high = _range(key, entry.shape)
        if isinstance(entry.into, Quantized):
            for rows in entry.into.slices():
                part = entry.into[rows]
                part.copy_(torch.empty(part.shape, device=device, dtype=dtype).uniform_(low, high, generator=draw))
        elif entry.into is not None:
            entry.into.uniform_(low, high, generator=draw)


def fill_ring(ring: Ring) -> None:
    """Keys and values below 1 in every slot of every row, with room for one layer of one row beside it."""
    draw = torch.Generator(ring.values.device).manual_seed(_SEED)
    for row in range(len(ring.values)):
        for layer in ring.values[row]:
            layer.copy_(_numbers(layer, draw))
    if is_quantised(ring.values.dtype):
        ring.scales.fill_(1 / 128 if ring.values.dtype is torch.int8 else 1.0)


def _numbers(like: Tensor, draw: torch.Generator) -> Tensor:
    if like.dtype is torch.int8:
        return torch.empty_like(like).random_(-127, 128, generator=draw)
    wide = torch.bfloat16 if is_quantised(like.dtype) else like.dtype
    return torch.empty(like.shape, device=like.device, dtype=wide).uniform_(-1, 1, generator=draw).to(like.dtype)


def _range(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if key.endswith("cluster_usage") or ("norm" in key and not key.endswith("bias")):
        return 0.9, 1.1
    bound = 0.1 if "emb" in key or len(shape) == 1 else math.sqrt(3 / math.prod(shape[1:]))
    return -bound, bound

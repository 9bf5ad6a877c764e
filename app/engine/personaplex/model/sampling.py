"""Drawing tokens: per row a temperature, a top-k and a seed, all rows in the same few operations.

The noise is a hash of (seed, how many draws the row has made, codebook, rank), so what a row says depends neither on
who shares its batch nor on the device. Gumbel noise on the kept logits and an argmax draw from their softmax exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_BITS = 23


@dataclass
class Choice:
    """How freely each row chooses. All [S]; a temperature of 0 takes the likeliest."""

    seed: Tensor
    drawn: Tensor
    text_temperature: Tensor
    text_top_k: Tensor
    audio_temperature: Tensor
    audio_top_k: Tensor

    @classmethod
    def of(cls, rows: int, device: torch.device) -> "Choice":
        def whole() -> Tensor:
            return torch.zeros(rows, dtype=torch.int64, device=device)

        def real() -> Tensor:
            return torch.zeros(rows, dtype=torch.float32, device=device)

        return cls(whole(), whole(), real(), whole(), real(), whole())


def gumbel(seed: Tensor, drawn: Tensor, first: int, streams: int, ranks: int) -> Tensor:
    """Noise float32 [S, streams, ranks] for int64 [S] seeds and draws; `first` numbers the first stream.

    Source of the hash: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    device = seed.device
    stream = torch.arange(first, first + streams, device=device)[:, None]
    rank = torch.arange(ranks, device=device)
    place = _mixed(_mixed(seed) + drawn * _GOLDEN)[:, None, None] + (stream << 32) + rank
    bits = (_mixed(place * _GOLDEN) >> (64 - _BITS)) & ((1 << _BITS) - 1)
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-_BITS
    return -torch.log(-torch.log(uniform))


@dataclass(frozen=True, slots=True)
class Luck:
    """All that chance decides in a step: noise float32 [S, streams, ranks], -inf for ranks that a row may not draw, and
    what a row's logits are divided by, float32 [S, 1]. A temperature of 0 leaves the likeliest alone.
    """

    noise: Tensor
    heat: Tensor

    @classmethod
    def of(cls, noise: Tensor, temperature: Tensor, top_k: Tensor) -> "Luck":
        """
        Args:
            noise: from `gumbel`.
            temperature: [S]. 0 takes the likeliest.
            top_k: int64 [S]: how many of the likeliest tokens may be drawn; none may be more than there are ranks.
        """
        warm = temperature > 0
        most = torch.where(warm, top_k.clamp(min=1), 1)
        beyond = torch.arange(noise.shape[-1], device=noise.device) >= most[:, None, None]
        heat = torch.where(warm, temperature.clamp(min=1e-6), 1.0)[:, None]
        return cls(noise.masked_fill(beyond, -torch.inf), heat)


def draw(logits: Tensor, luck: Luck, stream: int) -> Tensor:
    """One token a row, int64 [S], from logits [S, V] of any float dtype."""
    noise = luck.noise[:, stream, : logits.shape[1]]
    best, tokens = _ranked(logits.to(torch.float32), noise.shape[1])
    return tokens.gather(1, (best / luck.heat + noise).argmax(1, keepdim=True))[:, 0]


def _ranked(logits: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    # All of them are sorted in one kernel on a GPU; choosing first takes several.
    return logits.topk(ranks, dim=1) if ranks < logits.shape[1] else logits.sort(dim=1, descending=True, stable=True)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right: torch's own copies the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)

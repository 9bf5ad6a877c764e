"""Mimi's split residual quantizer: one codebook for what is said, seven in a row for how it sounds."""

import torch
from torch import Tensor

from app.engine.personaplex.model.config import CODEBOOKS, MimiConfig
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.linear import Linear

_LEAST_USAGE = 1e-5


class Quantizer:
    """Both branches read the same latent, each through its own projection; what they decode to adds up.

    Source: Moshi, arXiv:2410.00037, section 3.3.
    """

    _into: Linear
    _out_of: Linear
    _centroids: Tensor
    _searches: list[Linear]

    def __init__(self, config: MimiConfig, device: torch.device) -> None:
        self._config = config
        width, latent = config.codebook_dim, config.dimension
        self._raw_into = torch.empty(2, width, latent, device=device)
        self._raw_out_of = torch.empty(latent, 2, width, device=device)
        self._usage = torch.empty(CODEBOOKS, config.bins, device=device)
        self._sums = torch.empty(CODEBOOKS, config.bins, width, device=device)

    def entries(self) -> dict[str, Entry]:
        width, latent = self._config.codebook_dim, self._config.dimension
        named = {}
        for branch, name in enumerate(("rvq_first", "rvq_rest")):
            place = f"quantizer.{name}"
            named[f"{place}.input_proj.weight"] = Entry((width, latent, 1), self._raw_into[branch])
            named[f"{place}.output_proj.weight"] = Entry((latent, width, 1), self._raw_out_of[:, branch])
        for book in range(self._config.codebooks_in_file):
            named |= self._codebook(book)
        return named

    def _codebook(self, book: int) -> dict[str, Entry]:
        place = "quantizer.rvq_first.vq.layers.0" if book == 0 else f"quantizer.rvq_rest.vq.layers.{book - 1}"
        bins, width, used = self._config.bins, self._config.codebook_dim, book < CODEBOOKS
        return {
            f"{place}._codebook._initialized": Entry((1,), None),
            f"{place}._codebook.cluster_usage": Entry((bins,), self._usage[book] if used else None),
            f"{place}._codebook.embedding_sum": Entry((bins, width), self._sums[book] if used else None),
        }

    def pack(self) -> None:
        """The file keeps sums and counts of what fell to each centroid in training."""
        self._centroids = self._sums / self._usage.clamp(min=_LEAST_USAGE)[..., None]
        self._half_norms = self._centroids.square().sum(-1) / 2
        self._into = Linear(self._raw_into.flatten(0, 1))
        self._out_of = Linear(self._raw_out_of.flatten(1))
        self._searches = [Linear(book) for book in self._centroids]
        for matrix in (self._into, self._out_of, *self._searches):
            matrix.pack()
        del self._raw_into, self._raw_out_of, self._usage, self._sums

    def encode(self, latent: Tensor) -> Tensor:
        """float32 [S, D] -> int64 codes [S, 8]."""
        first, rest = self._into(latent).chunk(2, -1)
        codes = [self._nearest(0, first)]
        for book in range(1, CODEBOOKS):
            codes.append(self._nearest(book, rest))
            rest = rest - self._centroids[book][codes[-1]]
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [S, 8] -> float32 latents [S, D]."""
        found = self._centroids[torch.arange(CODEBOOKS, device=codes.device), codes]
        return self._out_of(torch.cat((found[:, 0], found[:, 1:].sum(1)), -1))

    def _nearest(self, book: int, x: Tensor) -> Tensor:
        """By Euclidean distance: the least |x - c|^2 is the greatest x . c - |c|^2 / 2."""
        return (self._searches[book](x) - self._half_norms[book]).argmax(-1)

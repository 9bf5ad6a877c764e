"""The least time that a tick can take on a device: its bytes at the rate of a plain copy, or its multiplications."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from app.engine.personaplex.model.config import LmConfig, MimiConfig
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.ring import Ring
from app.engine.personaplex.timing import finish

_ROUNDS = 7
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}
_MULTIPLIED = {"cuda": 8192, "cpu": 1024}
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device was measured to do: bytes read and written a second by a copy, FLOPs a second by a product."""

    copy_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Floor:
    """The least milliseconds of a tick, and what they go for."""

    ms: float
    bound: str


@dataclass(frozen=True)
class Work:
    """What no tick can do without, counted from what is stored.

    `weights_bytes`: of every matrix, norm and codebook, read once whatever the rows are. `multiplied`: numbers in the
    language model's matrices, each a multiplication and an addition a row. `position_bytes`: keys, values and scales
    of one position. Left out, so that it stays the least: embeddings, activations, and the codec's multiplications.
    """

    lm: LmConfig
    mimi: MimiConfig
    weights_bytes: int
    multiplied: int
    position_bytes: int

    def bytes(self, rows: int, context: int) -> int:
        """Read and written by a tick of so many rows with `context` positions each, one of them new."""
        codec_slots = min(self.mimi.ring, self.mimi.downsample * context)
        codec_bytes = 2 * self.mimi.num_layers * 2 * codec_slots * self.mimi.d_model * _FLOAT32_BYTES
        return self.weights_bytes + rows * (self._held(context) * self.position_bytes + codec_bytes)

    def flops(self, rows: int, context: int) -> int:
        attention = 4 * self.lm.num_layers * self.lm.dim * self._held(context)
        return rows * (2 * self.multiplied + attention)

    def floor(self, limits: Limits, rows: int, context: int) -> Floor:
        moved_ms = self.bytes(rows, context) / limits.copy_bytes_per_s * 1000
        multiplied_ms = self.flops(rows, context) / limits.flops_per_s * 1000
        return Floor(moved_ms, "memory") if moved_ms >= multiplied_ms else Floor(multiplied_ms, "compute")

    def _held(self, context: int) -> int:
        """Slots read or written: the new position's are written, and need not be read back."""
        return min(context, self.lm.ring)


def work(
    lm: LmConfig, mimi: MimiConfig, lm_entries: Mapping[str, Entry], mimi_entries: Mapping[str, Entry], ring: Ring
) -> Work:
    """Count what is stored: the entries of both networks before `pack`, and any ring of the right kind."""
    matrices = [entry.into for key, entry in lm_entries.items() if entry.into is not None and "emb" not in key]
    codec = [entry.into for entry in mimi_entries.values() if entry.into is not None]
    weights_bytes = sum(matrix.nbytes for matrix in matrices) + sum(matrix.nbytes for matrix in codec)
    multiplied = sum(math.prod(matrix.shape) for matrix in matrices)
    position_bytes = (ring.values[0].nbytes + ring.scales[0].nbytes) // ring.slots
    return Work(lm, mimi, weights_bytes, multiplied, position_bytes)


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Medians of some large copies and square products in `dtype`. What they took is free again."""
    return Limits(_copy_bytes_per_s(device), _flops_per_s(device, dtype))


def _copy_bytes_per_s(device: torch.device) -> float:
    source = torch.zeros(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_s(lambda: target.copy_(source), device)


def _flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    side = _MULTIPLIED[device.type]
    one = torch.empty(side, side, dtype=dtype, device=device).uniform_(-1, 1)
    product = torch.empty_like(one)
    return 2 * side**3 / _median_s(lambda: torch.mm(one, one, out=product), device)


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    """Of one piece of work, given to the device four at a time so that giving it costs nothing."""
    times_s = []
    for _ in range(1 + _ROUNDS):
        finish(device)
        began_s = time.perf_counter()
        for _ in range(4):
            work()
        finish(device)
        times_s.append((time.perf_counter() - began_s) / 4)
    return statistics.median(times_s[1:])

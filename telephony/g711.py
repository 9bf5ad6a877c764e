"""Mu-law, the telephone network's eight-bit samples at 8 kHz. Source: ITU-T G.711."""

import warnings

import numpy as np
from numpy.typing import NDArray

with warnings.catch_warnings():
    # Python 3.11 and 3.12 announce the removal; from 3.13 the name comes from audioop-lts.
    warnings.simplefilter("ignore", DeprecationWarning)
    import audioop

SAMPLE_RATE_HZ = 8_000
BYTES_PER_MS = 8
ULAW_SILENCE = b"\xff"

_FULL_SCALE = 32_768
_TO_FLOAT = np.float32(1 / _FULL_SCALE)


def decode(ulaw: bytes | bytearray) -> NDArray[np.float32]:
    """Mu-law to float32 in [-1, 1], one sample a byte."""
    return np.frombuffer(audioop.ulaw2lin(ulaw, 2), np.int16) * _TO_FLOAT


def encode(pcm: NDArray[np.float32]) -> bytes:
    """Float32 samples to mu-law, one byte a sample. What lies outside [-1, 1] is clipped; NaN must not come here."""
    scaled = np.rint(pcm * _FULL_SCALE)
    return audioop.lin2ulaw(scaled.clip(-_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16).tobytes(), 2)


def peak(ulaw: bytes) -> float:
    """The loudest sample's magnitude in [0, 1]; 0 for no audio at all."""
    return audioop.max(audioop.ulaw2lin(ulaw, 2), 2) / _FULL_SCALE

"""Recordings of every kind, made as tests need them."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Kind = tuple[int, int]
PCM8, PCM16, PCM24, PCM32, FLOAT32, FLOAT64 = (1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)


def speech(rate_hz: int, length_s: float = 1.0, peak: float = 0.5) -> NDArray[np.float64]:
    """Something with the ups and downs of syllables."""
    time_s = np.arange(int(rate_hz * length_s)) / rate_hz
    return peak * np.sin(2 * np.pi * 220 * time_s) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s))


def write(path: Path, samples: NDArray[np.float64], rate_hz: int = 24_000, kind: Kind = PCM16) -> Path:
    """A wav file of one or more channels ([T] or [T, channels])."""
    tag, bits = kind
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    head = struct.pack("<HHIIHH", tag, channels, rate_hz, rate_hz * channels * bits // 8, channels * bits // 8, bits)
    data = encoded(samples.reshape(-1), kind)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    return path


def encoded(samples: NDArray[np.float64], kind: Kind) -> bytes:
    tag, bits = kind
    if tag == 3:
        return samples.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return np.round(samples * 127 + 128).astype(np.uint8).tobytes()
    whole = np.round(samples * (2 ** (bits - 1) - 1)).astype("<i4")
    return bytes(whole.view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes())

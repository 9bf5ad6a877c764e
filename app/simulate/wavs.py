"""Wav files of a call: what the caller says, and both sides of what was said."""

import wave
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from app.wav import WavFault, read_channels
from telephony import g711

__all__ = ["WavFault", "read_wav", "write_lanes"]

Pcm = NDArray[np.float32]


def read_wav(path: Path) -> Pcm:
    """Read speech as float32 mono at 8 kHz in [-1, 1], from a wav file of any rate, width and number of channels.

    Raises:
        WavFault
    """
    samples, rate_hz = read_channels(path)
    at_line_rate: Pcm = soxr.resample(samples.mean(axis=1, dtype=np.float32), rate_hz, g711.SAMPLE_RATE_HZ)
    return at_line_rate.clip(-1, 1)


def write_lanes(path: Path, left: bytes | bytearray, right: bytes | bytearray) -> None:
    """Write two lanes of mu-law as a stereo wav, 16 bits at 8 kHz; silence fills up the shorter."""
    length = max(len(left), len(right))
    lanes = [g711.decode(bytes(lane).ljust(length, g711.ULAW_SILENCE)) for lane in (left, right)]
    with wave.open(str(path), "wb") as wav:
        wav.setnchannels(2)
        wav.setsampwidth(2)
        wav.setframerate(g711.SAMPLE_RATE_HZ)
        wav.writeframes((np.stack(lanes, axis=1) * 32_768).astype("<i2").tobytes())

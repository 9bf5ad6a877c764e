"""A voice from a recording: what PersonaPlex is to sound like, out of a wav file of the user's own.

Outside the engine, which is sealed: soxr and pyloudnorm are the application's.
"""

from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from app.engine import SAMPLE_RATE_HZ, EngineFault
from app.wav import WavFault, read_channels

LOUDNESS_LUFS = -24.0
SHORTEST_S, LONGEST_S = 0.5, 30.0


class VoiceFault(EngineFault):
    """A recording cannot serve as a voice. One line: which file, what was found, what would be right."""


def read_voice(path: Path) -> NDArray[np.float32]:
    """A recording as PersonaPlex takes it: float32 mono at 24 kHz, its channels mixed, at -24 LUFS.

    Loudness is BS.1770's, integrated over the whole file. Peaks are not limited, as in PersonaPlex's own recipe: a
    sharp one may pass 1, which the codec takes as it is.

    Raises:
        VoiceFault: not a wav file, shorter than half a second, longer than 30 s (every 80 ms takes one of the
            model's 2,999 positions from the call), or silent.
    """
    import pyloudnorm

    try:
        samples, rate_hz = read_channels(path)
    except WavFault as fault:
        raise VoiceFault(str(fault)) from fault
    length_s = len(samples) / rate_hz
    if not SHORTEST_S <= length_s <= LONGEST_S:
        right = f"{SHORTEST_S} to {LONGEST_S:.0f} s of one person speaking are right for a voice"
        raise VoiceFault(f"{path}: has {length_s:.2f} s; {right}")
    pcm: NDArray[np.float32] = soxr.resample(samples.mean(axis=1, dtype=np.float32), rate_hz, SAMPLE_RATE_HZ)
    loudness_lufs = pyloudnorm.Meter(SAMPLE_RATE_HZ).integrated_loudness(pcm)
    if not np.isfinite(loudness_lufs):
        raise VoiceFault(f"{path}: is silent; a person speaking is right for a voice")
    return pcm * np.float32(10 ** ((LOUDNESS_LUFS - loudness_lufs) / 20))

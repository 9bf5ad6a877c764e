"""24 kHz to 16 kHz for the ears: the VAD and the recogniser were trained at 16 kHz."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from app.engine.contract import Pcm

_TAPS = 96
_CUTOFF_HZ = 7_200
_DESIGN_HZ = 48_000


def _design() -> tuple[Pcm, Pcm]:
    """A windowed sinc at 48 kHz, split into the two phases that a factor of 2/3 meets, each time-reversed."""
    t = np.arange(_TAPS) - (_TAPS - 1) / 2
    taps = 2 * np.sinc(2 * _CUTOFF_HZ / _DESIGN_HZ * t) * (2 * _CUTOFF_HZ / _DESIGN_HZ) * np.kaiser(_TAPS, 6.0)
    taps = taps.astype(np.float32)
    return taps[0::2][::-1].copy(), taps[1::2][::-1].copy()


_EVEN, _ODD = _design()


class TwoThirds:
    """A causal polyphase FIR with its own state; 1 ms of delay."""

    def __init__(self) -> None:
        self._past: Pcm = np.zeros(len(_EVEN) - 1, np.float32)

    def __call__(self, pcm: Pcm) -> Pcm:
        """float32 [3n] at 24 kHz to float32 [2n] at 16 kHz."""
        samples = np.concatenate([self._past, pcm])
        self._past = samples[len(pcm) :]
        windows = sliding_window_view(samples, len(_EVEN))
        out = np.empty(len(pcm) * 2 // 3, np.float32)
        out[0::2] = windows[0::3] @ _EVEN
        out[1::2] = windows[1::3] @ _ODD
        return out

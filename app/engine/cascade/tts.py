"""Text to speech: hibari, 24 kHz, its voice inside its wheel; and where in the sound each word begins."""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hibari import Hibari

from app.engine.cascade.spoken_form import spoken_form
from app.engine.contract import SAMPLE_RATE_HZ, EngineFault, Pcm

_GAIN = 1.8
_CEILING = 0.9
_QUIET = 0.004
_EDGE = SAMPLE_RATE_HZ // 200
_LEAD_S = 0.01
_PHRASE_PAUSE_S = 0.02
_PAUSE_S = {".": 0.24, "!": 0.24, "?": 0.24, ",": 0.12, ";": 0.16, ":": 0.16}


@dataclass(frozen=True, slots=True)
class Speech:
    """A clause as sound: float32 [n] at 24 kHz; `words` are (first sample, text with its space)."""

    pcm: Pcm
    words: tuple[tuple[int, str], ...]


class Voice:
    """Any thread may call it; one clause at a time."""

    def __init__(self, model: Path | None = None) -> None:
        """`model` is another hibari voice (.onnx). Raises EngineFault."""
        if model is not None and not model.is_file():
            raise EngineFault(f"CASCADE_TTS: {model} is not a file; a hibari voice (.onnx) is right")
        self._tts = Hibari(model=str(model) if model else None)
        self._lock = threading.Lock()

    def __call__(self, text: str) -> Speech:
        """A clause, or a phrase that another one follows: without punctuation at its end its pitch stays up."""
        pause_s = _PAUSE_S.get(text.rstrip()[-1:])
        with self._lock:
            pcm = self._tts(spoken_form(text) + ("" if pause_s else ","), seed=0)
        pcm = _framed_by_silence(_limited(pcm * _GAIN), pause_s or _PHRASE_PAUSE_S)
        return Speech(pcm, _timed(text, len(pcm)))


def _limited(pcm: Pcm) -> Pcm:
    """Peaks above the ceiling bend instead of clipping."""
    over = np.abs(pcm) > _CEILING / 2
    bent = np.sign(pcm) * (_CEILING / 2) * (1 + np.tanh(np.abs(pcm) / (_CEILING / 2) - 1))
    return np.where(over, bent, pcm).astype(np.float32)


def _framed_by_silence(pcm: Pcm, pause_s: float) -> Pcm:
    """Trim the synthesiser's own silence, fade both edges, and give the clause the pause its end asks for."""
    loud = np.flatnonzero(np.abs(pcm) > _QUIET)
    if len(loud) == 0:
        return np.zeros(int(pause_s * SAMPLE_RATE_HZ), np.float32)
    pcm = pcm[max(0, loud[0] - _EDGE) : loud[-1] + 4 * _EDGE].copy()
    pcm[:_EDGE] *= np.linspace(0, 1, min(_EDGE, len(pcm)), dtype=np.float32)
    pcm[-_EDGE:] *= np.linspace(1, 0, min(_EDGE, len(pcm)), dtype=np.float32)
    return np.pad(pcm, (int(_LEAD_S * SAMPLE_RATE_HZ), int(pause_s * SAMPLE_RATE_HZ)))


def _timed(text: str, samples: int) -> tuple[tuple[int, str], ...]:
    """Place each word by its share of the letters: near enough to know which words were said before a stop."""
    words = text.split()
    lengths = np.cumsum([0] + [len(spoken_form(word)) + 1 for word in words])
    return tuple((int(samples * at / lengths[-1]), word + " ") for at, word in zip(lengths[:-1], words, strict=True))

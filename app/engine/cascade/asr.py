"""Speech to text: moonshine tiny-en, whose weights are inside its wheel."""

import threading
from pathlib import Path

import numpy as np
from moonshine_voice.errors import MoonshineError
from moonshine_voice.moonshine_api import ModelArch
from moonshine_voice.transcriber import Transcriber
from moonshine_voice.utils import get_model_path

from app.engine.cascade.ears import RATE_HZ
from app.engine.contract import EngineFault, Pcm

_OPTIONS = {"vad_threshold": "0.0", "return_audio_data": "false"}
"""The whole utterance is one line: the row's own VAD has cut it already."""

_SHORTEST = RATE_HZ // 10


class Recogniser:
    """Any thread may call it; one utterance at a time."""

    def __init__(self, model: Path | None = None) -> None:
        """`model` is a folder with another moonshine tiny model. Raises EngineFault."""
        folder = model or get_model_path("tiny-en")
        try:
            self._transcriber = Transcriber(folder, ModelArch.TINY, options=_OPTIONS)
        except MoonshineError as error:
            raise EngineFault(
                f"CASCADE_ASR: {folder}: {error}; a folder with a moonshine tiny model is right"
            ) from error
        self._lock = threading.Lock()

    def __call__(self, pcm: Pcm) -> str:
        """float32 [n] at 16 kHz to its words, "" when there are none."""
        if len(pcm) < _SHORTEST:
            return ""
        with self._lock:
            lines = self._transcriber.transcribe_without_streaming(_levelled(pcm).tolist(), RATE_HZ).lines
        return " ".join(line.text.strip() for line in lines).strip()

    def close(self) -> None:
        with self._lock:
            self._transcriber.close()


def _levelled(pcm: Pcm) -> Pcm:
    """Bring a quiet line up to a peak of 0.5, by at most 20 dB."""
    peak = float(np.abs(pcm).max())
    return pcm * min(10.0, 0.5 / peak) if 0 < peak < 0.5 else pcm

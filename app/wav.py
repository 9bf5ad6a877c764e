"""Wav files in: any rate, any number of channels, integer or floating-point samples."""

import io
import struct
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

WAV_MAX_BYTES = 256 * 1024 * 1024
_PCM, _FLOAT = 1, 3
_EXTENSIBLE = 0xFFFE
_KINDS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 17: "IMA ADPCM", 49: "GSM", 85: "MP3"}
_WANTED = "integer PCM of 8, 16, 24 or 32 bits or floating point is right"


class WavFault(Exception):
    """A wav file cannot be used. One line: which file, what was found, what would be right."""


def read_channels(path: Path) -> tuple[Samples, int]:
    """Every channel of a wav file: float32 [T, channels], integer samples scaled to [-1, 1), and the rate in Hz.

    Raises:
        WavFault: no such file, another format, no sound in it, or a value that is no number.
    """
    data = _read(path)
    tag, plain = _plain(path, data)
    try:
        with wave.open(io.BytesIO(plain)) as wav:
            rate_hz, width, channels = wav.getframerate(), wav.getsampwidth(), wav.getnchannels()
            frames = wav.readframes(wav.getnframes())
    except (wave.Error, EOFError, struct.error) as error:
        raise WavFault(f"{path}: not a whole wav file ({error or 'it ends too soon'})") from error
    samples = _samples(path, frames, width, tag)
    samples = samples[: len(samples) // channels * channels].reshape(-1, channels)
    if not len(samples):
        raise WavFault(f"{path}: holds no sound")
    if not 1_000 <= rate_hz <= 768_000:
        raise WavFault(f"{path}: found a rate of {rate_hz} Hz; 8000 to 48000 Hz are usual")
    if not np.isfinite(samples).all():
        raise WavFault(f"{path}: found a sample that is no finite number; export the file again")
    return samples, rate_hz


def _read(path: Path) -> bytes:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > WAV_MAX_BYTES:
            raise WavFault(f"{path}: has {size_bytes} bytes; {WAV_MAX_BYTES} or fewer are right for a recording")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise WavFault(f"{path}: there is no such file") from error
    except OSError as error:
        raise WavFault(f"{path}: cannot be read: {error.strerror}") from error


def _plain(path: Path, data: bytes) -> tuple[int, bytearray]:
    """The format tag, and the same file with plain PCM written in its place.

    `wave` refuses floating point always, and WAVE_FORMAT_EXTENSIBLE before Python 3.12: 24-bit files are usually
    written so.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        found = "an empty file" if not data else f"a file that begins with {bytes(data[:4])!r}"
        raise WavFault(f"{path}: found {found}; a wav file is right")
    at = _format_at(path, data)
    tag = int.from_bytes(data[at : at + 2], "little")
    if tag == _EXTENSIBLE:
        tag = int.from_bytes(data[at + 24 : at + 26], "little")
    if tag not in (_PCM, _FLOAT):
        raise WavFault(f"{path}: found {_KINDS.get(tag, f'format {tag}')}; {_WANTED}")
    plain = bytearray(data)
    plain[at : at + 2] = _PCM.to_bytes(2, "little")
    return tag, plain


def _format_at(path: Path, data: bytes) -> int:
    at = 12
    while data[at : at + 4] not in (b"fmt ", b""):
        at += 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2
    if not data[at:]:
        raise WavFault(f"{path}: not a whole wav file (it has no format chunk)")
    return at + 8


def _samples(path: Path, frames: bytes, width: int, tag: int) -> Samples:
    frames = frames[: len(frames) // width * width]
    match tag == _FLOAT, width:
        case False, 1:
            return np.frombuffer(frames, np.uint8).astype(np.float32) * np.float32(2**-7) - np.float32(1)
        case False, 2:
            return np.frombuffer(frames, "<i2") * np.float32(2**-15)
        case False, 3:
            padded = np.zeros((len(frames) // 3, 4), np.uint8)
            padded[:, 1:] = np.frombuffer(frames, np.uint8).reshape(-1, 3)
            return padded.view("<i4").reshape(-1).astype(np.float32) * np.float32(2**-31)
        case False, 4:
            return np.frombuffer(frames, "<i4").astype(np.float32) * np.float32(2**-31)
        case True, 4:
            return np.frombuffer(frames, "<f4").astype(np.float32)
        case True, 8:
            with np.errstate(over="ignore"):
                return np.frombuffer(frames, "<f8").astype(np.float32)
    kind = "floating point of " if tag == _FLOAT else ""
    raise WavFault(f"{path}: found {kind}{8 * width} bits a sample; {_WANTED}")

"""Wav files in and out: what the caller says, and both sides of a call."""

import io
import struct
import wave
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from telephony import g711

Pcm = NDArray[np.float32]

WAV_MAX_BYTES = 256 * 1024 * 1024
_PCM = 1
_EXTENSIBLE = 0xFFFE
_KINDS = {2: "ADPCM", 3: "floating point", 6: "A-law", 7: "mu-law", 17: "IMA ADPCM", 49: "GSM", 85: "MP3"}
_WANTED = "integer PCM of 8, 16, 24 or 32 bits is right"


class WavFault(Exception):
    """A wav file cannot be used. One line: which file, what was found, what would be right."""


def read_wav(path: Path) -> Pcm:
    """Read speech as float32 mono at 8 kHz in [-1, 1], from integer PCM of any rate, width and number of channels.

    Raises:
        WavFault
    """
    data = _read(path)
    try:
        with wave.open(io.BytesIO(_plain(path, data))) as wav:
            rate_hz, width, channels = wav.getframerate(), wav.getsampwidth(), wav.getnchannels()
            frames = wav.readframes(wav.getnframes())
    except (wave.Error, EOFError, struct.error) as error:
        raise WavFault(f"{path}: not a whole wav file ({error or 'it ends too soon'})") from error
    samples = _samples(path, frames, width)
    samples = samples[: len(samples) // channels * channels].reshape(-1, channels).mean(axis=1, dtype=np.float32)
    if not len(samples):
        raise WavFault(f"{path}: holds no sound")
    if not 1_000 <= rate_hz <= 768_000:
        raise WavFault(f"{path}: found a rate of {rate_hz} Hz; 8000 to 48000 Hz are usual")
    at_line_rate: Pcm = soxr.resample(samples, rate_hz, g711.SAMPLE_RATE_HZ)
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


def _read(path: Path) -> bytes:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > WAV_MAX_BYTES:
            raise WavFault(f"{path}: has {size_bytes} bytes; {WAV_MAX_BYTES} or fewer are right for a caller's speech")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise WavFault(f"{path}: there is no such file") from error
    except OSError as error:
        raise WavFault(f"{path}: cannot be read: {error.strerror}") from error


def _plain(path: Path, data: bytes) -> bytearray:
    """The same file with its format tag written as plain PCM.

    `wave` refuses WAVE_FORMAT_EXTENSIBLE before Python 3.12, and 24-bit files are usually written so.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        found = "an empty file" if not data else f"a file that begins with {bytes(data[:4])!r}"
        raise WavFault(f"{path}: found {found}; a wav file is right")
    at = _format_at(data)
    tag = int.from_bytes(data[at : at + 2], "little")
    if tag == _EXTENSIBLE:
        tag = int.from_bytes(data[at + 24 : at + 26], "little")
    if tag != _PCM:
        raise WavFault(f"{path}: found {_KINDS.get(tag, f'format {tag}')}; {_WANTED}")
    plain = bytearray(data)
    plain[at : at + 2] = _PCM.to_bytes(2, "little")
    return plain


def _format_at(data: bytes) -> int:
    at = 12
    while data[at : at + 4] not in (b"fmt ", b""):
        at += 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2
    if not data[at:]:
        raise EOFError("it has no format chunk")
    return at + 8


def _samples(path: Path, frames: bytes, width: int) -> Pcm:
    frames = frames[: len(frames) // width * width]
    match width:
        case 1:
            return np.frombuffer(frames, np.uint8).astype(np.float32) * np.float32(2**-7) - np.float32(1)
        case 2:
            return np.frombuffer(frames, "<i2") * np.float32(2**-15)
        case 3:
            padded = np.zeros((len(frames) // 3, 4), np.uint8)
            padded[:, 1:] = np.frombuffer(frames, np.uint8).reshape(-1, 3)
            return padded.view("<i4").reshape(-1).astype(np.float32) * np.float32(2**-31)
        case 4:
            return np.frombuffer(frames, "<i4").astype(np.float32) * np.float32(2**-31)
    raise WavFault(f"{path}: found {8 * width} bits a sample; {_WANTED}")

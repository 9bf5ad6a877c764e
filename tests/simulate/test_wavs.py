"""Wav files of every usual kind are read alike; the others are refused in one line."""

import io
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.simulate.wavs import WavFault, read_wav, write_lanes
from telephony.g711 import decode, encode

TONE_HZ = 440.0


def tone(rate_hz: int, length_s: float = 0.5) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * TONE_HZ * np.arange(int(rate_hz * length_s)) / rate_hz)


def as_pcm(samples: NDArray[np.float64], width: int) -> bytes:
    if width == 1:
        return np.round(samples * 127 + 128).astype(np.uint8).tobytes()
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
    return bytes(whole.view(np.uint8).reshape(-1, 4)[:, :width].tobytes())


def wav_of(path: Path, rate_hz: int = 16_000, width: int = 2, channels: int = 1) -> Path:
    samples = np.repeat(tone(rate_hz), channels)
    with wave.open(str(path), "wb") as wav:
        wav.setnchannels(channels)
        wav.setsampwidth(width)
        wav.setframerate(rate_hz)
        wav.writeframes(as_pcm(samples, width))
    return path


def retagged(path: Path, tag: int, extension: bytes = b"") -> Path:
    """The same file with another format tag, and a longer format chunk."""
    data = path.read_bytes()
    head = struct.pack("<H", tag) + data[22:36] + extension
    inside = b"WAVEfmt " + struct.pack("<I", len(head)) + head + data[36:]
    path.write_bytes(b"RIFF" + struct.pack("<I", len(inside)) + inside)
    return path


def loudness_at(pcm: NDArray[np.float32], hz: float) -> float:
    turns = np.exp(-2j * np.pi * hz * np.arange(len(pcm)) / 8_000)
    return float(2 * abs(np.dot(pcm, turns)) / len(pcm))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_kind_of_pcm_sounds_the_same(tmp_path: Path, width: int, rate_hz: int, channels: int) -> None:
    pcm = read_wav(wav_of(tmp_path / "tone.wav", rate_hz, width, channels))

    assert pcm.dtype == np.float32
    assert len(pcm) == pytest.approx(4_000, abs=4)
    assert loudness_at(pcm, TONE_HZ) == pytest.approx(0.5, abs=0.01)


def test_the_two_sides_of_a_stereo_file_are_mixed(tmp_path: Path) -> None:
    path = tmp_path / "opposite.wav"
    with wave.open(str(path), "wb") as wav:
        wav.setnchannels(2)
        wav.setsampwidth(2)
        wav.setframerate(8_000)
        wav.writeframes(as_pcm(np.stack([tone(8_000), -tone(8_000)], axis=1).reshape(-1), 2))

    assert np.abs(read_wav(path)).max() < 0.001


def test_a_file_of_the_extensible_kind_is_read(tmp_path: Path) -> None:
    subformat = struct.pack("<HHIH", 22, 24, 4, 1) + bytes.fromhex("000000001000800000aa00389b71")
    path = retagged(wav_of(tmp_path / "tone.wav", 8_000, width=3), 0xFFFE, subformat)

    assert loudness_at(read_wav(path), TONE_HZ) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("tag", "kind"), [(6, "A-law"), (17, "IMA ADPCM"), (4_711, "format 4711")])
def test_a_file_of_another_encoding_is_named(tmp_path: Path, tag: int, kind: str) -> None:
    path = retagged(wav_of(tmp_path / "tone.wav"), tag)

    with pytest.raises(WavFault, match=f"tone.wav: found {kind}; integer PCM"):
        read_wav(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WavFault, match=r"nowhere\.wav: there is no such file"):
        read_wav(tmp_path / "nowhere.wav")


def test_a_folder_is_no_wav_file(tmp_path: Path) -> None:
    with pytest.raises(WavFault, match="cannot be read: Is a directory"):
        read_wav(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "an empty file"), (b"ID3\x04 a song", "begins with b'ID3"), (b"RIFF\0\0\0\0WAVE", "not a whole wav file")],
)
def test_what_is_no_wav_file_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "speech.wav"
    path.write_bytes(content)

    with pytest.raises(WavFault, match=rf"speech.wav: .*{found}"):
        read_wav(path)


@pytest.mark.parametrize("length", range(12, 44))
def test_a_header_that_breaks_off_is_refused(tmp_path: Path, length: int) -> None:
    path = wav_of(tmp_path / "speech.wav")
    path.write_bytes(path.read_bytes()[:length])

    with pytest.raises(WavFault, match=r"speech\.wav: "):
        read_wav(path)


def test_a_file_without_sound_is_refused(tmp_path: Path) -> None:
    path = wav_of(tmp_path / "speech.wav")
    path.write_bytes(path.read_bytes()[:44])

    with pytest.raises(WavFault, match="holds no sound"):
        read_wav(path)


def test_both_lanes_are_kept_sample_by_sample(tmp_path: Path) -> None:
    left, right = encode(np.full(100, 0.5, np.float32)), encode(np.full(60, -0.25, np.float32))

    write_lanes(tmp_path / "call.wav", left, right)

    with wave.open(io.BytesIO((tmp_path / "call.wav").read_bytes())) as wav:
        assert (wav.getnchannels(), wav.getsampwidth(), wav.getframerate()) == (2, 2, 8_000)
        lanes = np.frombuffer(wav.readframes(200), "<i2").reshape(-1, 2) / 32_768
    assert np.array_equal(lanes[:, 0], decode(left))
    assert np.array_equal(lanes[:60, 1], decode(right))
    assert not lanes[60:, 1].any()

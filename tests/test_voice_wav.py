"""Any ordinary recording of a voice is taken as PersonaPlex wants it; what cannot be one is named with the reason."""

from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
from numpy.typing import NDArray

from app.engine import EngineFault
from app.voice_wav import VoiceFault, read_voice
from app.wav import WavFault, read_channels
from tests.speech import FLOAT32, FLOAT64, PCM8, PCM16, PCM24, PCM32, Kind, speech, write


def loudness(pcm: NDArray[np.float32]) -> float:
    return float(pyloudnorm.Meter(24_000).integrated_loudness(pcm.astype(np.float64)))


@pytest.mark.parametrize("kind", [PCM8, PCM16, PCM24, PCM32, FLOAT32, FLOAT64])
@pytest.mark.parametrize("rate_hz", [8_000, 24_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_kind_of_recording_is_the_same_voice(tmp_path: Path, kind: Kind, rate_hz: int, channels: int) -> None:
    sides = np.repeat(speech(rate_hz)[:, None], channels, axis=1)
    pcm = read_voice(write(tmp_path / "voice.wav", sides, rate_hz, kind))

    right = speech(24_000) * np.max(pcm) / 0.5
    assert pcm.dtype == np.float32
    assert len(pcm) == pytest.approx(24_000, abs=2)
    assert loudness(pcm) == pytest.approx(-24, abs=0.01)
    assert np.abs(pcm[1000:-1000] - right[1000 : len(pcm) - 1000]).max() < 0.02 * np.max(pcm)


@pytest.mark.parametrize("peak", [0.003, 0.03, 1.0])
def test_quiet_and_loud_recordings_come_out_equally_loud(tmp_path: Path, peak: float) -> None:
    assert loudness(read_voice(write(tmp_path / "voice.wav", speech(24_000, peak=peak)))) == pytest.approx(-24, abs=0.1)


def test_loudness_is_measured_over_the_whole_file_without_its_pauses(tmp_path: Path) -> None:
    """BS.1770's gate: silence beside the speech does not make the speech louder."""
    voice = speech(24_000, 2.0)
    padded = np.concatenate([voice, np.zeros(6 * 24_000)])

    alone, with_pause = (read_voice(write(tmp_path / "voice.wav", samples)) for samples in (voice, padded))

    assert np.abs(alone).max() == pytest.approx(np.abs(with_pause).max(), rel=0.05)


def test_a_sharp_peak_is_left_as_it_is(tmp_path: Path) -> None:
    samples = 0.01 * speech(24_000, 2.0)
    samples[24_000] = 0.9

    assert np.abs(read_voice(write(tmp_path / "voice.wav", samples, kind=FLOAT32))).max() > 1


def test_the_two_sides_of_a_stereo_recording_are_mixed(tmp_path: Path) -> None:
    one_sided = np.stack([speech(24_000), np.zeros(24_000)], axis=1)
    mono = read_voice(write(tmp_path / "mono.wav", speech(24_000), kind=FLOAT32))

    assert np.allclose(read_voice(write(tmp_path / "voice.wav", one_sided, kind=FLOAT32)), mono, atol=1e-5)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (speech(24_000, 0.49), "has 0.49 s; 0.5 to 30 s of one person speaking are right for a voice"),
        (speech(24_000, 30.1), "has 30.10 s; 0.5 to 30 s"),
        (np.zeros(24_000), "is silent; a person speaking is right for a voice"),
        (speech(24_000, peak=1e-5), "is silent"),
        (np.stack([speech(24_000), -speech(24_000)], axis=1), "is silent"),
        (speech(24_000) * np.nan, "found a sample that is no finite number"),
    ],
)
def test_what_is_no_voice_is_named_with_the_reason(tmp_path: Path, samples: NDArray[np.float64], said: str) -> None:
    with pytest.raises(VoiceFault) as caught:
        read_voice(write(tmp_path / "voice.wav", samples, kind=FLOAT32))

    assert str(caught.value).startswith(f"{tmp_path / 'voice.wav'}: {said}")


def test_a_fault_of_a_voice_is_one_of_the_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match=r"voice\.wav: there is no such file"):
        read_voice(tmp_path / "voice.wav")


def test_half_a_second_is_enough_at_any_rate(tmp_path: Path) -> None:
    assert len(read_voice(write(tmp_path / "voice.wav", speech(8_000, 0.5), 8_000))) == 12_000


def test_a_number_too_large_for_us_is_no_finite_one(tmp_path: Path) -> None:
    with pytest.raises(WavFault, match="no finite number"):
        read_channels(write(tmp_path / "voice.wav", np.full(100, 1e300), kind=FLOAT64))


def test_floating_point_of_half_a_float_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "voice.wav", speech(24_000), kind=PCM16)
    data = bytearray(path.read_bytes())
    data[20] = 3
    path.write_bytes(data)

    with pytest.raises(WavFault, match="found floating point of 16 bits a sample"):
        read_channels(path)

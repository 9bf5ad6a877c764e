"""The filter is measured from outside, by what comes out for known tones, not read off its coefficients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from telephony.resample import Downsampler, Samples, Upsampler

LOW_HZ = 8_000
HIGH_HZ = 24_000


def tone(hz: float, rate_hz: int, seconds: float = 1.1) -> Samples:
    wave: Samples = np.cos(2 * np.pi * hz / rate_hz * np.arange(round(rate_hz * seconds))).astype(np.float32)
    return wave


def spectrum(pcm: Samples, rate_hz: int) -> NDArray[np.complex128]:
    """Amplitude and phase at each whole Hz up to half the rate, of the last second: whole-Hz tones do not leak."""
    settled = pcm[-rate_hz:].astype(np.float64)
    return np.fft.rfft(settled)[:-1] / rate_hz * 2


def decibels(amplitude: NDArray[np.float64] | float) -> float:
    return float(20 * np.log10(np.max(amplitude) + 1e-12))


PASSED_HZ = [50, 100, 300, 1000, 2000, 2500, 3000, 3200]
ALL_HZ = [*PASSED_HZ, 3400, 3600, 3800, 3900, 3950, 3990]
FOLDING_HZ = [4000, 4010, 4100, 4300, 4600, 5000, 6000, 7000, 7900, 8000, 8100, 9000, 11000, 11990]


@pytest.mark.parametrize("hz", PASSED_HZ)
def test_the_telephone_band_passes_within_a_decibel_both_ways(hz: int) -> None:
    up = spectrum(Upsampler().process(tone(hz, LOW_HZ)), HIGH_HZ)
    down = spectrum(Downsampler().process(tone(hz, HIGH_HZ)), LOW_HZ)

    assert abs(decibels(abs(up[hz]))) < 0.2
    assert abs(decibels(abs(down[hz]))) < 0.2


def test_the_band_edge_at_3400_hz_passes_within_a_decibel() -> None:
    assert decibels(abs(spectrum(Upsampler().process(tone(3400, LOW_HZ)), HIGH_HZ)[3400])) > -1
    assert decibels(abs(spectrum(Downsampler().process(tone(3400, HIGH_HZ)), LOW_HZ)[3400])) > -1


@pytest.mark.parametrize("hz", ALL_HZ)
def test_no_image_of_any_tone_is_louder_than_minus_60_decibels(hz: int) -> None:
    heard = np.abs(spectrum(Upsampler().process(tone(hz, LOW_HZ)), HIGH_HZ))
    heard[hz] = 0

    assert decibels(heard) < -60


@pytest.mark.parametrize("hz", FOLDING_HZ)
def test_no_alias_of_any_tone_is_louder_than_minus_60_decibels(hz: int) -> None:
    assert decibels(np.abs(spectrum(Downsampler().process(tone(hz, HIGH_HZ)), LOW_HZ))) < -60


@pytest.mark.parametrize("hz", [300, 1000, 2000, 3000, 3200])
def test_each_way_delays_the_band_by_one_and_a_half_to_three_milliseconds(hz: int) -> None:
    up, down = Upsampler(), Downsampler()

    def two_tones(rate_hz: int) -> Samples:
        return np.float32(0.5) * (tone(hz, rate_hz) + tone(hz + 10, rate_hz))

    def delay_ms(pcm: Samples, rate_hz: int) -> float:
        """By the slope of the phase between two near tones."""
        heard = spectrum(pcm, rate_hz)
        return float(np.angle(heard[hz] / heard[hz + 10]) / (2 * np.pi * 10) * 1000)

    assert delay_ms(up.process(two_tones(LOW_HZ)), HIGH_HZ) == pytest.approx(61 / 24, abs=0.01)
    # A low-rate sample is made when the last of its three is in, so it stands two high-rate samples earlier.
    assert delay_ms(down.process(two_tones(HIGH_HZ)), LOW_HZ) == pytest.approx(59 / 24, abs=0.01)


def test_an_impulse_comes_back_40_samples_later_and_nothing_before_it_sounds() -> None:
    impulse = np.zeros(640, np.float32)
    impulse[0] = 1

    up = Upsampler().process(impulse)
    back = Downsampler().process(up)

    assert int(up.argmax()) == 61
    assert int(back.argmax()) == 40
    assert up.sum() == pytest.approx(3, abs=1e-3)
    assert back.sum() == pytest.approx(1, abs=1e-3)
    assert not up[123:].any()


def test_a_constant_keeps_its_level_in_every_phase() -> None:
    steady = np.full(640, 0.5, np.float32)

    up = Upsampler().process(steady)
    down = Downsampler().process(np.full(1920, 0.5, np.float32))

    assert up[123:] == pytest.approx(0.5, abs=5e-4)
    assert down[41:] == pytest.approx(0.5, abs=1e-6)


@given(st.lists(st.integers(0, 900), max_size=12), st.integers(0, 2**32 - 1))
def test_the_output_is_the_same_however_the_input_is_cut(cuts: list[int], seed: int) -> None:
    speech = np.random.default_rng(seed).uniform(-1, 1, 3000).astype(np.float32)
    where = np.minimum(np.cumsum(cuts), 1000)

    up, down = Upsampler(), Downsampler()
    in_parts_up = np.concatenate([up.process(part) for part in np.split(speech[:1000], where)])
    in_parts_down = np.concatenate([down.process(part) for part in np.split(speech, where * 3)])

    assert np.abs(in_parts_up - Upsampler().process(speech[:1000])).max() < 1e-6
    assert np.abs(in_parts_down - Downsampler().process(speech)).max() < 1e-6


def test_a_tone_in_packets_has_no_click_at_their_edges() -> None:
    """A click is a jump of the slope: the second difference of a 400 Hz tone is tiny everywhere, edges too."""
    up, down = Upsampler(), Downsampler()
    packets = np.split(tone(400, LOW_HZ, 0.8), 40)

    high = np.concatenate([up.process(packet) for packet in packets])[200:]
    low = np.concatenate([down.process(part) for part in np.split(high[: 480 * 38], 38)])[60:]

    assert np.abs(np.diff(high, 2)).max() < 1.05 * (2 * np.pi * 400 / HIGH_HZ) ** 2
    assert np.abs(np.diff(low, 2)).max() < 1.05 * (2 * np.pi * 400 / LOW_HZ) ** 2


def test_two_calls_share_no_state() -> None:
    first, second = Upsampler(), Upsampler()
    first.process(tone(1000, LOW_HZ))

    assert not second.process(np.zeros(640, np.float32)).any()


def test_nothing_in_is_nothing_out() -> None:
    nothing = np.zeros(0, np.float32)

    assert Upsampler().process(nothing).shape == (0,)
    assert Downsampler().process(nothing).shape == (0,)


def test_stereo_and_broken_threes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 640\)"):
        Upsampler().process(np.zeros((2, 640), np.float32))
    with pytest.raises(ValueError, match="multiple of 3"):
        Downsampler().process(np.zeros(1000, np.float32))

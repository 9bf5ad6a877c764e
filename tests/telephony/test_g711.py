import numpy as np

from telephony import g711


def test_both_of_mu_laws_zeros_are_silence() -> None:
    assert not g711.decode(b"\xff\x7f" * 80).any()
    assert g711.encode(np.zeros(4, np.float32)) == g711.ULAW_SILENCE * 4


def test_every_code_comes_back_as_itself() -> None:
    codes = bytes(code for code in range(256) if code != 0x7F)

    assert g711.encode(g711.decode(codes)) == codes


def test_known_codes_have_the_values_of_the_standard() -> None:
    """G.711, table 2: the largest value is 8031 of 14 bits, the smallest step above zero is 2."""
    assert g711.decode(b"\x80\x00\xfe").tolist() == [8031 * 4 / 32768, -8031 * 4 / 32768, 2 * 4 / 32768]


def test_what_is_too_loud_is_clipped_and_never_wraps() -> None:
    assert g711.encode(np.array([1.0, 7.0, -1.0, -7.0], np.float32)) == b"\x80\x80\x00\x00"


def test_speech_survives_within_the_resolution_of_mu_law() -> None:
    tone = (0.5 * np.sin(np.arange(800) * 0.3)).astype(np.float32)

    noise = g711.decode(g711.encode(tone)) - tone

    assert 10 * np.log10(np.mean(tone**2) / np.mean(noise**2)) > 35


def test_the_peak_is_that_of_the_loudest_sample_of_either_sign() -> None:
    assert g711.peak(b"\xff" * 159 + b"\x00") == 8031 * 4 / 32768
    assert g711.peak(b"\xff\x7f") == 0
    assert g711.peak(b"") == 0

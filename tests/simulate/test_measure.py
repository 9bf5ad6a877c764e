"""What is measured on a lane: faults that were put in are found, and speech as people speak it has none."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.simulate.measure import (
    Hole,
    Span,
    clicks,
    edge_roughness,
    holes,
    loud_windows,
    silent_from,
    spans,
    speech_within,
)
from app.simulate.playback import Playback
from app.simulate.wavs import read_wav
from telephony.g711 import encode

RECORDINGS = Path(__file__).resolve().parents[2] / "app" / "simulate" / "recordings"
SENTENCES = ("hours", "price", "address", "unknown", "everything", "interrupt", "goodbye")

Pcm = NDArray[np.float32]


def vowel(length_s: float, level: float = 0.3) -> Pcm:
    """A voiced sound: harmonics of 110 Hz, steady from its first sample to its last."""
    at_s = np.arange(int(8_000 * length_s)) / 8_000
    harmonics = [np.sin(2 * np.pi * 110 * harmonic * at_s) / harmonic for harmonic in range(1, 20)]
    wave: Pcm = np.sum(harmonics, axis=0).astype(np.float32)
    return wave * np.float32(level / np.abs(wave).max())


def faded(pcm: Pcm, fade_s: float = 0.03) -> Pcm:
    """The same, coming out of silence and going back into it."""
    ramp = np.minimum(1, np.arange(len(pcm)) / (8_000 * fade_s)).astype(np.float32)
    return pcm * ramp * ramp[::-1]


def silence(length_s: float) -> Pcm:
    return np.zeros(int(8_000 * length_s), np.float32)


def played(*pieces: Pcm) -> Playback:
    """All of it sent in messages of 80 ms, just in time."""
    ulaw = encode(np.concatenate(pieces))
    playback = Playback()
    for at in range(0, len(ulaw), 640):
        playback.play(ulaw[at : at + 640], now=at)
    playback.advance(len(ulaw))
    return playback


def played_with_a_gap(speech: Pcm, at: int, gap: int) -> Playback:
    """The carrier has nothing to play for `gap` samples from `at` on."""
    ulaw = encode(speech)
    playback = Playback()
    playback.play(ulaw[:at], now=0)
    playback.play(ulaw[at:], now=at + gap)
    playback.advance(len(ulaw) + gap)
    return playback


def shipped(name: str) -> Pcm:
    return read_wav(RECORDINGS / f"{name}.wav")


def test_an_underrun_inside_a_word_is_a_hole() -> None:
    found = holes(played_with_a_gap(vowel(1.0), at=4_000, gap=800))

    assert found == [Hole(0.5, 0.1, "underrun")]


def test_an_underrun_too_short_to_be_heard_is_none() -> None:
    assert holes(played_with_a_gap(vowel(1.0), at=4_000, gap=400)) == []


def test_an_underrun_between_two_answers_is_no_hole() -> None:
    speech = np.concatenate([faded(vowel(1.0)), silence(1.0), faded(vowel(1.0))])

    assert holes(played_with_a_gap(speech, at=12_000, gap=4_000)) == []


def test_the_silence_after_a_flush_is_no_hole() -> None:
    playback = Playback()
    playback.play(encode(vowel(1.0)), now=0)
    playback.clear(now=4_000)
    playback.play(encode(vowel(0.5)), now=4_800)
    playback.advance(9_000)

    assert holes(playback) == []


def test_silence_sent_in_the_middle_of_a_vowel_is_a_hole() -> None:
    found = holes(played(vowel(0.503), silence(0.080), vowel(0.5)))

    assert [hole.cause for hole in found] == ["silence"]
    assert found[0].start_s == pytest.approx(0.503, abs=0.001)
    assert found[0].length_s == pytest.approx(0.080, abs=0.001)


@pytest.mark.parametrize("pause_s", [0.08, 0.2, 0.35])
def test_a_pause_that_speech_fades_into_is_no_hole(pause_s: float) -> None:
    assert holes(played(faded(vowel(0.5)), silence(pause_s), faded(vowel(0.5)))) == []


def test_a_plosive_out_of_silence_is_no_hole() -> None:
    assert holes(played(faded(vowel(0.5)), silence(0.09), vowel(0.5))) == []


@pytest.mark.parametrize("name", SENTENCES)
def test_whole_sentences_have_neither_holes_nor_clicks(name: str) -> None:
    playback = played(shipped(name))

    assert holes(playback) == []
    assert clicks(playback) == []


@pytest.mark.parametrize("name", SENTENCES)
def test_a_frame_lost_in_a_sentence_is_a_hole(name: str) -> None:
    pcm = shipped(name)
    loudest = int(np.argmax(np.convolve(np.square(pcm), np.ones(800), "same")))
    pcm[loudest : loudest + 640] = 0

    assert [hole.cause for hole in holes(played(pcm))] == ["silence"]


def test_a_jump_at_the_edge_of_a_packet_is_a_click() -> None:
    pcm = vowel(1.0, level=0.1)
    pcm[4_000:] += 0.3

    assert clicks(played(pcm)) == [0.5]


def test_the_same_jump_inside_a_packet_is_no_edge_of_ours() -> None:
    pcm = vowel(1.0, level=0.1)
    pcm[4_037:] += 0.3

    assert clicks(played(pcm)) == []


def test_speech_that_was_never_cut_is_as_smooth_at_the_edges() -> None:
    roughness = edge_roughness(played(*(shipped(name) for name in SENTENCES)))

    assert roughness == pytest.approx(1.0, abs=0.15)


def test_a_filter_that_forgets_its_state_is_rough_at_the_edges() -> None:
    whole = np.concatenate([shipped(name) for name in SENTENCES])
    kernel = np.hanning(7) / np.hanning(7).sum()
    forgetful = [np.convolve(whole[at : at + 160], kernel, "same") for at in range(0, len(whole) // 160 * 160, 160)]

    roughness = edge_roughness(played(np.concatenate(forgetful).astype(np.float32)))

    assert roughness is not None
    assert roughness > 1.5


def test_a_few_words_are_too_little_to_judge_the_edges() -> None:
    assert edge_roughness(played(shipped("address"))) is None


def test_speech_is_split_at_long_silences_only() -> None:
    loud = loud_windows(np.concatenate([silence(0.5), vowel(0.3), silence(0.2), vowel(0.3), silence(1.0), vowel(0.2)]))

    assert spans(loud, 0.3) == [Span(0.5, pytest.approx(1.3)), Span(pytest.approx(2.3), pytest.approx(2.5))]  # type: ignore[arg-type]


def test_where_a_recording_begins_and_ends_is_where_it_is_loud() -> None:
    within = speech_within(np.concatenate([silence(0.25), faded(vowel(0.5), 0.005), silence(0.4)]))

    assert within.start_s == pytest.approx(0.25, abs=0.011)
    assert within.end_s == pytest.approx(0.75, abs=0.011)


def test_speech_stops_where_no_word_follows() -> None:
    loud = loud_windows(np.concatenate([vowel(1.0), silence(0.2), vowel(0.3), silence(2.0), vowel(0.5)]))

    assert silent_from(loud, 0.5) == pytest.approx(1.5)


def test_there_is_nothing_to_stop_in_silence() -> None:
    loud = loud_windows(np.concatenate([vowel(1.0), silence(2.0), vowel(0.5)]))

    assert silent_from(loud, 2.0) is None

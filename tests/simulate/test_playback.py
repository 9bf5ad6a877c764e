"""The carrier's playback buffer: what is heard when, and which marks come back when."""

from app.simulate.playback import Dry, Playback
from telephony.g711 import ULAW_SILENCE

SPEECH = b"\x20"
MORE = b"\x40"


def test_audio_is_heard_from_the_moment_it_comes() -> None:
    playback = Playback()

    playback.play(SPEECH * 160, now=800)
    playback.advance(1_000)

    assert bytes(playback.lane) == ULAW_SILENCE * 800 + SPEECH * 160 + ULAW_SILENCE * 40


def test_audio_that_comes_early_waits_for_its_turn() -> None:
    playback = Playback()

    playback.play(SPEECH * 160, now=0)
    playback.play(MORE * 160, now=10)
    playback.advance(320)

    assert bytes(playback.lane) == SPEECH * 160 + MORE * 160
    assert playback.pieces == [0, 160]
    assert playback.dry == []


def test_nothing_is_heard_ahead_of_time() -> None:
    playback = Playback()

    playback.play(SPEECH * 8_000, now=0)
    playback.advance(100)

    assert bytes(playback.lane) == SPEECH * 100


def test_a_mark_comes_back_when_all_before_it_has_been_heard() -> None:
    playback = Playback()
    playback.play(SPEECH * 160, now=0)

    assert playback.mark("a", now=0) == []
    assert playback.play(MORE * 160, now=0) == []
    assert playback.mark("b", now=0) == []
    assert playback.advance(159) == []
    assert playback.advance(160) == ["a"]
    assert playback.advance(319) == []
    assert playback.advance(320) == ["b"]


def test_a_mark_with_nothing_before_it_comes_back_at_once() -> None:
    assert Playback().mark("a", now=40) == ["a"]


def test_a_clear_ends_the_speech_and_gives_all_marks_back() -> None:
    playback = Playback()
    playback.play(SPEECH * 800, now=0)
    playback.mark("a", now=0)
    playback.play(SPEECH * 800, now=0)
    playback.mark("b", now=0)

    assert playback.clear(now=200) == ["a", "b"]
    assert playback.flushes == [200]
    assert playback.advance(1_000) == []
    assert bytes(playback.lane) == SPEECH * 200 + ULAW_SILENCE * 800


def test_a_clear_with_nothing_waiting_is_no_flush() -> None:
    playback = Playback()
    playback.play(SPEECH * 160, now=0)

    playback.clear(now=400)

    assert playback.flushes == []


def test_what_comes_after_a_clear_is_heard_whole() -> None:
    playback = Playback()
    playback.play(SPEECH * 800, now=0)
    playback.clear(now=200)

    playback.play(MORE * 100, now=300)
    playback.mark("after", now=300)

    assert playback.advance(400) == ["after"]
    assert bytes(playback.lane[200:]) == ULAW_SILENCE * 100 + MORE * 100


def test_an_underrun_is_known_to_the_sample() -> None:
    playback = Playback()
    playback.play(SPEECH * 160, now=0)

    for now in range(0, 1_000, 160):
        playback.advance(now)
    playback.play(SPEECH * 160, now=1_003)

    assert playback.dry == [Dry(160, 1_003, flushed=False)]


def test_the_silence_after_a_clear_is_known_as_wanted() -> None:
    playback = Playback()
    playback.play(SPEECH * 800, now=0)
    playback.clear(now=200)
    playback.play(SPEECH * 160, now=600)
    playback.advance(1_000)

    assert playback.dry == [Dry(200, 600, flushed=True), Dry(760, 1_000, flushed=False)]


def test_the_time_before_the_first_audio_is_no_underrun() -> None:
    playback = Playback()

    playback.advance(4_000)

    assert playback.dry == []

import numpy as np
import pytest

from app.engine.cascade.words import endpoint_ms, is_backchannel, is_hum, takes_the_turn, words_of


@pytest.mark.parametrize("text", ["Mm-hmm.", "mhm", "Uh-huh", "Okay.", "Yeah, okay.", "Oh, I see.", "Right", "Hmm"])
def test_sounds_of_listening_are_backchannels(text: str) -> None:
    assert is_backchannel(text)


@pytest.mark.parametrize("text", ["Wait, stop.", "No.", "How much?", "Okay, but when do you close?", "Tuesday."])
def test_words_are_not_backchannels(text: str) -> None:
    assert not is_backchannel(text)


def test_wait_and_stop_take_the_turn_at_once() -> None:
    assert takes_the_turn(["Wait,"], 200)
    assert takes_the_turn(["The.", "Stop."], 300)


def test_another_word_that_means_stop_takes_the_turn_once_it_was_seen_twice() -> None:
    assert not takes_the_turn(["Sorry,"], 300)
    assert takes_the_turn(["Sorry,", "Sorry."], 400)


def test_a_first_guess_that_changes_takes_nothing() -> None:
    """A hum is often first recognised as "No," and then as what it is."""
    assert not takes_the_turn(["No,", "Mm-"], 400)
    assert not takes_the_turn(["No,", "Mm-", "Mm-h"], 500)


def test_a_hum_never_takes_the_turn_however_long() -> None:
    assert not takes_the_turn(["Mm-hmm.", "Mm-hmm."], 1_500)


def test_three_words_or_a_question_begun_take_the_turn() -> None:
    assert not takes_the_turn(["Our shop", "Our shop"], 600)
    assert takes_the_turn(["Our shop", "Our shop is"], 700)
    assert takes_the_turn(["How", "How much"], 500)


def test_a_second_of_words_takes_the_turn() -> None:
    assert takes_the_turn(["Tuesday", "Tuesday"], 1_000)


def test_a_turn_ends_soon_after_a_question_and_late_after_half_a_sentence() -> None:
    question, statement = endpoint_ms("What time do you close?"), endpoint_ms("I would like a bike.")

    assert question < statement < endpoint_ms("I would like a bike and")
    assert endpoint_ms("Great,") > statement


def test_case_and_punctuation_do_not_matter_to_words() -> None:
    assert words_of("Wait — it\u2019s $35, uh-huh!") == ["wait", "it's", "$35", "uh-huh"]


def test_a_closed_mouth_is_told_from_an_open_one() -> None:
    t = np.arange(8_000) / 16_000
    hum = (np.sin(2 * np.pi * 120 * t) + 0.3 * np.sin(2 * np.pi * 240 * t)).astype(np.float32)
    vowel = hum + 0.4 * np.sin(2 * np.pi * 1_800 * t).astype(np.float32)

    assert is_hum(hum)
    assert not is_hum(vowel)

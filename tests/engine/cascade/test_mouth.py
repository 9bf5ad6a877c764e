from collections import deque

import numpy as np

from app.engine.cascade.mouth import Mouth
from app.engine.cascade.tts import Speech
from app.engine.contract import FRAME_SAMPLES


class Clauses:
    """What a worker fills while the mouth plays."""

    def __init__(self, *speech: Speech, finished: bool = True) -> None:
        self.speech = deque(speech)
        self.finished = finished


def clause(samples: int, *words: tuple[int, str], level: float = 0.5) -> Speech:
    return Speech(np.full(samples, level, np.float32), words)


def test_a_clause_comes_out_sample_for_sample_with_each_word_in_its_frame() -> None:
    mouth = Mouth()
    mouth.play(Clauses(clause(FRAME_SAMPLES * 2, (0, "Good "), (FRAME_SAMPLES, "morning. "))))

    first, second = mouth.next(), mouth.next()

    assert np.all(first[0] == 0.5)
    assert np.all(second[0] == 0.5)
    assert (first[1], first[2]) == ("Good ", False)
    assert (second[1], second[2]) == ("morning. ", True)
    assert mouth.said == "Good morning. "


def test_the_next_clause_follows_in_the_same_frame_without_a_gap() -> None:
    mouth = Mouth()
    mouth.play(Clauses(clause(1_000, (0, "Yes, ")), clause(5_000, (0, "we do. "), level=0.25)))

    pcm, text, _ = mouth.next()

    assert np.all(pcm[:1_000] == 0.5)
    assert np.all(pcm[1_000:] == 0.25)
    assert text == "Yes, we do. "


def test_silence_is_spoken_while_the_worker_is_still_thinking() -> None:
    mouth, clauses = Mouth(), Clauses(finished=False)
    mouth.play(clauses)

    assert not mouth.next()[0].any()
    assert mouth.busy
    assert not mouth.started
    clauses.speech.append(clause(100, (0, "Hi. ")))
    clauses.finished = True
    assert mouth.next()[1:] == ("Hi. ", True)
    assert not mouth.busy


def test_a_stop_fades_within_ten_milliseconds_and_keeps_only_what_was_said() -> None:
    mouth = Mouth()
    mouth.play(Clauses(clause(FRAME_SAMPLES * 9, (0, "One "), (FRAME_SAMPLES * 5, "two. "))))
    mouth.next()

    last = mouth.stop()

    assert last[0] == 0.5
    assert np.all(np.diff(last[:240]) <= 0)
    assert not last[240:].any()
    assert not mouth.busy
    assert mouth.said == "One "


def test_a_stop_before_the_first_sound_leaves_the_clauses_to_be_said_another_time() -> None:
    mouth, clauses = Mouth(), Clauses(finished=False)
    mouth.play(clauses)
    mouth.next()
    clauses.speech.append(clause(100, (0, "Hi. ")))
    clauses.finished = True

    assert not mouth.stop().any()
    assert not mouth.busy
    mouth.play(clauses)
    assert mouth.next()[1:] == ("Hi. ", True)


def test_a_mouth_with_nothing_to_say_is_silent() -> None:
    pcm, text, ends = Mouth().next()

    assert not pcm.any()
    assert (text, ends) == ("", False)

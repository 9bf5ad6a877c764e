import numpy as np

from app.engine import FRAME_SAMPLES, Heard, Spoken
from app.store import TranscriptLine
from app.transcript import Transcript

PCM = np.zeros(FRAME_SAMPLES, np.float32)


class Kept:
    """The last form of each line, and how often it was kept."""

    def __init__(self) -> None:
        self.lines: dict[int, TranscriptLine] = {}
        self.writes = 0

    def __call__(self, line: TranscriptLine) -> None:
        self.lines[line.number] = line
        self.writes += 1

    def texts(self) -> list[tuple[str, str, bool]]:
        return [(line.role, line.text, line.final) for _, line in sorted(self.lines.items())]


def test_the_agents_words_grow_into_one_line_kept_at_every_word() -> None:
    kept = Kept()
    transcript = Transcript(kept)
    transcript.say(Spoken(PCM, "Good "), 1.0, 80)
    assert kept.texts() == [("agent", "Good ", False)]
    transcript.say(Spoken(PCM, "morning. ", ends=True), 1.4, 480)

    line = kept.lines[1]

    assert kept.texts() == [("agent", "Good morning.", True)]
    assert (line.start_s, round(line.end_s, 2)) == (1.0, 1.48)
    assert kept.writes == 3


def test_a_guess_of_the_callers_words_is_replaced_by_the_final_ones() -> None:
    kept = Kept()
    transcript = Transcript(kept)
    transcript.hear(Heard(0, "What time do you", 2.0, 2.8, final=False))
    transcript.hear(Heard(0, "What time do you close?", 2.0, 3.4, final=True))

    assert kept.texts() == [("caller", "What time do you close?", True)]


def test_both_sides_are_numbered_in_the_order_in_which_they_began() -> None:
    kept = Kept()
    transcript = Transcript(kept)
    transcript.say(Spoken(PCM, "Hello. ", ends=True), 0.1, 80)
    transcript.hear(Heard(0, "Hi.", 1.0, 1.4, final=True))
    transcript.say(Spoken(PCM, "How are you? ", ends=True), 2.0, 160)

    assert [role for role, _, _ in kept.texts()] == ["agent", "caller", "agent"]


def test_marks_tell_how_much_of_a_line_the_caller_has_heard() -> None:
    kept = Kept()
    transcript = Transcript(kept)
    transcript.say(Spoken(PCM, "Good "), 1.0, 80)
    transcript.say(Spoken(PCM, "morning. ", ends=True), 1.4, 480)

    transcript.played(300)
    assert kept.lines[1].heard == "Good"
    transcript.played(480)
    assert kept.lines[1].heard == "Good morning."


def test_what_was_flushed_is_never_counted_as_heard() -> None:
    kept = Kept()
    transcript = Transcript(kept)
    transcript.say(Spoken(PCM, "Good "), 1.0, 80)
    transcript.say(Spoken(PCM, "morning. ", ends=True), 1.4, 480)
    transcript.played(100)
    transcript.flushed()
    transcript.played(9_999)

    assert kept.lines[1].heard == "Good"


def test_a_line_cut_by_the_end_of_the_call_is_finished() -> None:
    kept = Kept()
    transcript = Transcript(kept)
    transcript.say(Spoken(PCM, "We are "), 1.0, 80)
    transcript.close(2.5)

    assert kept.texts() == [("agent", "We are", True)]
    assert kept.lines[1].end_s == 2.5

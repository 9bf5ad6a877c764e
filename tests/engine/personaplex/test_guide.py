"""Words that the agent must say, put in where the model opens a word."""

import torch

from app.engine.personaplex.model.config import EPAD, PAD
from app.engine.personaplex.model.guide import STALL_FRAMES, Guide, steer

CPU = torch.device("cpu")
WORD = 77


class OneRow:
    """A guide of one row, and the model's own text fed to it token by token."""

    def __init__(self, tokens: list[int], within_frames: int = 0) -> None:
        self.guide = Guide.of(1, CPU)
        self.guide.tokens[0, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        self.guide.length[0], self.guide.within[0] = len(tokens), within_frames
        self.before = PAD

    def say(self, sampled: list[int], active: bool = True) -> list[int]:
        said = []
        for token in sampled:
            out = steer(self.guide, torch.tensor([token]), torch.tensor([self.before]), torch.tensor([active]))
            self.before = int(out)
            said.append(self.before)
        return said


def test_where_the_model_opens_a_word_the_next_guided_one_is_said_and_pauses_stay_its_own() -> None:
    row = OneRow([10, 11, 12])

    said = row.say([PAD, EPAD, WORD, WORD, PAD, PAD, EPAD, WORD, PAD, WORD])

    assert said == [PAD, EPAD, 10, 11, PAD, PAD, EPAD, 12, PAD, WORD]


def test_without_a_limit_a_silent_model_is_never_made_to_speak() -> None:
    assert OneRow([10]).say([PAD] * 500) == [PAD] * 500


def test_with_a_limit_the_first_word_comes_after_that_much_silence_behind_an_epad() -> None:
    row = OneRow([10, 11], within_frames=5)

    assert row.say([PAD] * 7) == [PAD, PAD, PAD, PAD, EPAD, 10, PAD]


def test_an_epad_of_the_models_own_is_not_doubled() -> None:
    assert OneRow([10], within_frames=3).say([PAD, EPAD, PAD, PAD]) == [PAD, EPAD, 10, PAD]
    assert OneRow([10], within_frames=4).say([PAD, PAD, EPAD, PAD, PAD]) == [PAD, PAD, EPAD, 10, PAD]


def test_silence_before_the_words_were_given_counts() -> None:
    row = OneRow([])
    row.say([PAD] * 20)
    row.guide.tokens[0, 0], row.guide.length[0], row.guide.within[0] = 10, 1, 6

    assert row.say([PAD] * 2) == [EPAD, 10]


def test_a_text_that_has_begun_is_not_left_half_said_where_it_had_a_limit() -> None:
    row = OneRow([10, 11], within_frames=1)

    said = row.say([PAD] * (STALL_FRAMES + 3))

    assert said[0] == 10
    assert said.index(11) == STALL_FRAMES + 1


def test_a_row_that_skips_a_tick_neither_speaks_nor_counts_its_silence() -> None:
    row = OneRow([10], within_frames=3)
    row.say([WORD, PAD] * 10, active=False)

    assert row.guide.taken.item() == 0
    assert row.guide.quiet.item() == 0
    assert row.say([PAD] * 4) == [PAD, PAD, EPAD, 10]


def test_rows_are_guided_each_by_its_own_words() -> None:
    guide = Guide.of(3, CPU)
    guide.tokens[0, 0], guide.tokens[2, 0] = 10, 20
    guide.length.copy_(torch.tensor([1, 0, 1]))
    everyone = torch.ones(3, dtype=torch.bool)

    said = steer(guide, torch.tensor([WORD, WORD, PAD]), torch.full((3,), PAD), everyone)

    assert said.tolist() == [10, WORD, PAD]
    assert guide.taken.tolist() == [1, 0, 0]

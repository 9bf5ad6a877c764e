import pytest

from app.engine.cascade.mind import Clauses


def cut(text: str, pieces: int = 3) -> list[str]:
    """Feed a text a few letters at a time, as a model makes it."""
    clauses = Clauses()
    out = [clause for start in range(0, len(text), pieces) for clause in clauses.add(text[start : start + pieces])]
    return [*out, *([clauses.rest()] if clauses.rest() else [])]


@pytest.mark.parametrize("pieces", [1, 3, 7, 500])
def test_a_text_is_cut_where_a_speaker_breathes_however_it_arrives(pieces: int) -> None:
    said = cut("We rent bikes every single day, Sundays too. Helmets are free.", pieces)

    assert said == ["We rent bikes every single day,", "Sundays too.", "Helmets are free."]


def test_a_short_beginning_waits_for_more_words_and_so_does_a_short_list() -> None:
    assert cut("Yes, we do.") == ["Yes, we do."]
    assert cut("I'm sorry, we sell bikes, helmets, and so on.")[1:] == [
        "we sell bikes, helmets,",
        "and so on.",
    ]


def test_points_in_numbers_and_titles_end_nothing() -> None:
    assert cut("Go to 14 Main St. near Dr. Smith.") == ["Go to 14 Main St. near Dr. Smith."]
    assert cut("That makes $12.50 altogether.") == ["That makes $12.50 altogether."]


def test_the_first_phrase_need_not_wait_for_the_end_of_its_sentence() -> None:
    assert cut("The shop is open from 9 am to 6 pm.") == ["The shop is open", "from 9 am to 6 pm."]
    assert cut("It is for all.") == ["It is for all."]


def test_nothing_is_lost_between_the_pieces() -> None:
    text = "First; second: third, and a fourth one is here. Fifth!"

    assert " ".join(cut(text)) == text

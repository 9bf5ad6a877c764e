import pytest

from app.engine.cascade.spoken_form import spoken_form


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("The compost bin is $8/month.", "The compost bin is $8 a month."),
        ("$5/hr or $35/day", "$5 an hour or $35 a day"),
        ("Open 9 am-6 pm.", "Open 9 A.M. to 6 P.M."),
        ("from 9 a.m. to 5:30 p.m.", "from 9 A.M. to 5:30 P.M."),
        ("Until 6 pm, every day.", "Until 6 P.M., every day."),
        ("pages 10\u201312", "pages 10 to 12"),
        ("Call 555-0100.", "Call 5 5 5, 0 1 0 0."),
        ("**Bold** and `code`", "Bold and code"),
        ("Bikes & helmets", "Bikes and helmets"),
        ("We are open 24/7.", "We are open 24 7."),
        ("I am here at 9.", "I am here at 9."),
        ("and/or", "and/or"),
    ],
)
def test_what_is_written_is_said_as_people_say_it(written: str, spoken: str) -> None:
    assert spoken_form(written) == spoken

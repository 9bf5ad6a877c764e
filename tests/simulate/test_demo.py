"""The demonstration judges what was said, starts a service of its own and always stops it."""

import asyncio
import io
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from app.demo import SCRIPT, Line, Show, judge, run_demo
from app.simulate.caller import Backchannel, CallResult, Interrupt, Turn, read_script
from app.simulate.service import trial_service

ANSWERS = {
    "hours": "We close at six.",
    "price": "An electric bike is thirty-five dollars a day.",
    "address": "We are at 14 Alder Street.",
    "unknown": "I'm sorry, I don't know.",
    "everything": "We rent and repair bikes.",
    "interrupt": "That is twelve dollars.",
}


def turn_of(number: int) -> Turn:
    """The script with ten seconds for each of its steps; each takes two, and is answered after one."""
    step = SCRIPT[number].step
    start_s = 5.0 + 10 * number
    kind = "interrupt" if isinstance(step, Interrupt) else "backchannel" if isinstance(step, Backchannel) else "say"
    return Turn(kind, step.wav.stem, start_s, start_s + 2, 1.0)  # type: ignore[arg-type]


def a_call(turns: int = len(SCRIPT)) -> CallResult:
    return CallResult(
        call_sid="CA1",
        duration_s=5.0 + 10 * turns,
        ended_by="the caller hung up",
        greeting_s=0.3,
        turns=[turn_of(number) for number in range(turns)],
        gaps=[],
        clicks=[],
        edge_roughness=1.0,
        breaches=[],
        late_max_s=0.0,
        caller_lane=b"",
        agent_lane=b"",
    )


def lines_with(**answers: str) -> list[Line]:
    told = ANSWERS | answers
    lines = [Line(0, "agent", "Hello, this is Nora.", 0.3, 2.0, True, None)]
    for number, question in enumerate(SCRIPT):
        turn = turn_of(number)
        lines.append(Line(2 * number + 1, "caller", question.words, turn.start_s, turn.end_s, True, None))
        if answer := told.get(turn.name):
            lines.append(Line(2 * number + 2, "agent", answer, turn.end_s + 1, turn.end_s + 4, True, None))
    return lines


def faults(result: CallResult, lines: list[Line]) -> dict[str, str]:
    return {verdict.name: verdict.fault for verdict in judge(result, lines) if verdict.fault}


def test_the_script_asks_what_must_be_shown() -> None:
    assert sum(bool(question.right) for question in SCRIPT) >= 5
    assert len([question for question in SCRIPT if isinstance(question.step, Interrupt)]) == 1
    assert len([question for question in SCRIPT if isinstance(question.step, Backchannel)]) == 1
    assert len(read_script([question.step for question in SCRIPT])) == len(SCRIPT), "every recording is shipped"


def test_right_answers_have_no_fault() -> None:
    assert faults(a_call(), lines_with()) == {}


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("hours", "We close at five."),
        ("hours", "We are open for sixteen hours."),
        ("price", "It is 135 dollars."),
        ("address", "It is on Elm Street."),
        ("unknown", "Yes, we sell kayaks, no problem."),
        ("interrupt", "A tune-up is sixty dollars."),
    ],
)
def test_a_wrong_answer_is_named_with_what_was_wanted(name: str, answer: str) -> None:
    found = faults(a_call(), lines_with(**{name: answer}))

    assert list(found) == [name]
    assert answer in found[name]
    assert "wanted" in found[name]


@pytest.mark.parametrize(
    "answer", ["We close at 6 pm.", "From nine in the morning to SIX in the evening.", "Nine to six, every day!"]
)
def test_an_answer_may_be_worded_in_any_way(answer: str) -> None:
    assert faults(a_call(), lines_with(hours=answer)) == {}


@pytest.mark.parametrize(
    "answer", ["I don\u2019t have that information.", "Sorry, that I do not know.", "I am not sure about that."]
)
def test_owning_up_to_not_knowing_is_right_in_any_words(answer: str) -> None:
    assert faults(a_call(), lines_with(unknown=answer)) == {}


@pytest.mark.parametrize("answer", ["No, we do not.", "Yes, for $40 a day.", "Sorry, we sell only one."])
def test_inventing_is_wrong_whether_it_says_yes_or_no(answer: str) -> None:
    assert set(faults(a_call(), lines_with(unknown=answer))) == {"unknown"}


def test_silence_is_no_answer() -> None:
    result = a_call()
    result.turns[0] = replace(result.turns[0], response_s=None)

    assert faults(result, lines_with()) == {"hours": "was not answered"}


def test_sound_without_words_is_no_answer() -> None:
    assert list(faults(a_call(), lines_with(address=""))) == ["address"]


def test_a_call_that_broke_off_leaves_the_rest_unanswered() -> None:
    found = faults(a_call(turns=2), lines_with())

    assert set(found) == {"address", "unknown", "everything", "interrupt"}
    assert set(found.values()) == {"the call ended before it was asked"}


def test_a_line_is_shown_once_when_nothing_more_is_added_to_it() -> None:
    paper = io.StringIO()
    show = Show(Console(file=paper, soft_wrap=True))
    asked = Line(1, "caller", "Where is your shop?", 1.0, 2.0, True, None)
    answer = Line(2, "agent", "At 14 Alder", 3.25, 4.0, False, None)

    show.update([asked, answer])
    show.update([asked, replace(answer, text="At 14 Alder Street [sic].", final=True)])
    show.update([asked, replace(answer, text="At 14 Alder Street [sic].", final=True)])

    shown = paper.getvalue().splitlines()
    assert len(shown) == 2
    assert "Where is your shop?" in shown[0]
    assert shown[1].endswith("At 14 Alder Street [sic].  (after 1.25 s)")


async def test_a_service_that_cannot_start_is_quoted_and_is_failure(tmp_path: Path) -> None:
    paper = io.StringIO()

    code = await run_demo(tmp_path, engine="steam", console=Console(file=paper, soft_wrap=True))

    assert code == 1
    assert "ENGINE" in paper.getvalue()
    assert "steam" in paper.getvalue()
    assert "Traceback" not in paper.getvalue()


async def test_a_place_that_cannot_be_written_is_failure_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    paper = io.StringIO()

    assert await run_demo(tmp_path / "file", console=Console(file=paper, soft_wrap=True)) == 1
    assert "cannot be made" in paper.getvalue()


async def test_a_service_is_stopped_even_if_what_used_it_is_cancelled(tmp_path: Path) -> None:
    ready = asyncio.Event()
    ports: list[int] = []

    async def use() -> None:
        async with trial_service(tmp_path, "echo") as service, service.client() as http:
            await service.until_ready(http, lambda _: None)
            ports.append(service.port)
            ready.set()
            await asyncio.Event().wait()

    using = asyncio.create_task(use())
    await asyncio.wait_for(ready.wait(), 60)
    with socket.create_connection(("127.0.0.1", ports[0])):
        pass
    using.cancel()
    await asyncio.wait([using])

    assert using.cancelled()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]))

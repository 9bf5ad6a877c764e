"""The demonstration: starts the service, calls it as a caller would, shows the conversation and judges the answers."""

import asyncio
import json
import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from rich.console import Console
from rich.markup import escape

from app.simulate.caller import (
    Backchannel,
    CallResult,
    Interrupt,
    OutFault,
    Say,
    SimulatedCaller,
    Step,
    Turn,
    make_folder,
    read_script,
    rounded,
)
from app.simulate.service import ServiceFault, TrialService, trial_service
from app.simulate.twilio import CallFault, FakeTwilio
from app.simulate.wavs import WavFault

RECORDINGS = Path(__file__).resolve().parent / "simulate" / "recordings"
PERSONA = "operator"
FIRST_WORD_S = 0.42
"""Where the word "Wait" ends in interrupt.wav."""
FINISHED_S = 1.5
"""The caller lets the agent finish: on a busy machine it may pause for longer between two clauses than people do."""
TERMINATED = 143

_LOOK_EVERY_S = 0.5
_BEFORE_END_S = 0.5


@dataclass(frozen=True, slots=True)
class Question:
    """What the caller says in one step, and what a right answer contains."""

    step: Step
    words: str
    right: str = ""
    wanted: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the service's transcript."""

    number: int
    role: Literal["caller", "agent"]
    text: str
    start_s: float
    end_s: float
    final: bool
    heard: str | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the agent answered one thing that the caller said. `fault` is empty if it did."""

    name: str
    words: str
    answer: str
    response_s: float | None
    fault: str


def _recording(name: str) -> Path:
    return RECORDINGS / f"{name}.wav"


SCRIPT = (
    Question(Say(_recording("hours")), "What time do you close today?", r"\b(six|6)\b", "six o'clock"),
    Question(
        Say(_recording("price")),
        "How much is it to rent an electric bike for one day?",
        r"\b(thirty[- ]five|35)\b",
        "thirty-five dollars",
    ),
    Question(Say(_recording("address")), "Where is your shop?", r"\balder\b", "Alder Street"),
    Question(
        Say(_recording("unknown")),
        "Do you also sell kayaks?",
        r"^(?!.*\b(yes|we sell)\b).*\b(sorry|(don'?t|do not) (have|know)|not sure)\b",
        "that it has no information on this",
    ),
    Question(
        Say(_recording("everything")),
        "Can you tell me about everything that you offer?",
        r"\b(bike|bicycle|rent|repair|tune)",
        "what the shop offers",
    ),
    Question(Backchannel(_recording("mm-hmm"), after_s=1.2), "Mm-hmm."),
    Question(
        Say(_recording("everything")),
        "Can you tell me about everything that you offer?",
        r"\w",
        "an answer to interrupt",
    ),
    Question(
        Interrupt(_recording("interrupt"), after_s=1.5, first_word_s=FIRST_WORD_S),
        "Wait, sorry. How much is it to fix a flat tire?",
        r"\b(twelve|12)\b",
        "twelve dollars",
    ),
    Question(Say(_recording("goodbye")), "Great, thank you. Goodbye."),
)


async def run_demo(
    out: Path = Path("demo-out"), engine: str = "cascade", console: Console | None = None, port: int | None = None
) -> int:
    """Hold the demonstration; 0 if every question was answered right, 1 if not or if the service did not start.

    Leaves call.wav (caller left, agent right), transcript.json and summary.json in `out`, and the service's log and
    database. The service is stopped in any case; on SIGTERM too, which gives 143.
    """
    screen = console or Console(highlight=False, soft_wrap=True)
    task = asyncio.current_task()
    assert task is not None, "called from a coroutine"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel, TERMINATED)
    try:
        return await _demonstrate(out, engine, screen, port)
    except (ServiceFault, CallFault, WavFault, OutFault) as fault:
        screen.print(f"[red]{escape(str(fault))}[/]")
        return 1
    except asyncio.CancelledError as cancelled:
        if cancelled.args == (TERMINATED,):
            return TERMINATED
        raise
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)


async def _demonstrate(out: Path, engine: str, screen: Console, port: int | None) -> int:
    make_folder(out)
    async with trial_service(out, engine, port) as service, service.client() as http:
        await service.until_ready(http, lambda told: screen.print(escape(told)))
        screen.print(f"The page with this call is at [bold]{service.url}/[/] for as long as it lasts.\n")
        result, lines = await _converse(service, http, screen)
    verdicts = judge(result, lines)
    result.write(out, {"engine": engine, "questions": rounded([asdict(one) for one in verdicts]), **result.summary()})
    _write_transcript(out / "transcript.json", lines)
    _report(screen, out, result, verdicts)
    return 1 if any(verdict.fault for verdict in verdicts) else 0


async def _converse(service: TrialService, http: httpx.AsyncClient, screen: Console) -> tuple[CallResult, list[Line]]:
    """Play the script and show the transcript meanwhile. Gives what was measured, and the lines of the whole call."""
    recordings = read_script([question.step for question in SCRIPT])
    call = FakeTwilio(service.url, token=service.token, persona=PERSONA)
    person = SimulatedCaller(call)
    show = Show(screen)
    async with call:
        call_id = await _call_id(http, call.call_sid)
        watching = asyncio.create_task(_watch(http, call_id, show))
        try:
            await person.play(recordings, FINISHED_S)
        finally:
            watching.cancel()
            await asyncio.wait([watching])
    if not watching.cancelled():
        watching.result()
    lines = await _finished(http, call_id)
    show.update(lines, all_of_it=True)
    return person.result(), lines


class Show:
    """Prints each line once, when nothing more is added to it, and how long the agent took to answer."""

    def __init__(self, screen: Console) -> None:
        self._screen = screen
        self._shown: set[int] = set()
        self._asked_s: float | None = None

    def update(self, lines: Sequence[Line], all_of_it: bool = False) -> None:
        for line in sorted(lines, key=lambda one: one.start_s):
            if line.number in self._shown:
                continue
            if not (line.final or all_of_it):
                return
            self._shown.add(line.number)
            self._print(line)

    def _print(self, line: Line) -> None:
        delay = ""
        if line.role == "agent" and self._asked_s is not None and line.start_s >= self._asked_s:
            delay = f"  [dim](after {line.start_s - self._asked_s:.2f} s)[/]"
        self._asked_s = line.end_s if line.role == "caller" else None
        name = "[cyan]caller[/]" if line.role == "caller" else "[green]agent [/]"
        self._screen.print(f"[dim]{line.start_s:7.2f} s[/]  {name}  {escape(line.text.strip())}{delay}")


async def _watch(http: httpx.AsyncClient, call_id: str, show: Show) -> None:
    while True:
        show.update(await _transcript(http, call_id))
        await asyncio.sleep(_LOOK_EVERY_S)


async def _call_id(http: httpx.AsyncClient, call_sid: str) -> str:
    """The service's own name of the call. It is in the API as soon as it is in the store.

    Raises ServiceFault.
    """
    for _ in range(50):
        for call in (await _get(http, "/api/v1/calls"))["calls"]:
            if call["carrier_call_id"] == call_sid:
                return str(call["id"])
        await asyncio.sleep(0.1)
    raise ServiceFault(f"the service does not list the call {call_sid}")


async def _finished(http: httpx.AsyncClient, call_id: str) -> list[Line]:
    for _ in range(100):
        if (await _get(http, f"/api/v1/calls/{call_id}"))["state"] == "ended":
            break
        await asyncio.sleep(0.1)
    return await _transcript(http, call_id)


async def _transcript(http: httpx.AsyncClient, call_id: str) -> list[Line]:
    return [Line(**line) for line in (await _get(http, f"/api/v1/calls/{call_id}/transcript"))["lines"]]


async def _get(http: httpx.AsyncClient, path: str) -> dict[str, Any]:
    try:
        reply = await http.get(path)
    except httpx.TransportError as error:
        raise ServiceFault(f"the service does not answer {path}: {error or type(error).__name__}") from error
    if reply.status_code != 200:
        raise ServiceFault(f"{path} answered {reply.status_code}: {reply.text[:200]}")
    answer: dict[str, Any] = reply.json()
    return answer


def judge(result: CallResult, lines: Sequence[Line]) -> list[Verdict]:
    """Hold the agent's lines against what each question wants. Steps that were never reached count as unanswered."""
    verdicts = []
    for number, question in enumerate(SCRIPT):
        if not question.right:
            continue
        name = question.step.wav.stem
        if number >= len(result.turns):
            verdicts.append(Verdict(name, question.words, "", None, "the call ended before it was asked"))
            continue
        turn = result.turns[number]
        later = [one.start_s for one in result.turns[number + 1 :] if one.kind != "backchannel"]
        answer = _answer(lines, turn.end_s - _BEFORE_END_S, min(later, default=result.duration_s + 1))
        fault = _fault(answer, turn.response_s, question)
        verdicts.append(Verdict(name, question.words, answer, turn.response_s, fault))
    return verdicts


def _answer(lines: Sequence[Line], from_s: float, until_s: float) -> str:
    said = [line.text.strip() for line in lines if line.role == "agent" and from_s <= line.start_s < until_s]
    return " ".join(said)


def _fault(answer: str, response_s: float | None, question: Question) -> str:
    if response_s is None:
        return "was not answered"
    if not answer:
        return "was answered with sound, but the transcript has no words for it"
    if not re.search(question.right, answer.replace("\u2019", "'"), re.IGNORECASE):
        return f"was answered with {answer!r}; wanted {question.wanted}"
    return ""


def _report(screen: Console, out: Path, result: CallResult, verdicts: Sequence[Verdict]) -> None:
    times = result.summary()["response_s"]
    if times["median"] is not None:
        screen.print(
            f"\nFrom a question's end to its answer: median {times['median']:.2f} s, most {times['max']:.2f} s"
        )
    for turn in result.turns:
        if turn.kind == "interrupt":
            screen.print(f"Interrupted, the agent {_stopped(turn)}")
        if turn.kind == "backchannel":
            went_on = {True: "went on", False: "stopped", None: "had already finished"}[turn.went_on]
            screen.print(f'At "mm-hmm" the agent {went_on}')
    screen.print(f"Gaps over 60 ms: {len(result.gaps)}. Clicks: {len(result.clicks)}.")
    screen.print(
        f"In {escape(str(out))}: call.wav (caller left, agent right), transcript.json, summary.json\n", soft_wrap=True
    )
    faults = [verdict for verdict in verdicts if verdict.fault]
    for verdict in faults:
        screen.print(f"[red]{escape(verdict.words)}[/] {escape(verdict.fault)}")
    if not faults:
        screen.print(f"[green]All {len(verdicts)} questions were answered.[/]")


def _stopped(turn: Turn) -> str:
    if turn.stop_s is None:
        return "did not fall silent"
    after_word_s = turn.stop_after_word_s
    after_word = "" if after_word_s is None else f", {after_word_s * 1000:.0f} ms after the first word"
    return f"fell silent {turn.stop_s * 1000:.0f} ms after the caller began{after_word}"


def _write_transcript(path: Path, lines: Sequence[Line]) -> None:
    kept = [
        {"role": line.role, "text": line.text.strip(), "start_s": round(line.start_s, 3), "end_s": round(line.end_s, 3)}
        for line in sorted(lines, key=lambda one: one.start_s)
    ]
    try:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutFault(f"{path}: cannot be written: {error.strerror}") from error

"""A caller with a script of recordings: waits for the agent, speaks over it, and measures what came back."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from app.simulate.measure import (
    HOLE_MIN_S,
    WINDOW_S,
    Hole,
    Loud,
    Span,
    clicks,
    edge_roughness,
    holes,
    loud_windows,
    silent_from,
    spans,
    speech_within,
)
from app.simulate.twilio import CALLED, CALLER, FakeTwilio
from app.simulate.wavs import read_wav, write_lanes
from telephony import g711

QUIET_S = 0.9
"""The agent has finished when it was silent for so long."""
GREETING_WITHIN_S = 5.0
"""A caller who hears nothing begins after so long."""
_LOOK_EVERY_S = 0.02
_SAME_SPEECH_S = 0.3
_PAUSE_S = 0.7
"""An agent that is silent for longer has stopped, or begins something new."""
_WINDOW_BYTES = round(WINDOW_S * g711.SAMPLE_RATE_HZ)

Progress = Callable[[str], None]


class OutFault(Exception):
    """What a call leaves cannot be written. The message says where and why."""


@dataclass(frozen=True, slots=True)
class Say:
    """Speak when the agent has finished, or has not said anything for `patience_s`."""

    wav: Path
    patience_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Speak over the agent, `after_s` after it began to answer what was said before.

    `first_word_s` is where the first word ends, from the beginning of the speech in the recording.
    """

    wav: Path
    after_s: float
    first_word_s: float | None = None
    patience_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Backchannel:
    """As Interrupt, but a sound that wants the agent to go on."""

    wav: Path
    after_s: float
    patience_s: float = 15.0


Step = Say | Interrupt | Backchannel


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing that the caller said, and what the agent did then. Times are seconds of the call.

    `response_s` is from the end of the caller's speech to the agent's first sound: less than 0 if it began before that,
    None if it never did before the caller spoke again. `stop_s` is from the beginning of an interruption to the agent's
    silence, `stop_after_word_s` from the end of its first word; None if the agent was silent already or went on.
    `went_on` is whether the agent spoke on through a backchannel, None if it was silent already.
    """

    kind: Literal["say", "interrupt", "backchannel"]
    name: str
    start_s: float
    end_s: float
    response_s: float | None = None
    stop_s: float | None = None
    stop_after_word_s: float | None = None
    went_on: bool | None = None

    @property
    def answered(self) -> bool:
        return self.response_s is not None


@dataclass(frozen=True, slots=True)
class CallResult:
    """What a call was like from the caller's end. Lanes are mu-law; times are seconds of the call.

    `greeting_s` is when the agent first spoke. `breaches` are messages that Twilio would not understand, `late_max_s`
    is the simulation's own worst delay: with more than a few hundredths of a second, gaps may be its own.
    """

    call_sid: str
    duration_s: float
    ended_by: str
    greeting_s: float | None
    turns: list[Turn]
    gaps: list[Hole]
    clicks: list[float]
    edge_roughness: float | None
    breaches: list[str]
    late_max_s: float
    caller_lane: bytes = field(repr=False)
    agent_lane: bytes = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """The figures, as they go into summary.json."""
        times = [turn.response_s for turn in self.turns if turn.response_s is not None]
        return {
            "duration_s": round(self.duration_s, 3),
            "ended_by": self.ended_by,
            "greeting_s": rounded(self.greeting_s),
            "response_s": {
                "each": [rounded(time) for time in times],
                "median": rounded(median(times)) if times else None,
                "max": rounded(max(times, default=None)),
            },
            "gaps": {"over_ms": round(HOLE_MIN_S * 1000), "each": [rounded(asdict(hole)) for hole in self.gaps]},
            "clicks_s": rounded(self.clicks),
            "edge_roughness": rounded(self.edge_roughness),
            "turns": [rounded(asdict(turn)) for turn in self.turns],
            "breaches": self.breaches,
            "simulation_late_max_s": round(self.late_max_s, 3),
        }

    def write(self, out: Path, summary: dict[str, Any] | None = None) -> None:
        """Leave call.wav (caller left, agent right) and summary.json in a folder, made if need be.

        Raises:
            OutFault
        """
        make_folder(out)
        try:
            write_lanes(out / "call.wav", self.caller_lane, self.agent_lane)
            text = json.dumps(summary or self.summary(), indent=2, ensure_ascii=False)
            (out / "summary.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OutFault(f"{out}: cannot be written: {error.strerror}") from error


@dataclass(slots=True)
class _Said:
    step: Step
    start_s: float
    end_s: float


class SimulatedCaller:
    """Plays a script on one call. Event loop only; the call must have been placed."""

    def __init__(self, call: FakeTwilio, progress: Progress = lambda _: None) -> None:
        self._call = call
        self._progress = progress
        self._said: list[_Said] = []
        self._looked_bytes = 0
        self._agent_began_s: float | None = None
        self._agent_loud_s = 0.0
        self._since_s = 0.0

    async def play(self, script: Sequence[tuple[Step, bytes, Span]], quiet_s: float = QUIET_S) -> None:
        """Say everything in the script, each at its time, and wait for the last answer to end; or for the call to."""
        for step, ulaw, speech in script:
            await self._until_its_time(step, quiet_s)
            if self._call.ended.is_set():
                return
            await self._speak(step, ulaw, speech)
        await self._until_finished(script[-1][0].patience_s if script else 0.0, quiet_s)

    async def _until_its_time(self, step: Step, quiet_s: float) -> None:
        if isinstance(step, Say):
            await self._until_finished(step.patience_s, quiet_s)
            return
        await self._until(lambda: self._agent_began_s is not None, step.patience_s)
        if self._agent_began_s is not None:
            due_s = self._agent_began_s + step.after_s
            await self._until(lambda: self._now_s >= due_s, step.after_s + 1)

    async def _until_finished(self, patience_s: float, quiet_s: float) -> None:
        await self._until(lambda: self._agent_began_s is not None, patience_s)
        await self._until(lambda: self._now_s - self._agent_loud_s >= quiet_s, 10 * patience_s)

    async def _speak(self, step: Step, ulaw: bytes, speech: Span) -> None:
        start_s = self._call.say(ulaw) / g711.SAMPLE_RATE_HZ
        self._said.append(_Said(step, start_s + speech.start_s, start_s + speech.end_s))
        self._progress(f"{start_s:7.2f} s  {type(step).__name__.lower()}: {step.wav.name}")
        if not isinstance(step, Backchannel):
            self._since_s = self._said[-1].end_s
            self._agent_began_s = None
        await self._until(lambda: not self._call.speaking, len(ulaw) / g711.SAMPLE_RATE_HZ + 5)

    async def _until(self, holds: Callable[[], bool], within_s: float) -> None:
        """Wait until it holds, the time is over, or the call is."""
        deadline_s = self._now_s + within_s
        while not holds() and self._now_s < deadline_s and not self._call.ended.is_set():
            await asyncio.sleep(_LOOK_EVERY_S)
            self._look()

    def _look(self) -> None:
        """Take in what the agent has said since the last look."""
        lane = self._call.playback.lane
        whole = len(lane) // _WINDOW_BYTES * _WINDOW_BYTES
        loud = loud_windows(g711.decode(bytes(lane[self._looked_bytes : whole])))
        first_s = self._looked_bytes / g711.SAMPLE_RATE_HZ
        for window in loud.nonzero()[0]:
            self._agent_loud_s = first_s + int(window) * WINDOW_S
            if self._agent_began_s is None and self._agent_loud_s >= self._since_s:
                self._agent_began_s = self._agent_loud_s
        self._looked_bytes = whole

    @property
    def _now_s(self) -> float:
        return self._call.position / g711.SAMPLE_RATE_HZ

    def result(self) -> CallResult:
        """Measure the call, after it has ended."""
        playback = self._call.playback
        loud = loud_windows(g711.decode(bytes(playback.lane)))
        speech = spans(loud, _SAME_SPEECH_S)
        turns = [
            self._turn(said, loud, speech, self._said[number + 1].start_s if number + 1 < len(self._said) else None)
            for number, said in enumerate(self._said)
        ]
        return CallResult(
            call_sid=self._call.call_sid,
            duration_s=len(playback.lane) / g711.SAMPLE_RATE_HZ,
            ended_by=self._call.ended_by,
            greeting_s=speech[0].start_s if speech else None,
            turns=turns,
            gaps=holes(playback),
            clicks=clicks(playback),
            edge_roughness=edge_roughness(playback),
            breaches=list(self._call.breaches),
            late_max_s=self._call.late_max_s,
            caller_lane=bytes(self._call.caller_lane),
            agent_lane=bytes(playback.lane),
        )

    def _turn(self, said: _Said, loud: Loud, speech: list[Span], until_s: float | None) -> Turn:
        name, start_s, end_s = said.step.wav.stem, said.start_s, said.end_s
        match said.step:
            case Say():
                return Turn("say", name, start_s, end_s, _response_s(speech, said, start_s, until_s))
            case Backchannel():
                return Turn("backchannel", name, start_s, end_s, went_on=self._went_on(said, loud))
            case Interrupt(first_word_s=first_word_s):
                silent_s = silent_from(loud, start_s)
                stop_s = None if silent_s is None else silent_s - start_s
                after_word_s = None if stop_s is None or first_word_s is None else stop_s - first_word_s
                response_s = _response_s(speech, said, start_s if silent_s is None else silent_s, until_s)
                return Turn("interrupt", name, start_s, end_s, response_s, stop_s, after_word_s)

    def _went_on(self, said: _Said, loud: Loud) -> bool | None:
        """Whether the speech of that moment outlasted the sound, unflushed and without a long pause."""
        speech = next((one for one in spans(loud, _PAUSE_S) if one.start_s <= said.start_s <= one.end_s), None)
        if speech is None:
            return None
        until_s = said.end_s + _PAUSE_S
        flushes_s = [flush / g711.SAMPLE_RATE_HZ for flush in self._call.playback.flushes]
        return speech.end_s > said.end_s and not any(said.start_s <= flush_s <= until_s for flush_s in flushes_s)


def make_folder(out: Path) -> None:
    """Make a folder for what a call leaves, if it is not there. Raises OutFault."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutFault(f"{out}: cannot be made: {error.strerror}") from error


def _response_s(speech: list[Span], said: _Said, after_s: float, until_s: float | None) -> float | None:
    for one in speech:
        if one.start_s >= after_s and one.end_s > said.end_s and (until_s is None or one.start_s < until_s):
            return one.start_s - said.end_s
    return None


def read_script(steps: Sequence[Step]) -> list[tuple[Step, bytes, Span]]:
    """Read the recordings of a script, as mu-law and where speech begins and ends in them.

    Raises:
        WavFault: the first that cannot be used.
    """
    read = [(step, read_wav(step.wav)) for step in steps]
    return [(step, g711.encode(pcm), speech_within(pcm)) for step, pcm in read]


def _step(step: Path | Step, first: bool) -> Step:
    if isinstance(step, Path):
        return Say(step, GREETING_WITHIN_S) if first else Say(step)
    return step


async def place_call(
    url: str,
    script: Sequence[Path | Step],
    *,
    persona: str = "",
    caller: str = CALLER,
    called: str = CALLED,
    token: str = "",
    public_url: str = "",
    out: Path | None = None,
    progress: Progress = lambda _: None,
) -> CallResult:
    """Call a service, say the script, hang up and measure; the folder `out` gets call.wav and summary.json.

    A plain path is a `Say`; the first one waits 5 s for a greeting. `url`, `token` and `public_url` are as for
    FakeTwilio.

    Raises:
        WavFault: a recording cannot be used; nothing was called.
        CallFault: the call could not be placed; CallRejected: the service is busy.
        OutFault: the result could not be written.
    """
    recordings = read_script([_step(step, first=not number) for number, step in enumerate(script)])
    call = FakeTwilio(url, token=token, public_url=public_url, caller=caller, called=called, persona=persona)
    async with call:
        progress(f"connected as call {call.call_sid}")
        person = SimulatedCaller(call, progress)
        await person.play(recordings)
    progress(f"ended after {len(call.playback.lane) / g711.SAMPLE_RATE_HZ:.1f} s: {call.ended_by}")
    result = person.result()
    if out is not None:
        result.write(out)
    return result


def rounded(value: Any) -> Any:
    """Seconds to the millisecond, however deep."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value

"""The simulated caller talks with a stand-in agent, and measures how it behaved."""

import asyncio
import base64
import json
import wave
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from app.simulate.caller import (
    Backchannel,
    CallResult,
    Interrupt,
    OutFault,
    Say,
    SimulatedCaller,
    Step,
    place_call,
    read_script,
)
from app.simulate.twilio import FakeTwilio
from app.simulate.wavs import WavFault
from telephony.g711 import ULAW_SILENCE, encode, peak
from tests.simulate.standin import PUBLIC_URL, TOKEN, Leg, StandIn, stand_in

PACKET = 160


def buzz(length_s: float) -> bytes:
    at_s = np.arange(int(8_000 * length_s)) / 8_000
    return encode((0.3 * np.sin(2 * np.pi * 330 * at_s)).astype(np.float32))


class Agent:
    """Greets, answers `think_packets` after the caller fell silent, and sends audio all the time, 60 ms ahead.

    Spoken over it stops, if it is one that `stops`, or says something else `instead`.
    """

    def __init__(
        self,
        answer_s: float = 1.0,
        stops: bool = True,
        think_packets: int = 10,
        greets: bool = True,
        instead: bytes = b"",
    ) -> None:
        self.answer_s = answer_s
        self.stops = stops
        self.think_packets = think_packets
        self.instead = instead
        self.speech = buzz(0.4) if greets else b""

    async def hold(self, leg: Leg) -> None:
        quiet_packets, asked = 0, False
        await leg.play(ULAW_SILENCE * 3 * PACKET)
        while True:
            caller = base64.b64decode((await leg.until("media"))["media"]["payload"])
            loud = peak(caller) > 0.02
            onset = loud and quiet_packets > 0
            quiet_packets = 0 if loud else quiet_packets + 1
            asked = asked or loud
            if onset and self.speech and self.stops:
                self.speech, self.instead = self.instead, b""
                await leg.send("clear")
            if asked and quiet_packets == self.think_packets:
                self.speech, asked = buzz(self.answer_s), False
            await leg.play(self.speech[:PACKET].ljust(PACKET, ULAW_SILENCE))
            self.speech = self.speech[PACKET:]


@pytest.fixture
async def service() -> AsyncIterator[StandIn]:
    async with stand_in() as standing:
        yield standing


@pytest.fixture
def word(tmp_path: Path) -> Path:
    """A recording: 100 ms of silence, 300 ms of sound, 200 ms of silence."""
    at_s = np.arange(4_800) / 16_000
    sound = np.concatenate([np.zeros(1_600), 0.3 * np.sin(2 * np.pi * 200 * at_s), np.zeros(3_200)])
    path = tmp_path / "word.wav"
    with wave.open(str(path), "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(16_000)
        wav.writeframes((sound * 32_767).astype("<i2").tobytes())
    return path


async def talk(service: StandIn, agent: Agent, *script: Step) -> CallResult:
    """A whole call, by a caller who takes 300 ms of silence for the end of an answer."""
    service.handler = agent.hold
    call = FakeTwilio(service.url, token=TOKEN, public_url=PUBLIC_URL)
    person = SimulatedCaller(call)
    async with asyncio.timeout(30), call:
        await person.play(read_script(script), quiet_s=0.3)
    return person.result()


async def test_the_caller_waits_for_the_greeting_and_for_each_answer(service: StandIn, word: Path) -> None:
    result = await talk(service, Agent(answer_s=0.6), Say(word), Say(word))

    assert result.greeting_s is not None
    first, second = result.turns
    assert first.start_s > result.greeting_s + 0.4
    assert first.answered
    assert second.answered
    assert first.response_s is not None
    assert second.start_s > first.end_s + first.response_s + 0.6, "the second word came after the first answer"
    assert [turn.end_s - turn.start_s for turn in result.turns] == [pytest.approx(0.3, abs=0.021)] * 2
    assert result.ended_by == "the caller hung up"


async def test_the_response_time_is_from_the_last_loud_sample(service: StandIn, word: Path) -> None:
    """The stand-in thinks for 600 ms, of which the end of the recording covers 200."""
    result = await talk(service, Agent(think_packets=30, answer_s=0.4), Say(word))

    response_s = result.turns[0].response_s
    assert response_s is not None
    assert 0.59 < response_s < 2.0


async def test_an_agent_that_never_answers_is_waited_for_and_told(service: StandIn, word: Path) -> None:
    result = await talk(service, Agent(think_packets=10_000), Say(word, patience_s=0.7), Say(word, patience_s=0.7))

    assert [turn.answered for turn in result.turns] == [False, False]
    assert result.turns[1].start_s >= result.turns[0].end_s + 0.7


async def test_without_a_greeting_the_caller_begins(service: StandIn, word: Path) -> None:
    result = await talk(service, Agent(greets=False, answer_s=0.3), Say(word, patience_s=0.5))

    assert result.turns[0].answered
    assert result.turns[0].start_s < 2.0


async def test_an_interruption_is_spoken_over_the_agent_and_its_effect_is_measured(
    service: StandIn, word: Path
) -> None:
    interrupt = Interrupt(word, after_s=0.5, first_word_s=0.1)

    result = await talk(service, Agent(answer_s=3.0), Say(word), interrupt)

    asked, over = result.turns
    assert asked.response_s is not None
    into_s = over.start_s - (asked.end_s + asked.response_s)
    assert 0.57 <= into_s < 1.6, "0.5 s into the answer, and the recording's own 0.1 s of silence"
    assert over.stop_s is not None
    assert 0 <= over.stop_s < 1.5, "long before the answer's own end"
    assert over.stop_after_word_s == pytest.approx(over.stop_s - 0.1)
    assert over.answered


async def test_an_agent_that_talks_on_did_not_stop_in_time(service: StandIn, word: Path) -> None:
    result = await talk(service, Agent(answer_s=2.0, stops=False), Say(word), Interrupt(word, after_s=0.3))

    assert result.turns[1].stop_s is None or result.turns[1].stop_s > 1.0


@pytest.mark.parametrize("stops", [False, True])
async def test_a_backchannel_shows_whether_the_agent_goes_on(service: StandIn, word: Path, stops: bool) -> None:
    result = await talk(service, Agent(answer_s=1.5, stops=stops), Say(word), Backchannel(word, after_s=0.3))

    assert result.turns[1].went_on is not stops


async def test_an_agent_that_says_something_else_did_not_go_on(service: StandIn, word: Path) -> None:
    agent = Agent(answer_s=1.5, instead=buzz(1.0))

    result = await talk(service, agent, Say(word), Backchannel(word, after_s=0.3))

    assert result.turns[1].went_on is False


async def test_a_service_that_hangs_up_ends_the_script(service: StandIn, word: Path) -> None:
    async def greet_and_go(leg: Leg) -> None:
        await leg.play(buzz(0.3))
        for _ in range(40):
            await leg.until("media")

    service.handler = greet_and_go
    async with asyncio.timeout(30):
        result = await place_call(service.url, [word, word, word], token=TOKEN, public_url=PUBLIC_URL)

    assert len(result.turns) == 0
    assert result.ended_by == "the service closed the socket with code 1000"


async def test_the_call_is_left_on_disk(service: StandIn, word: Path, tmp_path: Path) -> None:
    service.handler = Agent(answer_s=0.4).hold
    told: list[str] = []

    result = await place_call(
        service.url, [word], token=TOKEN, public_url=PUBLIC_URL, out=tmp_path / "new" / "out", progress=told.append
    )

    with wave.open(str(tmp_path / "new" / "out" / "call.wav")) as wav:
        assert wav.getnchannels() == 2
        assert wav.getnframes() == pytest.approx(result.duration_s * 8_000, abs=161)
    summary = json.loads((tmp_path / "new" / "out" / "summary.json").read_text())
    assert summary["response_s"]["each"] == [round(turn.response_s, 3) for turn in result.turns if turn.response_s]
    assert [gap["start_s"] for gap in summary["gaps"]["each"]] == [round(gap.start_s, 3) for gap in result.gaps]
    assert [line.split()[0] for line in told] == ["connected", told[1].split()[0], "ended"]
    assert "word.wav" in told[1]


async def test_a_recording_that_cannot_be_used_is_found_before_anyone_is_called(
    service: StandIn, tmp_path: Path
) -> None:
    with pytest.raises(WavFault, match="there is no such file"):
        await place_call(service.url, [tmp_path / "none.wav"])

    assert service.posts == []


async def test_a_place_that_cannot_be_written_is_named(service: StandIn, word: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    service.handler = Agent(answer_s=0.3).hold

    with pytest.raises(OutFault, match=r"file: cannot be made: File exists"):
        await place_call(service.url, [word], token=TOKEN, public_url=PUBLIC_URL, out=tmp_path / "file")

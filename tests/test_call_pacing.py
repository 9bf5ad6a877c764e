"""What the caller hears of an engine that stalls: frames that come late and all at once, with their times given."""

import base64
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.types import Message
from starlette.websockets import WebSocket

from app.call import Call, CallFacts
from app.engine import FRAME_SAMPLES, Engine, Lease, Spoken
from app.engine.contract import Pcm
from app.engine.echo import EchoRunner
from app.legs.websocket import WebSocketLeg
from app.metrics import Metrics
from app.personas import load_personas
from app.simulate.playback import Playback
from app.store import Store
from telephony.line import Line
from telephony.playout import AHEAD_MAX_MS, LEAD_MS, UNREST_MS
from telephony.twilio import TwilioStream
from tests.calls import written

CALL = "0" * 31 + "1"
START = {
    "event": "start",
    "streamSid": "MZ1",
    "start": {
        "callSid": "CA1",
        "streamSid": "MZ1",
        "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
    },
}
QUIET = np.zeros(FRAME_SAMPLES, np.float32)


class Trial:
    """A call whose frames come when the test says, and what its caller hears, on a clock of milliseconds."""

    def __init__(self, store: Store) -> None:
        persona = load_personas(Path("personas")).by_name["operator"]
        facts = CallFacts(CALL, "twilio", "CA1", "+15550100001", "+15550100002", persona)
        engine = Engine(EchoRunner(1), lambda spoken: None)
        store.call_started(
            CALL, carrier="twilio", carrier_call_id="CA1", persona="operator", engine="echo", caller="", called=""
        )
        self.call = Call(facts, Lease(0, 1), engine, store, Metrics())
        self.leg = WebSocketLeg(WebSocket({"type": "websocket"}, _nothing, _nowhere), TwilioStream())
        self.playback = Playback()
        self.held_ms: list[float] = []
        for message in ({"event": "connected"}, START):
            for event in self.leg.protocol.receive(json.dumps(message)):
                self.call._on(event, self.leg)

    def run(self, frames: list[tuple[int, Spoken]], until_ms: int) -> None:
        """Let each frame come at its time; the call is asked every 5 ms."""
        coming = iter(sorted(frames, key=lambda one: one[0]))
        after = next(coming, None)
        for now_ms in range(0, until_ms, 5):
            while after is not None and after[0] <= now_ms:
                self.call.take(after[1])
                after = next(coming, None)
            while self.call.say_due(self.leg, 1_000 + now_ms / 1000):
                self.carry(now_ms)
            self.playback.advance(now_ms * 8)
            self.held_ms.append((self.playback._taken_bytes - self.playback._done_bytes) / 8)

    def carry(self, now_ms: int) -> None:
        for text in self.leg.protocol.data_to_send():
            told = json.loads(text)
            match told["event"]:
                case "media":
                    self.playback.play(base64.b64decode(told["media"]["payload"]), now_ms * 8)
                case "mark":
                    self.playback.mark(told["mark"]["name"], now_ms * 8)
                case "clear":
                    self.playback.clear(now_ms * 8)


async def _nothing() -> Message:
    return {"type": "websocket.disconnect"}


async def _nowhere(_message: Message) -> None:
    return None


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    store = Store.open(f"sqlite:///{tmp_path / 'calls.db'}")
    trial = Trial(store)
    yield trial
    store.close()


def speech(frames: int, seed: int, pause_every: int = 10, pause: int = 8) -> list[Pcm]:
    """Words of noise, each frame unlike any other, with pauses between."""
    noise = np.random.default_rng(seed)
    return [
        QUIET
        if number % (pause_every + pause) >= pause_every
        else noise.uniform(-0.5, 0.5, FRAME_SAMPLES).astype(np.float32)
        for number in range(frames)
    ]


def as_sent(said: list[Pcm]) -> list[bytes]:
    line = Line(0.0)
    return [line.say(pcm) for pcm in said]


def heard_at_ms(trial: Trial, said: list[Pcm]) -> dict[int, float]:
    """Where the caller heard each word's frame, whole; all of them must be there, in their order."""
    lane, at, found = bytes(trial.playback.lane), 0, {}
    for number, ulaw in enumerate(as_sent(said)):
        if said[number] is not QUIET:
            at = lane.find(ulaw, at)
            assert at >= 0, f"frame {number} was not heard, or not whole"
            found[number] = at / 8
    return found


def test_a_frame_that_comes_on_the_beat_finds_the_lead_before_it(trial: Trial) -> None:
    said = speech(60, seed=1)
    trial.run([(100 + 80 * number, Spoken(pcm)) for number, pcm in enumerate(said)], 5_500)

    assert {at_ms - 100 - 80 * number for number, at_ms in heard_at_ms(trial, said).items()} == {LEAD_MS}
    assert not [dry for dry in trial.playback.dry if dry.end < (100 + 60 * 80) * 8]


@pytest.mark.parametrize("stall_ms", [100, 250, 330, 400])
@pytest.mark.parametrize("first", [23, 27, 30, 35])
def test_after_a_stall_no_word_is_lost_and_the_next_pause_brings_the_call_back_on_time(
    trial: Trial, stall_ms: int, first: int
) -> None:
    """Frames from `first` on come together once the stall is over; wherever in words or pauses it falls."""
    said = speech(90, seed=first)
    times = [100 + 80 * number for number in range(90)]
    over_ms = times[first] + stall_ms
    late = [(over_ms if number >= first and at < over_ms else at) for number, at in enumerate(times)]
    trial.run(list(zip(late, map(Spoken, said), strict=True)), 8_500)

    delays = {number: at_ms - times[number] for number, at_ms in heard_at_ms(trial, said).items()}
    assert max(trial.held_ms) <= AHEAD_MAX_MS
    settled = {number: delay for number, delay in delays.items() if not first <= number < first + 18}
    assert all(abs(delay - LEAD_MS) <= UNREST_MS for delay in settled.values())
    assert all(delay <= stall_ms + LEAD_MS + UNREST_MS for delay in delays.values())


def test_the_end_of_the_last_word_is_heard_where_the_pause_behind_it_is_left_out(trial: Trial) -> None:
    """The line's filter says the last 2.5 ms of a frame with the next one."""
    said = speech(18, seed=5)
    times = [100 + 80 * number if number < 5 else max(900, 100 + 80 * number) for number in range(18)]
    trial.run(list(zip(times, map(Spoken, said), strict=True)), 3_000)

    last = round(heard_at_ms(trial, said)[9] * 8) + 640
    tail = as_sent(said)[10][:24]
    assert trial.call._left_out_ms > 0
    assert set(tail) != {0xFF}
    assert bytes(trial.playback.lane[last : last + 24]) == tail


def test_delays_of_every_kind_never_pile_up(trial: Trial) -> None:
    """Random lateness on every frame, some of it long: the order of frames is kept, as the engine keeps it."""
    chance = random.Random(7)
    said = speech(300, seed=7)
    times = [100 + 80 * number for number in range(300)]
    late, latest = [], 0
    for at in times:
        latest = max(latest, at + chance.choice([0, 0, 0, 0, 5, 10, 20, 40, 90, 300]))
        late.append(latest)
    trial.run(list(zip(late, map(Spoken, said), strict=True)), 25_500)

    delays = [at_ms - times[number] for number, at_ms in heard_at_ms(trial, said).items()]
    assert max(trial.held_ms) <= AHEAD_MAX_MS
    assert max(delays) <= 300 + LEAD_MS + 80


def test_an_interruption_flushes_what_the_carrier_holds_and_what_still_waits_here(trial: Trial) -> None:
    """Six frames at once, a word in each, and the cut before the carrier could be given them all."""
    said = speech(6, seed=3)
    fade = np.linspace(0.3, 0, FRAME_SAMPLES, dtype=np.float32)
    frames = [(100, Spoken(pcm, f"word{number} ")) for number, pcm in enumerate(said)]
    trial.run([*frames, (200, Spoken(fade, ends=True, interrupted=True))], 1_000)

    lane = bytes(trial.playback.lane)
    assert [at // 8 for at in trial.playback.flushes] == [200]
    assert as_sent(said)[0] in lane
    assert not [ulaw for ulaw in as_sent(said)[1:] if ulaw in lane]
    # The fade comes at once, with the lead behind it.
    assert np.flatnonzero(np.frombuffer(lane, np.uint8)[200 * 8 :] != 0xFF)[0] < 8
    assert trial.playback.dry[-1].start // 8 == 200 + 80 + LEAD_MS


def test_what_was_flushed_is_not_kept_as_heard_and_what_was_played_is(trial: Trial) -> None:
    said = speech(6, seed=3)
    frames = [(100, Spoken(pcm, f"word{number} ")) for number, pcm in enumerate(said)]
    # 60 ms of lead and 80 ms of the first word are out by then; the second has only begun.
    trial.run([*frames, (245, Spoken(QUIET, ends=True, interrupted=True))], 1_000)
    store = trial.call._store
    written(store)
    line = store.transcript(CALL)[0]

    assert line.text == "word0 word1 word2 word3 word4 word5"
    assert line.heard == "word0"


def test_words_are_never_left_out_however_quiet(trial: Trial) -> None:
    """A breath that the engine marks with a word is a word."""
    said = speech(12, seed=4, pause_every=4, pause=0)
    whisper = np.full(FRAME_SAMPLES, 0.005, np.float32) * np.sin(np.arange(FRAME_SAMPLES) * 0.3).astype(np.float32)
    said[3:6] = [whisper] * 3
    frames = [(100, Spoken(pcm, "word ")) for pcm in said[:6]]
    trial.run([*frames, *((600 + 80 * n, Spoken(pcm)) for n, pcm in enumerate(said[6:]))], 2_000)

    heard_at_ms(trial, said)
    assert trial.call._left_out_ms == 0

"""One call: a leg, a line and a lease, and the two tasks that carry a voice each way.

The only file that knows both the carrier's side and the engine's.
"""

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from app.engine import FRAME_MS, Lease, SpeechEngine, Spoken
from app.legs.websocket import INTERNAL_ERROR, NORMAL, POLICY_VIOLATION, WebSocketLeg
from app.lifecycle import CallState, Outcome, move
from app.metrics import Metrics
from app.personas import Persona
from app.store import Store, TranscriptLine
from app.transcript import Transcript
from telephony.events import CallEnded, CallerAudio, CallStarted, Digit, Event, Played, RemoteProtocolError
from telephony.g711 import BYTES_PER_MS, ULAW_SILENCE
from telephony.line import QUIET_PEAK, Line
from telephony.playout import LEAD_MS, Playout

OUTBOX_FRAMES = 6
MARK_EVERY_FRAMES = 5
_VOICE_PEAK = 0.02
# A quiet frame begins with the end of the word before it: the line's filter delays by 2.5 ms.
_TAIL_MS = 5
_START_WITHIN_S = 10.0

_log = logging.getLogger("personaline.call")


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What is known of a call before its media comes."""

    id: str
    carrier: str
    carrier_call_id: str
    caller: str
    called: str
    persona: Persona


class Call:
    """From the carrier's first word of it to its end. Event loop only."""

    def __init__(self, facts: CallFacts, lease: Lease, engine: SpeechEngine, store: Store, metrics: Metrics) -> None:
        self.facts = facts
        self.lease = lease
        self.state = CallState.RINGING
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._outbox: deque[Spoken] = deque()
        self._cut_short = 0
        self._playout = Playout()
        self._left_out_ms = 0.0
        self._spoken = asyncio.Event()
        self._ended = asyncio.Event()
        self._outcome, self._reason = Outcome.COMPLETED, ""
        self._engine_stopped = False
        self._began_s = self._voice_s = time.monotonic()
        self._line: Line | None = None
        self._transcript = Transcript(self._keep)
        self._frames_out = 0
        self._answer_due_s: float | None = None

    @property
    def clock_s(self) -> float:
        """Seconds since the media began."""
        return time.monotonic() - self._began_s

    async def run(self, leg: WebSocketLeg) -> None:
        """Carry the call until either side ends it; afterwards nothing of it is left but what was kept."""
        self.state = move(self.state, CallState.LIVE)
        try:
            async with asyncio.TaskGroup() as tasks:
                both = [tasks.create_task(self._listen(leg)), tasks.create_task(self._speak(leg))]
                await self._ended.wait()
                for task in both:
                    task.cancel()
        finally:
            self._finish()
            await leg.close(self._close_code(), self._reason)

    def take(self, spoken: Spoken) -> None:
        """A frame from the engine. The oldest is dropped when the carrier has stopped reading."""
        if spoken.interrupted:
            self._cut_short = len(self._outbox)
        self._outbox.append(spoken)
        if len(self._outbox) > OUTBOX_FRAMES:
            lost, then = self._outbox.popleft(), self._outbox[0]
            # Its sound is lost; that the agent was interrupted, and what the caller said, is not.
            self._outbox[0] = replace(
                then, interrupted=then.interrupted or lost.interrupted, heard=lost.heard + then.heard
            )
            self._cut_short = max(0, self._cut_short - 1)
            self._metrics.outbox_dropped.inc()
        self._spoken.set()

    def on_clock(self, now_s: float) -> None:
        """Called every 20 ms: silence for a carrier that sends none, frames held back, and the call's limits."""
        if self.state is not CallState.LIVE:
            return
        if not self._engine.holds(self.lease):
            self._engine_stopped = True
            self.end(Outcome.FAILED, "the speech engine stopped")
        elif self._line is not None:
            self._push(self._line.overdue(now_s))
            self._check_limits(now_s)
            if self._outbox:
                self._spoken.set()
        elif now_s - self._began_s > _START_WITHIN_S:
            self.end(Outcome.FAILED, f"no start message within {_START_WITHIN_S:.0f} s")

    def end(self, outcome: Outcome, reason: str) -> None:
        """Begin to end the call. The first word on why is the one that counts."""
        if not self._ended.is_set():
            self._outcome, self._reason = outcome, reason
            self._ended.set()
            if self.state is CallState.RINGING:
                self._finish()

    async def _listen(self, leg: WebSocketLeg) -> None:
        """Frame's way, steps 1-4: socket, protocol, line, engine."""
        while not self._ended.is_set():
            try:
                events = await leg.receive()
            except RemoteProtocolError as error:
                self._metrics.protocol_errors.labels(self.facts.carrier).inc()
                _log.warning("call %s closed: %s", self.facts.id, error)
                self.end(Outcome.FAILED, str(error))
                return
            for event in events:
                self._on(event, leg)

    def _on(self, event: Event, leg: WebSocketLeg) -> None:
        match event:
            case CallerAudio():
                self._hear(event)
            case Played(until_ms):
                self._transcript.played(until_ms)
            case CallStarted():
                self._start(event, leg)
            case Digit(digit):
                self._store.event(self.facts.id, "dtmf", {"digit": digit}, self.clock_s)
            case CallEnded(reason):
                self.end(Outcome.COMPLETED, f"caller: {reason}")

    def _start(self, started: CallStarted, leg: WebSocketLeg) -> None:
        if self.facts.carrier_call_id and started.call_id != self.facts.carrier_call_id:
            self.end(Outcome.FAILED, f"the media is of call {started.call_id}, not {self.facts.carrier_call_id}")
            return
        self._began_s = self._voice_s = time.monotonic()
        self._line = Line(self._began_s)
        self._store.call_answered(self.facts.id)

    def _hear(self, audio: CallerAudio) -> None:
        assert self._line is not None, "the protocol lets no audio come before the start"
        self._push(self._line.hear(audio, time.monotonic()))

    def _push(self, frames: list[NDArray[np.float32]]) -> None:
        for frame in frames:
            if float(np.abs(frame).max()) > _VOICE_PEAK:
                self._voice_s = time.monotonic()
            self._engine.push(self.lease, frame)

    async def _speak(self, leg: WebSocketLeg) -> None:
        """Frame's way, steps 8-9: outbox, line, protocol, socket."""
        while True:
            await self._spoken.wait()
            self._spoken.clear()
            while not self._ended.is_set() and self.say_due(leg, time.monotonic()):
                if not await leg.send():
                    self.end(Outcome.COMPLETED, "caller: the socket closed")
                    return

    def say_due(self, leg: WebSocketLeg, now_s: float) -> bool:
        """Hand the protocol the frame that waits longest. False when none does, or the carrier holds enough for now."""
        if not self._outbox:
            return False
        spoken = self._outbox[0]
        quiet = not spoken.text and float(np.abs(spoken.pcm).max()) < QUIET_PEAK
        at_once = self._cut_short > 0 or spoken.interrupted
        if not at_once and not self._playout.takes(_TAIL_MS if quiet else FRAME_MS, now_s):
            return False
        self._outbox.popleft()
        if self._cut_short > 0:
            self._cut_short -= 1
            self._note(spoken, leg.protocol.sent_ms + FRAME_MS)
        elif spoken.interrupted:
            self._interrupt(spoken, leg, now_s)
        else:
            self._say(spoken, leg, quiet, now_s)
        return True

    def _say(self, spoken: Spoken, leg: WebSocketLeg, quiet: bool, now_s: float) -> None:
        assert self._line is not None
        self._send(self._on_time(self._line.say(spoken.pcm), quiet, now_s), leg, now_s)
        self._frames_out += 1
        if spoken.ends or self._frames_out % MARK_EVERY_FRAMES == 0:
            leg.protocol.send_mark()
        self._note(spoken, leg.protocol.sent_ms)

    def _on_time(self, ulaw: bytes, quiet: bool, now_s: float) -> bytes:
        """Put the lead right, where nobody hears it: before the first frame of all, and in quiet ones."""
        surplus = round(self._playout.surplus_ms(len(self._outbox) * FRAME_MS, now_s) * BYTES_PER_MS)
        if quiet:
            kept = ulaw[: max(_TAIL_MS * BYTES_PER_MS, len(ulaw) - surplus)]
            self._left_out_ms += (len(ulaw) - len(kept)) / BYTES_PER_MS
            return kept + ULAW_SILENCE * -surplus
        return ulaw if self._frames_out else ULAW_SILENCE * -surplus + ulaw

    def _interrupt(self, spoken: Spoken, leg: WebSocketLeg, now_s: float) -> None:
        """Flush what the carrier holds. The fade follows the cut at once; the lead is given again behind it."""
        assert self._line is not None
        self._store.event(self.facts.id, "interrupted", {}, self.clock_s)
        heard_ms = leg.protocol.sent_ms - self._playout.held_ms(now_s)
        leg.protocol.clear()
        self._playout.flushed(now_s)
        self._note(spoken, leg.protocol.sent_ms + FRAME_MS)
        self._transcript.played(int(heard_ms))
        self._transcript.flushed()
        self._send(self._line.say(spoken.pcm) + ULAW_SILENCE * (LEAD_MS * BYTES_PER_MS), leg, now_s)
        self._frames_out += 1
        leg.protocol.send_mark()

    def _send(self, ulaw: bytes, leg: WebSocketLeg, now_s: float) -> None:
        leg.protocol.send_audio(ulaw)
        self._playout.sent(len(ulaw) / BYTES_PER_MS, now_s)

    def _note(self, spoken: Spoken, sent_ms: int) -> None:
        """Keep what was said and heard with a frame that has been said once `sent_ms` of audio are out."""
        if spoken.text or spoken.ends:
            self._voice_s = time.monotonic()
            self._measure_response(spoken)
            self._transcript.say(spoken, self.clock_s, sent_ms)
        for heard in spoken.heard:
            self._transcript.hear(heard)
            self._answer_due_s = heard.end_s if heard.final else self._answer_due_s

    def _measure_response(self, spoken: Spoken) -> None:
        if spoken.text and self._answer_due_s is not None:
            self._metrics.response.observe(max(0.0, self.clock_s - self._answer_due_s))
            self._answer_due_s = None

    def _check_limits(self, now_s: float) -> None:
        limits = self.facts.persona.limits
        if now_s - self._began_s > limits.duration_s:
            self.end(Outcome.COMPLETED, f"longest duration, {limits.duration_s:g} s")
        elif now_s - self._voice_s > limits.silence_s:
            self.end(Outcome.COMPLETED, f"nobody spoke for {limits.silence_s:g} s")

    def _keep(self, line: TranscriptLine) -> None:
        if self.facts.persona.transcribe:
            self._store.line(self.facts.id, line)

    def _finish(self) -> None:
        """Give everything back, whatever ended the call."""
        answered = self.state is CallState.LIVE and self._line is not None
        if not self._ended.is_set():
            self._outcome, self._reason = Outcome.FAILED, "the call's tasks stopped"
        self.state = move(self.state, CallState.ENDED)
        self._engine.release(self.lease)
        duration_s = self.clock_s if answered else 0.0
        self._transcript.close(duration_s)
        self._store.call_ended(self.facts.id, outcome=self._outcome.value, reason=self._reason, duration_s=duration_s)
        self._metrics.calls.labels(self._outcome.value).inc()
        if self._line is not None:
            self._metrics.add_line(self._line.borrowed_ms, self._line.filled_ms, self._line.dropped_ms)
            self._metrics.left_out.inc(self._left_out_ms / 1000)
        _log.info("call %s ended after %.1f s: %s (%s)", self.facts.id, duration_s, self._outcome, self._reason)

    def _close_code(self) -> int:
        if self._outcome is Outcome.FAILED:
            return INTERNAL_ERROR if self._engine_stopped else POLICY_VIOLATION
        return NORMAL

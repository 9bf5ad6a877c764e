"""The calls that are up: who may come in, whose frame is whose, and the clock that all of them share."""

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from app.call import Call, CallFacts
from app.engine import EngineFull, Lease, Role, SpeechEngine, Spoken
from app.legs.websocket import WebSocketLeg
from app.lifecycle import CallState, Outcome
from app.metrics import Metrics
from app.personas import Persona
from app.store import Store

CLOCK_S = 0.02
CONNECT_WITHIN_S = 15.0
_TOKEN_BYTES = 24

_log = logging.getLogger("personaline.calls")


@dataclass(slots=True)
class _Expected:
    call: Call
    until_s: float


class Calls:
    """Event loop only, but for `deliver`, which the engine thread calls."""

    def __init__(self, store: Store, metrics: Metrics, engine_name: str) -> None:
        self._store = store
        self._metrics = metrics
        self._engine_name = engine_name
        self._engine: SpeechEngine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._by_lease: dict[Lease, Call] = {}
        self._expected: dict[str, _Expected] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._admitting = True
        self._counted = dict.fromkeys((metrics.inbox_dropped, metrics.late_ticks, metrics.restarts), 0)
        self._clock: asyncio.Task[None] | None = None

    def start(self, engine: SpeechEngine) -> None:
        """Begin to take calls for this engine, on the running loop."""
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._clock = asyncio.create_task(self._tick(), name="call clock")

    @property
    def live(self) -> int:
        return sum(call.state is CallState.LIVE for call in self._by_lease.values())

    def admit(self, facts: CallFacts, role: Role) -> str:
        """Lease a row for a call that is ringing, and give the token that its media must bring, once, within 15 s.

        Raises:
            EngineFull: no row is free or the service is stopping. The call is kept as busy.
        """
        assert self._engine is not None
        self._store.call_started(
            facts.id,
            carrier=facts.carrier,
            carrier_call_id=facts.carrier_call_id,
            persona=facts.persona.name,
            engine=self._engine_name,
            caller=facts.caller,
            called=facts.called,
        )
        try:
            if not self._admitting:
                raise EngineFull("the service is stopping", "stopping")
            lease = self._engine.lease(role)
        except EngineFull as error:
            self._metrics.calls.labels(Outcome.BUSY.value).inc()
            self._metrics.refused.labels(error.reason).inc()
            self._store.call_ended(facts.id, outcome=Outcome.BUSY.value, reason=str(error), duration_s=0)
            raise
        call = Call(facts, lease, self._engine, self._store, self._metrics)
        self._by_lease[lease] = call
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._expected[token] = _Expected(call, time.monotonic() + CONNECT_WITHIN_S)
        return token

    def claim(self, token: str) -> Call | None:
        """The call whose media this is. None for a token never given, given back, or used before."""
        expected = self._expected.pop(token, None)
        return expected.call if expected is not None and expected.call.state is CallState.RINGING else None

    def by_carrier_id(self, carrier: str, carrier_call_id: str) -> Call | None:
        matches = (c for c in self._by_lease.values() if c.facts.carrier_call_id == carrier_call_id)
        return next((call for call in matches if call.facts.carrier == carrier), None)

    async def run(self, call: Call, leg: WebSocketLeg) -> None:
        """Carry one call to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            await call.run(leg)
        finally:
            self._running.discard(task)
            self._by_lease.pop(call.lease, None)

    def deliver(self, said: Sequence[tuple[Lease, Spoken]]) -> None:
        """Take what a tick said from the engine thread to the loop, in one crossing."""
        if said and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out, said)

    def _hand_out(self, said: Sequence[tuple[Lease, Spoken]]) -> None:
        assert self._engine is not None
        self._metrics.tick.observe(self._engine.tick_s)
        for lease, spoken in said:
            call = self._by_lease.get(lease)
            if call is not None:
                call.take(spoken)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(CLOCK_S)
            now_s = time.monotonic()
            self._count_engine()
            for call in list(self._by_lease.values()):
                call.on_clock(now_s)
            self._expire(now_s)

    def _count_engine(self) -> None:
        """What the engine has counted since the last look."""
        assert self._engine is not None
        found = (self._engine.dropped_frames, self._engine.late_ticks, self._engine.restarts)
        for (counter, before), now in zip(list(self._counted.items()), found, strict=True):
            # A process that is being replaced may be counted a little short for a moment.
            if now > before:
                counter.inc(now - before)
                self._counted[counter] = now

    def _expire(self, now_s: float) -> None:
        for token, expected in list(self._expected.items()):
            if now_s > expected.until_s or expected.call.state is not CallState.RINGING:
                del self._expected[token]
                self._by_lease.pop(expected.call.lease, None)
                expected.call.end(Outcome.FAILED, f"its media did not come within {CONNECT_WITHIN_S:.0f} s")

    async def close(self) -> None:
        """Take no new calls and end those that are up."""
        self._admitting = False
        for call in list(self._by_lease.values()):
            call.end(Outcome.COMPLETED, "the service stopped")
        if self._running:
            await asyncio.wait(self._running, timeout=5)
        if self._clock is not None:
            self._clock.cancel()


def role_of(persona: Persona) -> Role:
    """What the engine needs of a persona, its variables at their defaults.

    Raises WrongVariables when the persona has variables that every call must give.
    """
    filled = persona.fill()
    sampling = persona.sampling
    return Role(
        name=persona.name, prompt=filled.prompt, greeting=filled.greeting, voice=persona.voice,
        language=persona.language, text_temperature=sampling.text_temperature, text_top_k=sampling.text_top_k,
        audio_temperature=sampling.audio_temperature, audio_top_k=sampling.audio_top_k,
    )  # fmt: skip

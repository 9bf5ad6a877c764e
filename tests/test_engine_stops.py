"""Calls on an engine in a process of its own, which dies under them."""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from app.engine import FRAME_SAMPLES, Runner
from app.engine_choice import Choice
from app.simulate.twilio import CallRejected, FakeTwilio
from telephony import g711
from tests.engine.trial_runner import DIE, TrialRunner
from tests.service import TOKEN, Running, running, soon, wait_for
from tests.test_carriers import free_port

Serve = Callable[[Callable[[], Runner]], Running]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """A service on an engine of one's own; ready or not."""
    monkeypatch.setattr("app.engine.process.FIRST_PAUSE_S", 0.01)
    with pytest.MonkeyPatch.context() as chosen:
        serving = []

        def start(make: Callable[[], Runner]) -> Running:
            chosen.setattr("app.main.choose_engine", lambda settings: Choice("echo", make, True, 1))
            serving.append(running(tmp_path, free_port()))
            return serving[0].__enter__()

        yield start
        for service in serving:
            service.__exit__(None, None, None)


async def test_a_call_on_an_engine_that_dies_ends_as_failed_and_the_next_caller_is_answered(serve: Serve) -> None:
    service = serve(partial(TrialRunner, 1))
    engine = service.service.engine
    tone = g711.encode((0.5 * np.sin(np.arange(24_000) * 0.4)).astype(np.float32))
    async with soon(60), FakeTwilio(service.url, token=TOKEN) as call:
        call.say(tone)
        while not np.abs(g711.decode(bytes(call.playback.lane))).max(initial=0) > 0.2:
            await asyncio.sleep(0.02)
        live = next(iter(service.service.calls._by_lease))
        assert engine.push(live, np.full(FRAME_SAMPLES, DIE, np.float32))
        await call.ended.wait()

    assert call.ended_by == "the service closed the socket with code 1011"
    assert not call.breaches
    store = service.service.store
    wait_for(lambda: store.calls(1) and store.calls(1)[0].outcome)
    assert (store.calls(1)[0].outcome, store.calls(1)[0].reason) == ("failed", "the speech engine stopped")

    await asyncio.to_thread(wait_for, lambda: engine.refusal is None and engine.in_use == 0, 60)
    async with soon(60), FakeTwilio(service.url, token=TOKEN) as call:
        call.say(tone)
        while not np.abs(g711.decode(bytes(call.playback.lane))).max(initial=0) > 0.2:
            await asyncio.sleep(0.02)
    wait_for(lambda: "personaline_engine_restarts_total 1.0" in httpx.get(f"{service.url}/metrics").text)


async def test_while_no_engine_is_there_callers_hear_busy_and_ready_says_why(serve: Serve) -> None:
    service = serve(partial(TrialRunner, 1))
    engine = service.service.engine
    await asyncio.to_thread(engine.close)
    await asyncio.to_thread(wait_for, lambda: engine.refusal is not None)

    ready = httpx.get(f"{service.url}/ready")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["the engine is not ready"])
    with pytest.raises(CallRejected, match="busy"):
        await FakeTwilio(service.url, token=TOKEN).dial()
    assert 'personaline_calls_refused_total{reason="not_ready"} 1.0' in httpx.get(f"{service.url}/metrics").text
    assert 'personaline_calls_refused_total{reason="full"} 0.0' in httpx.get(f"{service.url}/metrics").text


async def test_a_full_engine_is_counted_as_such(serve: Serve) -> None:
    service = serve(partial(TrialRunner, 1))
    async with soon(60), FakeTwilio(service.url, token=TOKEN):
        with pytest.raises(CallRejected, match="busy"):
            await FakeTwilio(service.url, token=TOKEN).dial()

    assert 'personaline_calls_refused_total{reason="full"} 1.0' in httpx.get(f"{service.url}/metrics").text

"""A phone call answered by PersonaPlex: the carrier's socket on one side, the networks on the other, nothing between
faked. The weights are random and small, so its words mean nothing; that they come, in time and in order, does."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.simulate.twilio import FakeTwilio
from telephony import g711
from tests.engine.tiny import make_tiny_checkpoint
from tests.service import TOKEN, Running, running, soon, wait_for

GREETING = "Good morning, you have reached the harbour office."
PERSONA = f"""\
name: harbour
voice: NATM1
prompt: You work for the harbour office and your name is Ada.
greeting: {GREETING}
default: true
"""


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    # The engine's process has threads of its own: on busy cores several wait for each other longer than they reckon.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    personas = tmp_path / "personas"
    personas.mkdir()
    (personas / "harbour.yaml").write_text(PERSONA, encoding="utf-8")
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    chosen = {"engine": "personaplex", "personaplex_checkpoint": checkpoint, "personaplex_device": "cpu"}
    with running(tmp_path, port, rows=2, personas_dir=personas, **chosen) as service:
        yield service


async def test_personaplex_answers_a_call_over_the_carriers_socket(service: Running) -> None:
    hum = g711.encode((0.2 * np.sin(np.arange(40_000) * 0.3)).astype(np.float32))
    async with soon(60), FakeTwilio(service.url, token=TOKEN) as call:
        call.say(hum)
        while len(call.playback.lane) < 8 * 8_000 and not call.ended.is_set():
            await asyncio.sleep(0.05)

    assert call.ended_by == "the caller hung up"
    assert not call.breaches
    heard = g711.decode(bytes(call.playback.lane[8_000 : 8 * 8_000]))
    assert np.sqrt(np.mean(np.square(heard))) > 0.005, "the agent is silent"

    store = service.service.store
    wait_for(lambda: store.calls(1) and store.calls(1)[0].outcome == "completed")
    kept = store.calls(1)[0]
    assert (kept.engine, kept.persona) == ("personaplex", "harbour")
    lines = store.transcript(kept.id)
    assert {line.role for line in lines} == {"agent"}
    assert " ".join(line.text for line in lines).strip().startswith(GREETING)


async def test_two_callers_of_personaplex_hear_each_their_own(service: Running) -> None:
    async with soon(60), FakeTwilio(service.url, token=TOKEN) as one, FakeTwilio(service.url, token=TOKEN) as two:
        while min(len(one.playback.lane), len(two.playback.lane)) < 5 * 8_000:
            await asyncio.sleep(0.05)

    assert not one.breaches
    assert not two.breaches
    # Past the greeting, whose words both must say, their seeds differ.
    assert one.playback.lane[-8_000:] != two.playback.lane[-8_000:]

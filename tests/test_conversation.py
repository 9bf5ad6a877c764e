"""Whole conversations with the embedded engine and its language model, in real time."""

import asyncio
import json
import os
import re
import signal
import wave
from pathlib import Path

import numpy as np
import pytest

from app.demo import RECORDINGS, run_demo
from app.engine.cascade.parts import require_packages
from app.engine.contract import EngineFault
from app.model_files import ModelFileFault, llm_path
from app.simulate.service import trial_service
from app.simulate.twilio import CallRejected, FakeTwilio
from app.simulate.wavs import read_wav
from telephony import g711
from tests.service import soon

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def model() -> None:
    try:
        require_packages()
        llm_path(None)
    except (EngineFault, ModelFileFault) as fault:
        pytest.skip(f"the embedded engine is not here: {fault}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    out = tmp_path_factory.mktemp("demo")
    return asyncio.run(run_demo(out)), out


def lane(out: Path, side: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    with wave.open(str(out / "call.wav")) as recording:
        both = np.frombuffer(recording.readframes(recording.getnframes()), np.int16).reshape(-1, 2)
    return (both[:, side] / 32_768).astype(np.float32)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


def test_every_question_of_the_demo_is_answered_right(demo: tuple[int, Path]) -> None:
    code, out = demo
    summary = json.loads((out / "summary.json").read_text())

    assert code == 0, summary["questions"]
    assert len(summary["questions"]) >= 6


def test_what_the_recording_holds_is_what_the_transcript_says(demo: tuple[int, Path]) -> None:
    """The agent's lane, heard by the recogniser, against the words that were kept."""
    import soxr

    from app.engine.cascade.asr import Recogniser

    recogniser = Recogniser()
    agent, out = lane(demo[1], 1), demo[1]
    lines = [line for line in json.loads((out / "transcript.json").read_text()) if line["role"] == "agent"]
    said, heard = set(), set()
    for line in lines:
        piece = agent[max(0, int((line["start_s"] - 0.3) * 8_000)) : int((line["end_s"] + 0.5) * 8_000)]
        heard |= words(recogniser(soxr.resample(piece, 8_000, 16_000).astype(np.float32)))
        said |= words(line["text"])

    assert len(said & heard) >= 0.8 * len(said), said - heard


def test_the_agents_speech_has_no_hole_and_no_click(demo: tuple[int, Path]) -> None:
    summary = json.loads((demo[1] / "summary.json").read_text())

    assert summary["clicks_s"] == []
    assert summary["gaps"]["each"] == []
    assert summary["breaches"] == []


def test_the_agent_goes_on_through_a_backchannel_and_stops_for_words(demo: tuple[int, Path]) -> None:
    turns = json.loads((demo[1] / "summary.json").read_text())["turns"]

    assert [turn["went_on"] for turn in turns if turn["kind"] == "backchannel"] == [True]
    assert all(turn["stop_s"] is not None for turn in turns if turn["kind"] == "interrupt")


async def test_what_was_said_before_the_process_was_killed_is_there_afterwards(tmp_path: Path) -> None:
    async with trial_service(tmp_path, "cascade") as service, service.client() as http:
        await service.until_ready(http, print)
        call = FakeTwilio(service.url, token=service.token)
        await call.dial()
        call.say(g711.encode(read_wav(RECORDINGS / "hours.wav")))
        async with soon(30):
            while "close" not in await _said(http):
                await asyncio.sleep(0.05)
        assert service._process is not None
        os.kill(service._process.pid, signal.SIGKILL)
        await service._process.wait()
        await call.cut()
    async with trial_service(tmp_path, "echo") as service, service.client() as http:
        await service.until_ready(http, print)
        (kept,) = (await http.get("/api/v1/calls")).json()["calls"]

        assert kept["outcome"] == "interrupted"
        assert "close" in await _said(http)


async def test_a_caller_too_many_is_told_busy_and_the_first_goes_on(tmp_path: Path) -> None:
    async with trial_service(tmp_path, "cascade") as service, service.client() as http:
        await service.until_ready(http, print)
        rows = (await http.get("/ready")).json()["rows"]
        calls = [FakeTwilio(service.url, token=service.token) for _ in range(rows)]
        for call in calls:
            await call.dial()
        with pytest.raises(CallRejected, match="busy"):
            await FakeTwilio(service.url, token=service.token).dial()
        async with soon(20):
            while not (np.abs(g711.decode(calls[0].playback.lane)) > 0.05).any():
                await asyncio.sleep(0.1)
        for call in calls:
            await call.hang_up()


async def _said(http: object) -> str:
    import httpx

    assert isinstance(http, httpx.AsyncClient)
    calls = (await http.get("/api/v1/calls")).json()["calls"]
    if not calls:
        return ""
    reply = await http.get(f"/api/v1/calls/{calls[0]['id']}/transcript")
    return " ".join(line["text"] for line in reply.json()["lines"])

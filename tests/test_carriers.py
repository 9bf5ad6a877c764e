"""Twilio's way in: signatures, tokens, busy answers, and a whole call over a real socket."""

import asyncio
import base64
import contextlib
import json
import os
import socket
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from telephony import g711, twilio
from tests.service import CALLED, CALLER, TOKEN, Running, running, soon, wait_for

QUIET = b"\xff" * 160


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path, free_port(), rows=2) as service:
        yield service


def webhook(service: Running, sid: str = "CA1", query: str = "", token: str = TOKEN) -> httpx.Response:
    url = f"{service.url}/twilio/voice{query}"
    form = {"CallSid": sid, "From": CALLER, "To": CALLED, "CallStatus": "ringing", "Empty": ""}
    return httpx.post(url, data=form, headers={"x-twilio-signature": twilio.sign(token, url, form)})


def stream_url(response: httpx.Response) -> str:
    stream = ET.fromstring(response.text).find("./Connect/Stream")
    assert stream is not None, response.text
    return stream.attrib["url"]


@contextlib.asynccontextmanager
async def media(url: str, sid: str = "CA1") -> AsyncIterator[ClientConnection]:
    """Connect as Twilio does and say `connected` and `start`."""
    headers = {"x-twilio-signature": twilio.sign(TOKEN, url, {})}
    async with connect(url, additional_headers=headers, compression=None) as leg:
        await leg.send(json.dumps({"event": "connected", "protocol": "Call", "version": "1.0.0"}))
        await leg.send(json.dumps(start(sid)))
        yield leg


def start(sid: str) -> dict[str, object]:
    media_format = {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}
    inner = {"accountSid": "AC1", "streamSid": "MZ1", "callSid": sid, "mediaFormat": media_format}
    return {"event": "start", "sequenceNumber": "1", "streamSid": "MZ1", "start": inner}


def packet(number: int, ulaw: bytes) -> str:
    inner = {"track": "inbound", "chunk": str(number), "timestamp": str(100 + 20 * number)}
    inner["payload"] = base64.b64encode(ulaw).decode()
    return json.dumps({"event": "media", "streamSid": "MZ1", "media": inner})


async def talk(leg: ClientConnection, ulaw: bytes, first: int = 1) -> int:
    """Send audio in real time, 20 ms at a time. The number of the next packet."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for number, at in enumerate(range(0, len(ulaw), 160)):
        await asyncio.sleep(max(0.0, began_s + number * 0.02 - loop.time()))
        await leg.send(packet(first + number, ulaw[at : at + 160]))
    return first + len(ulaw) // 160


async def heard(leg: ClientConnection, wanted_bytes: int) -> bytes:
    audio = b""
    async with soon():
        while len(audio) < wanted_bytes:
            message = json.loads(await leg.recv())
            if message["event"] == "media":
                audio += base64.b64decode(message["media"]["payload"])
    return audio


def tone(hz: float, seconds: float) -> bytes:
    t = np.arange(int(seconds * 8000)) / 8000
    return g711.encode((0.5 * np.sin(2 * np.pi * hz * t)).astype(np.float32))


def loudest_hz(ulaw: bytes) -> float:
    pcm = g711.decode(ulaw)
    return float(np.argmax(np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))) * 8000 / len(pcm))


def test_a_signed_webhook_is_answered_with_a_stream_of_its_own(service: Running) -> None:
    response = webhook(service)
    stream = ET.fromstring(response.text).find("./Connect/Stream")

    assert response.status_code == 200
    assert stream is not None
    assert stream.attrib["url"].startswith(f"{service.socket_url}/twilio/media/")
    assert {p.attrib["name"]: p.attrib["value"] for p in stream} == {"persona": "operator", "from": CALLER}
    assert stream_url(webhook(service, "CA2")) != stream.attrib["url"]


def test_a_webhook_with_a_wrong_or_missing_signature_is_refused(service: Running) -> None:
    unsigned = httpx.post(f"{service.url}/twilio/voice", data={"CallSid": "CA1"})

    assert webhook(service, token="another token").status_code == 403
    assert unsigned.status_code == 403
    assert "PUBLIC_URL" in unsigned.json()["error"]["message"]
    assert service.service.engine.in_use == 0


def test_without_a_token_the_webhook_says_which_variable_is_missing(tmp_path: Path) -> None:
    with running(tmp_path, free_port(), twilio_auth_token=None) as service:
        response = webhook(service)

    assert response.status_code == 503
    assert "TWILIO_AUTH_TOKEN" in response.json()["error"]["message"]


def test_local_trials_may_go_unsigned_when_that_is_asked_for(tmp_path: Path) -> None:
    with running(tmp_path, free_port(), twilio_auth_token=None, dev_allow_unsigned=True) as service:
        response = httpx.post(f"{service.url}/twilio/voice", data={"CallSid": "CA1"})

    assert response.status_code == 200
    assert "<Stream" in response.text


def test_a_persona_can_be_chosen_and_one_that_is_not_there_is_named(service: Running) -> None:
    chosen = ET.fromstring(webhook(service, query="?persona=guide").text).find(".//Parameter[@name='persona']")
    absent = webhook(service, "CA2", query="?persona=nobody")

    assert chosen is not None
    assert chosen.attrib["value"] == "guide"
    assert absent.status_code == 404
    assert "guide, operator, tutor" in absent.json()["error"]["message"]


def test_when_every_row_is_taken_the_next_caller_hears_busy_and_is_counted(service: Running) -> None:
    webhook(service, "CA1")
    webhook(service, "CA2")
    third = webhook(service, "CA3")

    assert ET.fromstring(third.text).find("Reject").attrib == {"reason": "busy"}  # type: ignore[union-attr]
    ready = httpx.get(f"{service.url}/ready")
    assert (ready.status_code, ready.json()["rows_free"]) == (200, 0)
    assert ready.json()["warnings"] == ["all 2 rows are taken: another caller hears busy"]
    wait_for(lambda: not service.service.store.queued)
    assert [call.outcome for call in service.service.store.calls(10) if call.carrier_call_id == "CA3"] == ["busy"]
    assert 'personaline_calls_total{outcome="busy"} 1.0' in httpx.get(f"{service.url}/metrics").text


def test_a_persona_with_busy_words_has_the_carrier_say_them(tmp_path: Path) -> None:
    folder = tmp_path / "personas"
    folder.mkdir()
    (folder / "desk.yaml").write_text(
        "name: desk\nprompt: You work for {{shop}}.\nbusy: '{{shop}} is busy <now>.'\nvariables: {shop: Ink & Co}\n"
    )
    with running(tmp_path, free_port(), rows=1, personas_dir=folder) as service:
        webhook(service, "CA1")
        answer = ET.fromstring(webhook(service, "CA2").text)
        metrics = httpx.get(f"{service.url}/metrics").text

    assert [verb.tag for verb in answer] == ["Say", "Hangup"]
    assert answer[0].text == "Ink & Co is busy <now>."
    assert 'personaline_calls_total{outcome="busy"} 1.0' in metrics


async def test_what_the_caller_says_comes_back_over_a_real_socket(service: Running) -> None:
    async with media(stream_url(webhook(service))) as leg:
        sending = asyncio.create_task(talk(leg, tone(440, 1.6)))
        audio = await heard(leg, 12_000)
        await sending
        await leg.send(json.dumps({"event": "stop", "streamSid": "MZ1", "stop": {"callSid": "CA1"}}))

    assert loudest_hz(audio[6_000:12_000]) == pytest.approx(440, abs=8)


async def test_two_calls_at_once_never_hear_each_other(service: Running) -> None:
    async def one(sid: str, hz: float) -> bytes:
        async with media(stream_url(await asyncio.to_thread(webhook, service, sid)), sid) as leg:
            sending = asyncio.create_task(talk(leg, tone(hz, 1.6)))
            audio = await heard(leg, 12_000)
            await sending
            return audio[6_000:12_000]

    low, high = await asyncio.gather(one("CA1", 440), one("CA2", 1_000))

    assert loudest_hz(low) == pytest.approx(440, abs=8)
    assert loudest_hz(high) == pytest.approx(1_000, abs=8)
    spectrum = np.abs(np.fft.rfft(g711.decode(low) * np.hanning(len(low))))
    at = round(1_000 * len(low) / 8_000)
    assert spectrum[at - 3 : at + 3].max() < 0.01 * spectrum.max()


async def test_a_media_token_is_good_once(service: Running) -> None:
    url = stream_url(webhook(service))
    async with media(url):
        with pytest.raises(InvalidStatus, match="403"):
            async with media(url):
                pass
    with pytest.raises(InvalidStatus, match="403"):
        async with media(f"{service.socket_url}/twilio/media/made-up"):
            pass


async def test_an_upgrade_that_twilio_did_not_sign_is_refused(service: Running) -> None:
    url = stream_url(webhook(service))

    with pytest.raises(InvalidStatus, match="403"):
        async with connect(url, compression=None):
            pass
    async with media(url):
        pass


async def test_the_media_of_another_call_is_not_taken(service: Running) -> None:
    async with media(stream_url(webhook(service, "CA1")), sid="CA2") as leg:
        with pytest.raises(ConnectionClosed):
            await heard(leg, 1_000_000)
    wait_for(lambda: service.service.engine.in_use == 0)


async def test_a_carrier_that_breaks_the_rules_loses_its_leg_and_harms_nobody_else(service: Running) -> None:
    async with media(stream_url(webhook(service, "CA1"))) as good:
        async with media(stream_url(webhook(service, "CA2")), "CA2") as bad:
            await bad.send('{"event":"media","streamSid":"MZ1","media":{"payload":"%%%"}}')
            async with soon():
                await bad.wait_closed()
        assert bad.close_code == 1008
        sending = asyncio.create_task(talk(good, tone(440, 0.8)))
        assert loudest_hz((await heard(good, 6_000))[-3_000:]) == pytest.approx(440, abs=10)
        await sending


async def test_a_caller_who_hangs_up_in_mid_word_leaves_no_task_row_or_file_open(service: Running) -> None:
    async def call(sid: str) -> None:
        async with media(stream_url(await asyncio.to_thread(webhook, service, sid)), sid) as leg:
            await talk(leg, tone(300, 0.1))
            assert leg.transport is not None
            leg.transport.abort()

    await call("CA0")
    wait_for(lambda: service.service.engine.in_use == 0)
    before = open_files()
    for number in range(1, 8):
        await call(f"CA{number}")
        wait_for(lambda: service.service.engine.in_use == 0 and service.service.calls.live == 0)

    wait_for(lambda: open_files() <= before)
    assert not service.service.calls._by_lease
    assert not service.service.calls._running
    assert not service.service.calls._expected


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


async def test_silence_keeps_coming_to_a_carrier_that_sends_nothing(service: Running) -> None:
    async with media(stream_url(webhook(service))) as leg:
        audio = await heard(leg, 8_000)

    assert not np.abs(g711.decode(audio)).max()


async def test_a_call_whose_media_never_comes_gives_its_row_back(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.calls.CONNECT_WITHIN_S", 0.1)
    url = stream_url(webhook(service))
    assert service.service.engine.in_use == 1
    wait_for(lambda: service.service.engine.in_use == 0)

    with pytest.raises(InvalidStatus, match="403"):
        async with media(url):
            pass


async def test_twilio_ending_a_call_that_is_still_ringing_ends_it_here(service: Running) -> None:
    webhook(service)
    url = f"{service.url}/twilio/status"
    form = {"CallSid": "CA1", "CallStatus": "canceled"}
    response = httpx.post(url, data=form, headers={"x-twilio-signature": twilio.sign(TOKEN, url, form)})

    assert response.status_code == 204
    wait_for(lambda: service.service.engine.in_use == 0)


async def test_digits_and_marks_of_a_call_are_kept(service: Running) -> None:
    async with media(stream_url(webhook(service))) as leg:
        await leg.send(json.dumps({"event": "dtmf", "streamSid": "MZ1", "dtmf": {"digit": "5"}}))
        await heard(leg, 1_000)
        await leg.send(json.dumps({"event": "stop", "streamSid": "MZ1", "stop": {}}))
        async with soon():
            await leg.wait_closed()
    store = service.service.store
    wait_for(lambda: any(event.type == "dtmf" for event in store.events_after(0, 50)))

    assert [event.data for event in store.events_after(0, 50) if event.type == "dtmf"] == [{"digit": "5"}]


async def test_a_call_that_has_lasted_as_long_as_its_persona_allows_is_ended(tmp_path: Path) -> None:
    folder = tmp_path / "personas"
    folder.mkdir()
    (folder / "brief.yaml").write_text(
        "name: brief\nprompt: You are brief.\nlimits:\n  duration_s: 10\n  silence_s: 5\n"
    )
    with running(tmp_path, free_port(), personas_dir=folder) as service:
        async with media(stream_url(webhook(service))) as leg, soon(9):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await leg.recv()
        wait_for(lambda: service.service.store.calls(1)[0].outcome)
        call = service.service.store.calls(1)[0]

    assert (call.outcome, call.reason) == ("completed", "nobody spoke for 5 s")
    assert call.duration_s == pytest.approx(5, abs=0.5)

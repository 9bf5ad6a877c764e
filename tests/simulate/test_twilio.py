"""The fake carrier against a stand-in for the service, over real sockets in real time."""

import asyncio
import base64
import itertools
import json
import time
from collections.abc import AsyncIterator

import pytest

from app.simulate.twilio import CallFault, CallRejected, FakeTwilio, LineFaults, read_answer
from telephony.g711 import ULAW_SILENCE
from telephony.twilio import connect_document, reject_document, say_document, signature_valid
from tests.simulate.standin import PUBLIC_URL, TOKEN, Leg, StandIn, stand_in, until

SPEECH = bytes(range(160)) * 5
WORD = b"\x20"


@pytest.fixture
async def service() -> AsyncIterator[StandIn]:
    async with stand_in() as standing:
        yield standing


def call_to(service: StandIn, **options: object) -> FakeTwilio:
    return FakeTwilio(service.url, token=TOKEN, public_url=PUBLIC_URL, **options)  # type: ignore[arg-type]


def chunks(leg: Leg) -> list[int]:
    return [int(message["media"]["chunk"]) for message in leg.media]


def heard(leg: Leg) -> bytes:
    return b"".join(base64.b64decode(message["media"]["payload"]) for message in leg.media)


def spoken(audio: bytes) -> bytes:
    """Without the silence, in either of its two forms."""
    return audio.replace(b"\xff", b"").replace(b"\x7f", b"")


async def test_everything_is_signed_for_the_address_that_the_service_has(service: StandIn) -> None:
    async with call_to(service, persona="night desk") as call:
        await until(lambda: len(service.posts) == 2)

    path, form, signature = service.posts[0]
    assert path == "/twilio/voice?persona=night%20desk"
    assert form == {
        "CallSid": call.call_sid,
        "AccountSid": call.account_sid,
        "From": "+15550100001",
        "To": "+15550100002",
        "CallStatus": "ringing",
        "Direction": "inbound",
        "ApiVersion": "2010-04-01",
    }
    assert signature_valid(TOKEN, f"{PUBLIC_URL}{path}", form, signature)
    token, signature = service.upgrades[0]
    assert signature_valid(TOKEN, f"wss://voice.example.com/twilio/media/{token}", (), signature)
    for path, form, signature in service.posts[1:]:
        assert signature_valid(TOKEN, f"{PUBLIC_URL}{path}", form, signature)


async def test_without_a_token_nothing_is_signed(service: StandIn) -> None:
    service.document = connect_document(
        f"ws{service.url[4:]}/twilio/media/t0", {}, f"{service.url}/twilio/stream-status"
    )

    async with FakeTwilio(service.url):
        pass

    assert {signature for _, _, signature in service.posts} == {""}
    assert service.upgrades == [("t0", "")]


async def test_the_answers_parameters_come_back_in_the_start_message(service: StandIn) -> None:
    parameters = {"persona": "operator", "from": '"<&'}
    service.document = connect_document("wss://voice.example.com/twilio/media/t0", parameters, f"{PUBLIC_URL}/x")

    async with call_to(service) as call:
        await until(lambda: service.legs and service.legs[0].media)

    connected, start = service.legs[0].messages[:2]
    assert connected == {"event": "connected", "protocol": "Call", "version": "1.0.0"}
    assert start["sequenceNumber"] == "1"
    assert start["start"] == {
        "accountSid": call.account_sid,
        "callSid": call.call_sid,
        "streamSid": call.stream_sid,
        "tracks": ["inbound"],
        "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
        "customParameters": parameters,
    }


async def test_a_media_socket_can_be_called_directly(service: StandIn) -> None:
    async with FakeTwilio(f"ws{service.url[4:]}/twilio/media/t7", token=TOKEN):
        await until(lambda: service.legs and service.legs[0].media)

    assert service.upgrades[0][0] == "t7"
    assert signature_valid(TOKEN, f"ws{service.url[4:]}/twilio/media/t7", (), service.upgrades[0][1])
    assert service.posts == []


async def test_a_busy_service_is_told_from_a_broken_one(service: StandIn) -> None:
    service.document = reject_document()

    with pytest.raises(CallRejected) as caught:
        await call_to(service).dial()

    assert caught.value.reason == "busy"
    assert service.upgrades == []


async def test_a_refused_webhook_says_what_the_service_said(service: StandIn) -> None:
    service.status = 403
    service.document = json.dumps({"error": {"code": "forbidden", "message": "X-Twilio-Signature does not match"}})

    with pytest.raises(CallFault, match="answered 403: X-Twilio-Signature does not match"):
        await call_to(service).dial()


@pytest.mark.parametrize(
    "document", ["<Response><Say>Hello</Say></Response>", "<Response/>", "Hello", "", "<Response><Connect/></Response>"]
)
def test_an_answer_that_connects_no_stream_is_a_fault(document: str) -> None:
    with pytest.raises(CallFault, match="the answer"):
        read_answer(document)


async def test_a_service_that_is_not_there_is_named() -> None:
    with pytest.raises(CallFault, match=r"cannot reach http://127\.0\.0\.1:9"):
        await FakeTwilio("ws://127.0.0.1:9").dial()


async def test_a_refused_media_socket_is_named(service: StandIn) -> None:
    with pytest.raises(CallFault, match="refused the media socket with 403"):
        await FakeTwilio(f"ws{service.url[4:]}/elsewhere/twilio/media/t0").dial()


@pytest.mark.parametrize("url", ["", "voice.example.com", "sip:agent@127.0.0.1", "http://", "ws://127.0.0.1:port"])
async def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(CallFault, match="is no service's address"):
        FakeTwilio(url)


@pytest.mark.parametrize("packet_ms", [20, 40, 100])
async def test_packets_carry_their_length_and_time(service: StandIn, packet_ms: int) -> None:
    async with call_to(service, packet_ms=packet_ms) as call:
        call.say(SPEECH)
        await until(lambda: service.legs and len(service.legs[0].media) >= 8)

    media = service.legs[0].media
    assert {len(base64.b64decode(message["media"]["payload"])) for message in media} == {packet_ms * 8}
    assert [message["media"]["timestamp"] for message in media[:3]] == [
        "155",
        str(155 + packet_ms),
        str(155 + 2 * packet_ms),
    ]
    assert chunks(service.legs[0]) == list(range(1, len(media) + 1))
    assert [int(message["sequenceNumber"]) for message in media] == list(range(2, len(media) + 2))
    assert spoken(heard(service.legs[0])) == spoken(SPEECH)


async def test_numbers_can_come_as_numbers(service: StandIn) -> None:
    async with call_to(service, numbers_as_text=False):
        await until(lambda: service.legs and service.legs[0].media)

    media = service.legs[0].media[0]
    assert (media["sequenceNumber"], media["media"]["chunk"], media["media"]["timestamp"]) == (2, 1, 155)


async def test_a_delay_shifts_none_of_the_packets_after_it(service: StandIn) -> None:
    async with call_to(service) as call:
        await until(lambda: len(call.caller_lane) >= 10 * 160)
        time.sleep(0.3)
        await asyncio.sleep(0.1)
        due = call.position // 160
        await until(lambda: len(call.caller_lane) // 160 >= due)

        assert call.position // 160 - due <= 8, "the packets in arrears went out at once"
        assert call.late_max_s >= 0.2


async def test_lost_repeated_and_late_packets_are_so_on_the_wire_only(service: StandIn) -> None:
    faults = LineFaults(lost={1}, repeated={2}, late={4: 2})

    async with call_to(service, faults=faults) as call:
        call.say(SPEECH)
        await until(lambda: service.legs and len(service.legs[0].media) >= 9)

    assert chunks(service.legs[0])[:8] == [1, 3, 3, 4, 6, 7, 5, 8]
    assert bytes(call.caller_lane).startswith(SPEECH)


async def test_a_key_is_pressed(service: StandIn) -> None:
    async with call_to(service) as call:
        await call.press("5")
        await until(lambda: "dtmf" in service.legs[0].events)

    pressed = next(message for message in service.legs[0].messages if message["event"] == "dtmf")
    assert pressed["dtmf"] == {"track": "inbound_track", "digit": "5"}
    assert pressed["streamSid"] == call.stream_sid


async def test_a_mark_comes_back_when_the_caller_has_heard_what_was_before_it(service: StandIn) -> None:
    async def handler(leg: Leg) -> None:
        await leg.play(WORD * 3_200)
        await leg.send("mark", mark={"name": "said"})
        assert (await leg.until("mark"))["mark"] == {"name": "said"}

    service.handler = handler
    async with call_to(service) as call:
        await asyncio.wait_for(service.done.wait(), 10)

    assert bytes(call.playback.lane).count(WORD) == 3_200
    assert len(service.legs[0].media) >= 20, "400 ms of the caller came before the mark"


async def test_a_clear_returns_all_marks_and_ends_the_speech(service: StandIn) -> None:
    returned: list[str] = []

    async def handler(leg: Leg) -> None:
        await leg.play(WORD * 8_000)
        await leg.send("mark", mark={"name": "a"})
        await leg.send("mark", mark={"name": "b"})
        for _ in range(10):
            await leg.until("media")
        await leg.send("clear")
        returned.extend([(await leg.until("mark"))["mark"]["name"] for _ in range(2)])

    service.handler = handler
    async with call_to(service) as call:
        await asyncio.wait_for(service.done.wait(), 10)

    assert returned == ["a", "b"]
    assert len(call.playback.flushes) == 1
    assert 0 < bytes(call.playback.lane).count(WORD) < 8_000


async def test_both_lanes_are_on_one_clock(service: StandIn) -> None:
    """What the service sends back at once is heard after it was said, and not long after."""

    async def echo(leg: Leg) -> None:
        while True:
            await leg.play(base64.b64decode((await leg.until("media"))["media"]["payload"]))

    service.handler = echo
    async with call_to(service) as call:
        await until(lambda: len(call.caller_lane) >= 1_600)
        start = call.say(WORD * 1_600)
        await until(lambda: bytes(call.playback.lane).count(WORD) == 1_600)

    assert bytes(call.caller_lane).index(WORD) == start
    assert len(call.caller_lane) == pytest.approx(len(call.playback.lane), abs=161)
    delay = bytes(call.playback.lane).index(WORD) - start
    assert 160 <= delay < 4_000


async def test_a_hang_up_is_told_in_every_way(service: StandIn) -> None:
    async with call_to(service) as call:
        await until(lambda: service.legs and service.legs[0].media)
    await until(lambda: service.done.is_set())

    assert service.legs[0].messages[-1]["event"] == "stop"
    assert service.legs[0].messages[-1]["stop"] == {"accountSid": call.account_sid, "callSid": call.call_sid}
    assert service.legs[0].code == 1000
    told = {(path, form.get("StreamEvent") or form.get("CallStatus")) for path, form, _ in service.posts[1:]}
    assert told == {
        ("/twilio/stream-status", "stream-started"),
        ("/twilio/stream-status", "stream-stopped"),
        ("/twilio/status", "completed"),
    }
    assert call.callbacks == {"stream-started": 204, "stream-stopped": 204, "completed": 204}
    assert call.ended_by == "the caller hung up"


async def test_a_cut_line_says_nothing(service: StandIn) -> None:
    async with call_to(service) as call:
        call.say(SPEECH)
        await until(lambda: service.legs and service.legs[0].media)
        await call.cut()
    await until(lambda: service.done.is_set())

    assert "stop" not in service.legs[0].events
    assert service.legs[0].code in (1005, 1006), "no closing handshake"
    assert "completed" not in call.callbacks


async def test_a_service_that_hangs_up_ends_the_call(service: StandIn) -> None:
    async def handler(leg: Leg) -> None:
        await leg.until("media")
        await leg.websocket.close(1008)

    service.handler = handler
    async with call_to(service) as call:
        await asyncio.wait_for(call.ended.wait(), 10)

    assert call.ended_by == "the service closed the socket with code 1008"
    assert call.callbacks["completed"] == 204


async def test_messages_that_twilio_would_not_take_are_noted(service: StandIn) -> None:
    async def handler(leg: Leg) -> None:
        for text in ("no JSON", '{"event":"media","streamSid":"MZ0","media":{"payload":""}}'):
            await leg.websocket.send_text(text)
        await leg.send("media", media={"payload": "not base64!"})
        await leg.send("media")
        await leg.send("shout")
        await leg.play(WORD * 160)

    service.handler = handler
    async with call_to(service) as call:
        await asyncio.wait_for(call.ended.wait(), 10)

    assert len(call.breaches) == 5
    assert all(
        part in breach
        for part, breach in zip(
            ["JSONDecode", "another stream", "not base64", "KeyError", "shout"], call.breaches, strict=True
        )
    )
    assert bytes(call.playback.lane).count(WORD) > 0


async def test_two_calls_at_once_keep_apart(service: StandIn) -> None:
    names = itertools.count(1)

    async def handler(leg: Leg) -> None:
        await leg.play(bytes([next(names)]) * 1_600)
        await leg.until("stop")

    service.handler = handler
    async with call_to(service) as one, call_to(service) as two:
        await until(lambda: min(len(one.playback.lane), len(two.playback.lane)) > 3_200)

    heard_by = [set(bytes(call.playback.lane)) - {ULAW_SILENCE[0]} for call in (one, two)]
    assert heard_by == [{1}, {2}]
    assert one.call_sid != two.call_sid


def test_a_caller_who_is_told_that_there_is_no_room_was_turned_away() -> None:
    with pytest.raises(CallRejected, match="All our lines are taken"):
        read_answer(say_document("All our lines are taken."))

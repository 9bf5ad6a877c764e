import base64
import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telephony.events import (
    CallEnded,
    CallerAudio,
    CallStarted,
    Digit,
    Event,
    LocalProtocolError,
    Played,
    RemoteProtocolError,
)
from telephony.twilio import MARKS_MAX, SAY_MAX_BYTES, State, TwilioStream, say_document

TRANSCRIPTS = Path(__file__).parents[1] / "fixtures" / "twilio"
STREAM = "MZ0000000000000000000000000000a001"
CALL = "CA0000000000000000000000000000b002"
STARTED = CallStarted(CALL, {"persona": "operator", "from": "+15550100001"})
ENDED = CallEnded("stop")


def replay(leg: TwilioStream, transcript: str) -> list[Event]:
    """What a recorded leg meant. Lines with `send` are what we did at that point."""
    events: list[Event] = []
    for line in (TRANSCRIPTS / transcript).read_text().splitlines():
        ours = json.loads(line)
        if "send" not in ours:
            events += leg.receive(line)
        elif ours["send"] == "audio":
            leg.send_audio(b"\xff" * 8 * ours["ms"])
        elif ours["send"] == "mark":
            leg.send_mark()
        else:
            leg.clear()
    return events


def packet(chunk: int, ms: int = 20) -> bytes:
    """The recorded packets hold their own chunk number over and over."""
    return bytes([chunk]) * 8 * ms


def start(**changes: object) -> str:
    body = {
        "streamSid": STREAM,
        "callSid": CALL,
        "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
    }
    return json.dumps({"event": "start", "streamSid": STREAM, "start": body | changes})


def media(**changes: object) -> str:
    body = {"track": "inbound", "chunk": "1", "timestamp": "155", "payload": "/////w=="}
    return json.dumps({"event": "media", "streamSid": STREAM, "media": body | changes})


def open_leg() -> TwilioStream:
    leg = TwilioStream()
    leg.receive(start())
    return leg


@pytest.mark.parametrize("transcript", ["hello.jsonl", "whole_numbers.jsonl"])
def test_a_recorded_call_replays_as_its_events_whether_numbers_are_text_or_not(transcript: str) -> None:
    leg = TwilioStream()

    events = replay(leg, transcript)

    heard = [event for event in events if isinstance(event, CallerAudio)]
    assert events == [STARTED, *heard, ENDED]
    assert [audio.ulaw[:1] for audio in heard] == [bytes([n + 1]) for n in range(len(heard))]
    assert all(len(audio.ulaw) == 160 and audio.missing_ms == 0 for audio in heard)
    assert (leg.call_sid, leg.stream_sid, leg.state) == (CALL, STREAM, State.CLOSED)


def test_a_format_written_as_text_is_the_same_format() -> None:
    assert replay(TwilioStream(), "format_as_text.jsonl") == [STARTED, CallerAudio(packet(1)), ENDED]


def test_a_leg_of_the_early_protocol_has_no_parameters() -> None:
    assert replay(TwilioStream(), "early_protocol.jsonl") == [CallStarted(CALL, {}), CallerAudio(packet(1)), ENDED]


@pytest.mark.parametrize("ms", [40, 100])
def test_packets_of_other_lengths_are_heard_whole(ms: int) -> None:
    events = replay(TwilioStream(), f"packets_of_{ms}_ms.jsonl")

    assert events == [STARTED, *(CallerAudio(packet(n, ms)) for n in (1, 2, 3)), ENDED]


def test_lost_packets_are_told_with_the_next_one() -> None:
    events = replay(TwilioStream(), "lost.jsonl")

    assert events == [
        STARTED,
        CallerAudio(packet(1)),
        CallerAudio(packet(4), missing_ms=40),
        CallerAudio(packet(5)),
        ENDED,
    ]


def test_repeated_packets_are_heard_once() -> None:
    leg = TwilioStream()

    assert replay(leg, "repeated.jsonl") == [STARTED, *(CallerAudio(packet(n)) for n in (1, 2, 3)), ENDED]
    assert leg.repeated == 2


def test_a_packet_that_was_overtaken_is_lost() -> None:
    leg = TwilioStream()

    assert replay(leg, "late.jsonl") == [
        STARTED,
        CallerAudio(packet(1)),
        CallerAudio(packet(3), missing_ms=20),
        CallerAudio(packet(4)),
        ENDED,
    ]
    assert leg.repeated == 1


def test_packets_a_little_under_20_ms_apart_never_add_up_to_a_loss_or_a_repeat() -> None:
    leg = open_leg()

    for n in range(5_000):
        (audio,) = leg.receive(media(chunk=str(n + 1), timestamp=str(int(155 + 19.97 * n)), payload="/" * 212 + "//8="))
        assert isinstance(audio, CallerAudio)
        assert audio.missing_ms == 0


def test_a_packet_without_chunk_and_timestamp_follows_the_one_before() -> None:
    leg = open_leg()
    bare = json.dumps({"event": "media", "streamSid": STREAM, "media": {"payload": "/////w=="}})

    assert leg.receive(bare) + leg.receive(bare) == [CallerAudio(b"\xff" * 4)] * 2


def test_our_own_voice_on_another_track_is_not_the_caller() -> None:
    leg = open_leg()

    assert leg.receive(media(track="outbound")) == []
    assert leg.ignored == 1


def test_keys_are_digits() -> None:
    events = replay(TwilioStream(), "keys.jsonl")

    assert events[2:5] == [Digit("5"), Digit("#"), Digit("A")]


def test_marks_tell_what_the_caller_has_heard() -> None:
    events = replay(TwilioStream(), "marks.jsonl")

    assert events == [STARTED, CallerAudio(packet(1)), Played(240), Played(400), ENDED]


def test_marks_returned_by_a_clear_say_nothing() -> None:
    leg = TwilioStream()

    assert replay(leg, "clear.jsonl") == [STARTED, Played(240), Played(1120), ENDED]
    assert leg.ignored == 1


def test_a_mark_answers_for_the_ones_before_it() -> None:
    leg = open_leg()
    for _ in range(3):
        leg.send_audio(b"\xff" * 160)
        leg.send_mark()
    names = [json.loads(text)["mark"]["name"] for text in leg.data_to_send() if '"mark"' in text]

    def returned(name: str) -> list[Event]:
        return leg.receive(json.dumps({"event": "mark", "streamSid": STREAM, "mark": {"name": name}}))

    assert returned(names[1]) == [Played(40)]
    assert returned(names[0]) == []
    assert returned(names[2]) == [Played(60)]
    assert returned("somebody else's") == []


def test_a_carrier_that_returns_no_mark_costs_no_memory() -> None:
    leg = open_leg()
    for _ in range(MARKS_MAX + 50):
        leg.send_audio(b"\xff" * 8)
        leg.send_mark()

    last = json.loads(leg.data_to_send()[-1])["mark"]["name"]
    assert len(leg._marks) == MARKS_MAX
    assert leg.receive(json.dumps({"event": "mark", "streamSid": STREAM, "mark": {"name": last}})) == [
        Played(MARKS_MAX + 50)
    ]


def test_unknown_events_are_ignored_before_and_after_the_start() -> None:
    leg = TwilioStream()

    assert replay(leg, "unknown.jsonl") == [STARTED, CallerAudio(packet(1)), ENDED]
    assert leg.ignored == 2


def test_what_is_sent_is_what_twilio_documents() -> None:
    leg = open_leg()

    leg.send_audio(b"\x01\x02\x03\x04")
    leg.send_mark()
    leg.clear()

    sent = [json.loads(text) for text in leg.data_to_send()]
    name = sent[1]["mark"]["name"]
    assert sent == [
        {
            "event": "media",
            "streamSid": STREAM,
            "media": {"payload": base64.b64encode(b"\x01\x02\x03\x04").decode()},
        },
        {"event": "mark", "streamSid": STREAM, "mark": {"name": name}},
        {"event": "clear", "streamSid": STREAM},
    ]
    assert leg.data_to_send() == []


def test_speech_of_any_length_is_one_message_and_is_counted() -> None:
    leg = open_leg()

    leg.send_audio(b"\xff" * 640)
    leg.send_audio(b"\xff" * 8_000)
    leg.send_audio(b"")
    leg.clear()

    assert leg.sent_ms == 1_080
    assert len(leg.data_to_send()) == 3


def test_two_marks_at_one_place_are_one() -> None:
    leg = open_leg()
    leg.send_audio(b"\xff" * 640)

    leg.send_mark()
    leg.send_mark()

    assert len(leg.data_to_send()) == 2


def other_format(**changes: object) -> str:
    return start(mediaFormat={"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1} | changes)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "the message: found '', wanted JSON"),
        ("{", "wanted JSON"),
        ("[" * 60_000, "wanted JSON"),
        ("[]", "wanted a JSON object"),
        ('{"event":5}', "event: found 5, wanted a string"),
        ("x" * 70_000, "length of the message: found 70000"),
        (media(), "event: found 'media' while CONNECTING, wanted it only while OPEN"),
        ('{"event":"stop","streamSid":"MZ01"}', "'stop' while CONNECTING"),
        (start(callSid=None), "start.callSid: found None"),
        (start(streamSid='MZ"}'), "start.streamSid"),
        (start(streamSid="MZ01"), "streamSid: found 'MZ0000.*a001', wanted start.streamSid"),
        (start(mediaFormat="mulaw"), "start.mediaFormat: found 'mulaw', wanted an object"),
        (other_format(encoding="audio/x-l16"), "audio/x-l16.*wanted audio/x-mulaw at 8000 Hz, 1 channel"),
        (other_format(sampleRate="16000"), "16000.*wanted audio/x-mulaw at 8000 Hz"),
        (other_format(channels=2), "'channels': 2.*1 channel"),
        (other_format(channels=True), "start.mediaFormat.channels: found True"),
        (start(customParameters=["persona"]), "start.customParameters: .*wanted an object"),
        (start(customParameters={"persona": 7}), "start.customParameters.persona: found 7, wanted a string"),
    ],
)
def test_a_leg_that_begins_wrongly_is_closed_and_the_fault_named(text: str, named: str) -> None:
    leg = TwilioStream()

    with pytest.raises(RemoteProtocolError, match=named):
        leg.receive(text)

    assert leg.state is State.CLOSED
    assert leg.receive(start()) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (start(), "'start' while OPEN"),
        ('{"event":"connected"}', "'connected' while OPEN"),
        (media().replace("a001", "a002"), "streamSid: found 'MZ.*a002', wanted 'MZ.*a001'"),
        ('{"event":"media","media":{"payload":""}}', "streamSid: found None"),
        (media(payload="?"), "media.payload: found '\\?', wanted base64"),
        (media(payload="/////w"), "media.payload: .* wanted base64"),
        (media(payload="/// //w="), "media.payload: .* wanted base64"),
        (media(payload="é"), "media.payload: .* wanted base64"),
        (media(payload=5), "media.payload: found 5, wanted a string"),
        (media(payload="////" * 2_668), "length of media.payload: found 10672"),
        (media(timestamp="-5"), "media.timestamp: found '-5', wanted a whole number"),
        (media(timestamp="9" * 400), "media.timestamp"),
        (media(timestamp=1e300), "media.timestamp"),
        (media(timestamp=None), "media.timestamp"),
        (media(chunk={}), "media.chunk: found {}"),
        (json.dumps({"event": "media", "streamSid": STREAM}), "media: found None, wanted an object"),
        (json.dumps({"event": "mark", "streamSid": STREAM, "mark": {}}), "mark.name: found None"),
        (json.dumps({"event": "dtmf", "streamSid": STREAM, "dtmf": {"digit": "55"}}), "dtmf.digit: found '55'"),
    ],
)
def test_a_leg_that_breaks_the_rules_is_closed_and_call_stream_and_field_are_named(text: str, named: str) -> None:
    leg = open_leg()

    with pytest.raises(RemoteProtocolError, match=named) as fault:
        leg.receive(text)

    assert str(fault.value).startswith(f"Twilio call {CALL}, stream {STREAM}: ")
    assert leg.state is State.CLOSED
    assert leg.receive(media()) == []


@pytest.mark.parametrize("send", [lambda leg: leg.send_audio(b"\xff"), TwilioStream.send_mark, TwilioStream.clear])
def test_nothing_can_be_sent_before_the_start_or_after_the_end(send: Callable[[TwilioStream], None]) -> None:
    early, over = TwilioStream(), TwilioStream()
    replay(over, "hello.jsonl")

    with pytest.raises(LocalProtocolError, match="while CONNECTING"):
        send(early)
    with pytest.raises(LocalProtocolError, match="while CLOSED"):
        send(over)


def test_a_missing_connected_message_is_forgiven() -> None:
    assert TwilioStream().receive(start()) == [CallStarted(CALL, {})]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([STREAM, "1", "/////w=="]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["streamSid", "payload", "chunk", "timestamp", "track", "name", "digit", "x"]), inner
        )
    ),
    max_leaves=8,
)
EVENTS = st.sampled_from(["connected", "start", "media", "mark", "dtmf", "stop", "other"])
MESSAGES = st.builds(
    lambda event, body, stream: json.dumps({"event": event, event: body, "streamSid": stream}),
    EVENTS,
    ANY_JSON,
    st.just(STREAM) | ANY_JSON,
)


@given(st.lists(st.text() | ANY_JSON.map(json.dumps) | MESSAGES | st.just(start()), max_size=8))
def test_nothing_a_carrier_sends_raises_anything_but_its_own_error(texts: list[str]) -> None:
    leg = TwilioStream()
    for text in texts:
        was_closed = leg.state is State.CLOSED
        told = ""
        try:
            leg.receive(text)
        except RemoteProtocolError as fault:
            told = str(fault)

        assert (told == "") or (leg.state is State.CLOSED and not was_closed)
        assert told.encode("utf-8").startswith(b"Twilio call " if told else b"")


# --- the answer to a caller for whom there is no room


def test_words_are_said_and_the_call_is_ended() -> None:
    verbs = ElementTree.fromstring(say_document("All lines are taken.").encode())

    assert [(verb.tag, verb.attrib, verb.text) for verb in verbs] == [
        ("Say", {}, "All lines are taken."),
        ("Hangup", {}, None),
    ]


@given(st.text(max_size=100))
def test_words_stay_words_whatever_they_hold(words: str) -> None:
    verbs = ElementTree.fromstring(say_document(f"<Hangup/>&amp;{words}").encode())

    assert [verb.tag for verb in verbs] == ["Say", "Hangup"]
    assert (verbs[0].text or "").startswith("<Hangup/>&amp;")
    assert len(verbs[0]) == 0


def test_more_words_than_twilio_takes_are_cut_between_two_letters() -> None:
    said = ElementTree.fromstring(say_document("x" + "\u00e9" * SAY_MAX_BYTES).encode())[0].text

    assert said == "x" + "\u00e9" * (SAY_MAX_BYTES // 2 - 1)

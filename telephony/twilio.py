"""Twilio without I/O: one leg's media messages, the answer to a webhook, its signature, and how to hang up."""

import base64
import binascii
import hashlib
import hmac
import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import ceil
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

from telephony import g711
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

TEXT_MAX_CHARS = 65_536
AUDIO_MAX_BYTES = 8_000
MARKS_MAX = 256
# Twilio's own frames lie 19.97 ms apart, so a gap shorter than a packet is no loss.
GAP_MIN_MS = 20
PARAMETER_MAX_CHARS = 499
SAY_MAX_BYTES = 4_000

_PAYLOAD_MAX_CHARS = 4 * (AUDIO_MAX_BYTES // 3 + 1)
_IDENTIFIER = re.compile(r"[A-Za-z0-9._-]{1,128}")
_DIGITS = re.compile(r"[0-9]{1,18}", re.ASCII)
_KEYS = frozenset("0123456789*#ABCD")


class State(IntEnum):
    CONNECTING = 0
    OPEN = 1
    CLOSED = 2


class TwilioStream:
    """One leg, from Twilio's `connected` to its `stop`: messages in, events and messages out.

    `repeated` counts packets that came twice or too late, `ignored` messages that mean nothing to us: unknown events,
    other tracks, marks gone stale.

    Source: https://www.twilio.com/docs/voice/media-streams/websocket-messages
    """

    def __init__(self) -> None:
        self.state = State.CONNECTING
        self.stream_sid = ""
        self.call_sid = ""
        self.repeated = 0
        self.ignored = 0
        self._writes: list[str] = []
        self._media_head = ""
        self._sent_bytes = 0
        self._chunk = -1
        self._expected_ms: float | None = None
        self._generation = 0
        self._marks: dict[str, int] = {}

    @property
    def sent_ms(self) -> int:
        """How much speech was sent since the leg began, flushed or not: the scale of `Played.until_ms`."""
        return self._sent_bytes // g711.BYTES_PER_MS

    def receive(self, text: str) -> list[Event]:
        """Take one message and say what it meant. Nothing is ever written in answer.

        Raises:
            RemoteProtocolError: malformed or out of order. The leg is CLOSED and ignores the rest.
        """
        if self.state is State.CLOSED:
            return []
        try:
            return self._take(self._parse(text))
        except RemoteProtocolError:
            self.state = State.CLOSED
            raise

    def send_audio(self, ulaw: bytes) -> None:
        """Queue speech of any length, mu-law at 8 kHz. Twilio buffers it and plays it in order.

        Raises:
            LocalProtocolError: the leg is not open.
        """
        self._require_open("audio sent")
        if ulaw:
            payload = binascii.b2a_base64(ulaw, newline=False).decode("ascii")
            self._writes.append(f'{self._media_head}{payload}"}}}}')
            self._sent_bytes += len(ulaw)

    def send_mark(self) -> None:
        """Ask to be told, by a `Played`, when the caller has heard everything sent so far.

        The oldest of 256 outstanding marks is forgotten: a later one says as much and more.

        Raises:
            LocalProtocolError: the leg is not open.
        """
        self._require_open("a mark sent")
        name = f"{self._generation}-{self.sent_ms}"
        if name in self._marks:
            return
        if len(self._marks) >= MARKS_MAX:
            del self._marks[next(iter(self._marks))]
        self._marks[name] = self.sent_ms
        self._writes.append(f'{{"event":"mark","streamSid":"{self.stream_sid}","mark":{{"name":"{name}"}}}}')

    def clear(self) -> None:
        """Flush what Twilio has not played yet. It returns every pending mark at once, which says nothing any more.

        Raises:
            LocalProtocolError: the leg is not open.
        """
        self._require_open("a clear sent")
        self._generation += 1
        self._marks.clear()
        self._writes.append(f'{{"event":"clear","streamSid":"{self.stream_sid}"}}')

    def data_to_send(self) -> list[str]:
        """The messages to write, in order; each is handed out once."""
        writes, self._writes = self._writes, []
        return writes

    def _take(self, message: dict[str, object]) -> list[Event]:
        event = self._text(message, "event")
        if event == "connected":
            self._require_state(State.CONNECTING, event)
            return []
        if event == "start":
            self._require_state(State.CONNECTING, event)
            return self._start(message)
        if event not in ("media", "mark", "dtmf", "stop"):
            self.ignored += 1
            return []
        self._require_state(State.OPEN, event)
        if message.get("streamSid") != self.stream_sid:
            raise self._fault("streamSid", message.get("streamSid"), f"{self.stream_sid!r} as in the start message")
        if event == "media":
            return self._media(self._object(message, "media"))
        if event == "mark":
            return self._mark(self._text(self._object(message, "mark"), "name", "mark."))
        if event == "dtmf":
            return self._dtmf(self._text(self._object(message, "dtmf"), "digit", "dtmf."))
        self.state = State.CLOSED
        return [CallEnded("stop")]

    def _start(self, message: dict[str, object]) -> list[Event]:
        start = self._object(message, "start")
        self.call_sid = self._identifier(start, "callSid")
        self.stream_sid = self._identifier(start, "streamSid")
        if message.get("streamSid", self.stream_sid) != self.stream_sid:
            raise self._fault("streamSid", message["streamSid"], f"start.streamSid, which is {self.stream_sid!r}")
        self._check_format(self._object(start, "mediaFormat", "start."))
        parameters = self._parameters(start)
        self._media_head = f'{{"event":"media","streamSid":"{self.stream_sid}","media":{{"payload":"'
        self.state = State.OPEN
        return [CallStarted(self.call_sid, parameters)]

    def _check_format(self, found: dict[str, object]) -> None:
        encoding = self._text(found, "encoding", "start.mediaFormat.")
        rate_hz = self._number(found, "sampleRate", "start.mediaFormat.")
        channels = self._number(found, "channels", "start.mediaFormat.")
        if (encoding, rate_hz, channels) != ("audio/x-mulaw", g711.SAMPLE_RATE_HZ, 1):
            raise self._fault("start.mediaFormat", found, "audio/x-mulaw at 8000 Hz, 1 channel")

    def _parameters(self, start: dict[str, object]) -> dict[str, str]:
        if start.get("customParameters") is None:
            return {}
        found = self._object(start, "customParameters", "start.")
        return {name: self._text(found, name, "start.customParameters.") for name in found}

    def _media(self, media: dict[str, object]) -> list[Event]:
        if media.get("track", "inbound") != "inbound":
            self.ignored += 1
            return []
        ulaw = self._payload(media)
        if not ulaw:
            return []
        chunk = self._number(media, "chunk", "media.", absent=self._chunk + 1)
        timestamp_ms = self._number(media, "timestamp", "media.", absent=ceil(self._expected_ms or 0))
        until_ms = timestamp_ms + len(ulaw) / g711.BYTES_PER_MS
        expected_ms = timestamp_ms if self._expected_ms is None else self._expected_ms
        if chunk <= self._chunk or until_ms <= expected_ms:
            self.repeated += 1
            return []
        self._chunk, self._expected_ms = chunk, until_ms
        gap_ms = timestamp_ms - expected_ms
        return [CallerAudio(ulaw, int(gap_ms) if gap_ms >= GAP_MIN_MS else 0)]

    def _payload(self, media: dict[str, object]) -> bytes:
        payload = self._text(media, "payload", "media.")
        if len(payload) > _PAYLOAD_MAX_CHARS:
            raise self._fault("length of media.payload", len(payload), f"{_PAYLOAD_MAX_CHARS} characters or fewer")
        try:
            return binascii.a2b_base64(payload, strict_mode=True)
        except ValueError as error:
            raise self._fault("media.payload", payload, "base64") from error

    def _mark(self, name: str) -> list[Event]:
        if name not in self._marks:
            self.ignored += 1
            return []
        until_ms = self._marks[name]
        for earlier in list(self._marks):
            del self._marks[earlier]
            if earlier == name:
                break
        return [Played(until_ms)]

    def _dtmf(self, digit: str) -> list[Event]:
        if digit not in _KEYS:
            raise self._fault("dtmf.digit", digit, "one of 0-9 * # A-D")
        return [Digit(digit)]

    def _parse(self, text: str) -> dict[str, object]:
        if len(text) > TEXT_MAX_CHARS:
            raise self._fault("length of the message", len(text), f"{TEXT_MAX_CHARS} characters or fewer")
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._fault("the message", text, "JSON") from error
        if not isinstance(message, dict):
            raise self._fault("the message", message, "a JSON object")
        return message

    def _object(self, holder: dict[str, object], field: str, within: str = "") -> dict[str, object]:
        found = holder.get(field)
        if not isinstance(found, dict):
            raise self._fault(within + field, found, "an object")
        return found

    def _text(self, holder: dict[str, object], field: str, within: str = "") -> str:
        found = holder.get(field)
        if not isinstance(found, str):
            raise self._fault(within + field, found, "a string")
        return found

    def _identifier(self, start: dict[str, object], field: str) -> str:
        found = self._text(start, field, "start.")
        if not _IDENTIFIER.fullmatch(found):
            raise self._fault(f"start.{field}", found, "letters, digits and . _ - only")
        return found

    def _number(self, holder: dict[str, object], field: str, within: str, absent: int | None = None) -> int:
        """A whole number, whether Twilio wrote 8000 or "8000"."""
        found = holder.get(field, absent)
        if isinstance(found, str) and _DIGITS.fullmatch(found):
            return int(found)
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 10**18:
            raise self._fault(within + field, found, "a whole number, not negative")
        return found

    def _require_state(self, wanted: State, event: str) -> None:
        if self.state is not wanted:
            raise RemoteProtocolError(
                f"{self._name()}: event: found {event!r} while {self.state.name}, wanted it only while {wanted.name}"
            )

    def _require_open(self, what: str) -> None:
        if self.state is not State.OPEN:
            raise LocalProtocolError(f"{self._name()}: {what} while {self.state.name}")

    def _fault(self, field: str, found: object, right: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"{self._name()}: {field}: found {reprlib.repr(found)}, wanted {right}")

    def _name(self) -> str:
        return f"Twilio call {self.call_sid or '(unknown)'}, stream {self.stream_sid or '(unknown)'}"


Parameters = Mapping[str, str] | Sequence[tuple[str, str]]

_URL = re.compile(r"(?P<scheme>[a-z]+)://(?P<host>[^/?#]*?)(?::(?P<port>[0-9]+))?(?P<rest>[/?#].*)?", re.DOTALL)
_DEFAULT_PORTS = {"https": "443", "wss": "443", "http": "80", "ws": "80"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class RestRequest:
    """A request to the carrier's REST interface, to be sent with the account's basic auth and a form body.

    Any status in `done_statuses` means that what was asked for is so.
    """

    method: str
    url: str
    form: dict[str, str]
    done_statuses: frozenset[int]


def sign(token: str, url: str, params: Parameters = ()) -> str:
    """Make the X-Twilio-Signature of a request: base64 of HMAC-SHA1 over the URL, then every name and value in order.

    `params` are the form fields of a POST, none for a WebSocket upgrade. Of a name given more than once each different
    value counts once, sorted.

    Raises:
        ValueError: the token is empty, which anyone could sign with.

    Source: https://www.twilio.com/docs/usage/security
    """
    if not token:
        raise ValueError("the Twilio auth token is empty; wanted the account's primary auth token")
    pairs = params.items() if isinstance(params, Mapping) else params
    signed = url + "".join(name + value for name, value in sorted(set(pairs)))
    digest = hmac.new(token.encode(), signed.encode("utf-8", "surrogatepass"), hashlib.sha1).digest()
    return base64.b64encode(digest).decode("ascii")


def signature_valid(token: str, url: str, params: Parameters, signature: str | None) -> bool:
    """Whether Twilio signed this request. `url` is the public one, as Twilio was told it.

    Twilio may or may not write out the scheme's default port (443 for https and wss); both are taken, and no other.

    Raises:
        ValueError: the token is empty.
    """
    wanted = [sign(token, form, params) for form in _port_forms(url)]
    given = (signature or "").encode("utf-8", "surrogatepass")
    return any(hmac.compare_digest(one.encode("ascii"), given) for one in wanted)


def connect_document(stream_url: str, parameters: Mapping[str, str], status_url: str) -> str:
    """Make the TwiML that connects the call to a stream both ways; `parameters` come back in its start message.

    Values may hold anything, the caller's name too: what XML cannot carry becomes U+FFFD.

    Raises:
        ValueError: a stream URL that Twilio refuses (a query, no WebSocket), or a parameter of 500 characters or more.

    Source: https://www.twilio.com/docs/voice/twiml/stream
    """
    _check_stream_url(stream_url)
    inner = "".join(_parameter(name, value) for name, value in parameters.items())
    return _document(
        f"<Connect><Stream url={_quoted(stream_url)} statusCallback={_quoted(status_url)}"
        f' statusCallbackMethod="POST">{inner}</Stream></Connect>'
    )


def reject_document() -> str:
    """Make the TwiML that turns a call away with the busy tone, before it is answered or charged."""
    return _document('<Reject reason="busy"/>')


def say_document(words: str) -> str:
    """Make the TwiML that answers a call with words, in Twilio's own English voice, and hangs up.

    Twilio charges for such a call. What XML cannot carry becomes U+FFFD, and what Twilio would refuse as too long is
    cut off.

    Source: https://www.twilio.com/docs/voice/twiml/say
    """
    taken = _carried(words).encode()[:SAY_MAX_BYTES].decode("utf-8", "ignore")
    return _document(f"<Say>{escape(taken)}</Say><Hangup/>")


def hangup_request(account_sid: str, call_sid: str) -> RestRequest:
    """Describe how to end a call. 404 says that it was over already.

    Source: https://www.twilio.com/docs/voice/api/call-resource
    """
    path = f"/2010-04-01/Accounts/{quote(account_sid, safe='')}/Calls/{quote(call_sid, safe='')}.json"
    return RestRequest("POST", f"https://api.twilio.com{path}", {"Status": "completed"}, frozenset({200, 404}))


def _port_forms(url: str) -> Iterable[str]:
    parts = _URL.fullmatch(url)
    if not parts or parts["port"] not in (None, _DEFAULT_PORTS.get(parts["scheme"])):
        return [url]
    scheme, host, rest = parts["scheme"], parts["host"], parts["rest"] or ""
    port = _DEFAULT_PORTS.get(scheme)
    return [f"{scheme}://{host}{rest}", f"{scheme}://{host}:{port}{rest}"] if port else [url]


def _check_stream_url(url: str) -> None:
    if not url.startswith(("wss://", "ws://")):
        raise ValueError(f"stream URL {url!r} is not a WebSocket's; wanted wss://...")
    if "?" in url or "#" in url:
        raise ValueError(f"stream URL {url!r} has a query, which Twilio refuses; pass the data as parameters")


def _parameter(name: str, value: str) -> str:
    if len(name) + len(value) > PARAMETER_MAX_CHARS:
        raise ValueError(
            f"stream parameter {name[:40]!r}: name and value have {len(name) + len(value)} characters; "
            f"Twilio takes {PARAMETER_MAX_CHARS} or fewer"
        )
    return f"<Parameter name={_quoted(name)} value={_quoted(value)}/>"


def _document(verb: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Response>{verb}</Response>'


def _quoted(value: str) -> str:
    return quoteattr(_carried(value))


def _carried(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)

"""Twilio's side of one call, over real HTTP and a real WebSocket, in real time: for tests, trials and load."""

import asyncio
import base64
import contextlib
import functools
import itertools
import json
import secrets
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Self
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from app.simulate.playback import Playback
from telephony.g711 import SAMPLE_RATE_HZ
from telephony.twilio import sign

CALLER = "+15550100001"
CALLED = "+15550100002"
FIRST_TIMESTAMP_MS = 155
"""Twilio's clock runs before its first packet: 155 to 171 ms were seen."""

_BYTES_PER_MS = SAMPLE_RATE_HZ // 1000
_WEBHOOK_TIMEOUT_S = 15.0
_BREACHES_MAX = 100
_STREAM_PATH = "/twilio/media/"
_VOICE_PATH = "/twilio/voice"


class CallFault(Exception):
    """The call could not be placed. One line: what answered, and what would be right."""


class CallRejected(CallFault):
    """The service turned the call away, as `reason` says: `busy`, `rejected`, or the words that the caller was told."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the service turned the call away: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class LineFaults:
    """What goes wrong with the caller's packets, counted from 0.

    `late` says how many packets' time a packet comes too late, behind those that overtook it.
    """

    lost: Collection[int] = ()
    repeated: Collection[int] = ()
    late: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stream:
    """Where a call's media goes, as the service's answer says."""

    url: str
    parameters: dict[str, str] = field(default_factory=dict)
    status_url: str = ""


def read_answer(document: str) -> Stream:
    """Read the TwiML that answers a voice webhook.

    Raises:
        CallRejected: a `<Reject>`, or words and a `<Hangup>`.
        CallFault: anything but `<Connect><Stream>`, which is all that this carrier plays.
    """
    try:
        response = ElementTree.fromstring(document)
    except ElementTree.ParseError as error:
        raise CallFault(f"the answer is not TwiML ({error}): {document[:80]!r}") from error
    verb = next(iter(response), None)
    if verb is not None and verb.tag == "Reject":
        raise CallRejected(verb.get("reason", "rejected"))
    if [one.tag for one in response] == ["Say", "Hangup"]:
        raise CallRejected(f"told {response[0].text!r}")
    stream = verb.find("Stream") if verb is not None and verb.tag == "Connect" else None
    if response.tag != "Response" or stream is None or not stream.get("url"):
        raise CallFault(f"the answer holds no <Connect><Stream url=...>: {document[:200]!r}")
    parameters = {one.get("name", ""): one.get("value", "") for one in stream.findall("Parameter")}
    return Stream(stream.get("url", ""), parameters, stream.get("statusCallback", ""))


class FakeTwilio:
    """One call to the service at `url`, from the webhook to the hang-up. Event loop only.

    `url` is the service's address (http, https, ws or wss: the call then begins with its webhook) or that of one media
    socket (`ws://host/twilio/media/TOKEN`: the call begins there, without any callback). `public_url` is what the
    service believes its own address to be (its PUBLIC_URL), if another: requests are signed for that and sent to `url`.

    `position` is the call's clock in samples at 8 kHz since the start message. `caller_lane` is what the caller said
    and `playback.lane` what the caller heard, both in mu-law on that clock. `breaches` are messages of the service's
    that Twilio would not understand, `late_max_s` is by how much this side itself was late with a packet, at worst.
    Proxies of the environment are not used.

    Source: https://www.twilio.com/docs/voice/media-streams/websocket-messages
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        public_url: str = "",
        caller: str = CALLER,
        called: str = CALLED,
        persona: str = "",
        packet_ms: int = 20,
        numbers_as_text: bool = True,
        faults: LineFaults | None = None,
    ) -> None:
        self._base, self._direct = _doors(url)
        self._public = (public_url or self._base).rstrip("/")
        self._token = token
        self._numbers = {"From": caller, "To": called}
        self._query = f"?persona={quote(persona, safe='')}" if persona else ""
        self._packet_s = packet_ms / 1000
        self._packet_bytes = packet_ms * _BYTES_PER_MS
        self._quote = '"' if numbers_as_text else ""
        self._faults = faults

        self.account_sid = "AC" + "0" * 31 + "1"
        self.call_sid = "CA" + secrets.token_hex(16)
        self.stream_sid = "MZ" + secrets.token_hex(16)
        self.playback = Playback()
        self.caller_lane = bytearray()
        self.ended = asyncio.Event()
        self.ended_by = ""
        self.breaches: list[str] = []
        self.callbacks: dict[str, int] = {}
        self.late_max_s = 0.0

        self._stream = Stream("")
        self._http: httpx.AsyncClient | None = None
        self._socket: ClientConnection | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._notes: list[asyncio.Task[None]] = []
        self._speech = bytearray()
        self._sequence = itertools.count(1)
        self._held: dict[int, list[str]] = {}
        self._began_s = 0.0
        self._silence = (b"\xff\x7f\xff\xff" * self._packet_bytes)[: self._packet_bytes]
        self._silence_payload = base64.b64encode(self._silence).decode()

    async def __aenter__(self) -> Self:
        await self.dial()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.hang_up()

    @property
    def position(self) -> int:
        """Samples at 8 kHz since the call began; 0 before."""
        if not self._began_s:
            return 0
        return int((asyncio.get_running_loop().time() - self._began_s) * SAMPLE_RATE_HZ)

    @property
    def speaking(self) -> bool:
        """Whether some of what the caller was given to say is still to be said."""
        return bool(self._speech)

    async def dial(self) -> None:
        """Place the call and begin its media.

        Raises:
            CallRejected: the service is busy, or does not want the call.
            CallFault: it cannot be reached, refuses, or answers what is no answer.
        """
        self._http = httpx.AsyncClient(verify=_trust(), trust_env=False, timeout=_WEBHOOK_TIMEOUT_S)
        try:
            self._stream = Stream(self._direct) if self._direct else await self._ask()
            self._socket = await self._connect(self._stream.url)
            await self._start(self._socket)
        except BaseException:
            await self._close_http()
            raise
        self._tasks = [asyncio.create_task(self._pace(self._socket)), asyncio.create_task(self._listen(self._socket))]
        self._note_stream("stream-started")

    def say(self, ulaw: bytes) -> int:
        """Speak, after what is still to be said. Gives the position in the call where the first sample will be."""
        start = len(self.caller_lane) + len(self._speech)
        self._speech += ulaw
        return start

    def fall_silent(self) -> None:
        """Drop what is still to be said."""
        self._speech.clear()

    async def press(self, digit: str) -> None:
        """Press a key."""
        await self._send(f'"event":"dtmf","dtmf":{{"track":"inbound_track","digit":{json.dumps(digit)}}}')

    async def hang_up(self) -> None:
        """End the call as a caller does: stop, close, callbacks. Nothing happens the second time."""
        if self._socket is None or self._http is None:
            return
        if not self.ended.is_set():
            self._end("the caller hung up")
            self._tasks[0].cancel()
            await self._send(f'"event":"stop","stop":{json.dumps(self._sids())}')
            await self._socket.close()
        await self._settle()
        self._note_stream("stream-stopped")
        self._note_over()
        await asyncio.gather(*self._notes)
        await self._close_http()

    async def cut(self) -> None:
        """Vanish: the connection breaks with no stop, no closing handshake and no callback."""
        assert self._socket is not None, "the call was placed"
        self._end("the line was cut")
        self._tasks[0].cancel()
        self._socket.transport.abort()
        await self._settle()
        await asyncio.gather(*self._notes)
        await self._close_http()

    async def _close_http(self) -> None:
        if self._http is not None:
            http, self._http = self._http, None
            await http.aclose()

    async def _ask(self) -> Stream:
        """Twilio's question what to do with a call, and the service's answer."""
        fields = self._fields() | self._numbers | {"CallStatus": "ringing", "Direction": "inbound"}
        path = _VOICE_PATH + self._query
        try:
            reply = await self._post(f"{self._public}{path}", fields)
        except httpx.TransportError as error:
            raise CallFault(f"cannot reach {self._base}: {error or type(error).__name__}") from error
        if reply.status_code != 200:
            raise CallFault(f"{self._base}{path} answered {reply.status_code}: {_message(reply)}")
        return read_answer(reply.text)

    async def _post(self, public_url: str, fields: dict[str, str]) -> httpx.Response:
        assert self._http is not None, "the call is up"
        headers = {"X-Twilio-Signature": sign(self._token, public_url, fields)} if self._token else {}
        return await self._http.post(self._reached_at(public_url), data=fields, headers=headers)

    async def _connect(self, public_url: str) -> ClientConnection:
        headers = {"x-twilio-signature": sign(self._token, public_url)} if self._token else {}
        url = self._reached_at(public_url)
        try:
            return await connect(
                url, additional_headers=headers, compression=None, proxy=None, ping_interval=None, close_timeout=2
            )
        except InvalidStatus as error:
            raise CallFault(f"{url} refused the media socket with {error.response.status_code}") from error
        except (OSError, InvalidHandshake, InvalidURI, TimeoutError) as error:
            raise CallFault(f"cannot connect to {url}: {error}") from error

    def _reached_at(self, public_url: str) -> str:
        for public, here in ((self._public, self._base), (_socket_url(self._public), _socket_url(self._base))):
            if public_url.startswith(public):
                return here + public_url[len(public) :]
        return public_url

    async def _start(self, socket: ClientConnection) -> None:
        await socket.send('{"event":"connected","protocol":"Call","version":"1.0.0"}')
        media_format = {"encoding": "audio/x-mulaw", "sampleRate": SAMPLE_RATE_HZ, "channels": 1}
        start = self._sids() | {
            "streamSid": self.stream_sid,
            "tracks": ["inbound"],
            "mediaFormat": media_format,
            "customParameters": self._stream.parameters,
        }
        await socket.send(self._message(f'"event":"start","start":{json.dumps(start)}'))
        self._began_s = asyncio.get_running_loop().time()

    async def _pace(self, socket: ClientConnection) -> None:
        """Send a packet when its last sample has been spoken, by a clock that no delay shifts."""
        clock = asyncio.get_running_loop().time
        with contextlib.suppress(ConnectionClosed):
            for number in itertools.count():
                due_s = self._began_s + (number + 1) * self._packet_s
                await asyncio.sleep(max(0.0, due_s - clock()))
                self.late_max_s = max(self.late_max_s, clock() - due_s)
                for text in self._packets(number):
                    await socket.send(text)
                await self._return(socket, self.playback.advance(self.position))

    def _packets(self, number: int) -> list[str]:
        text = self._packet(number)
        if self._faults is None:
            return [text]
        overtaken = self._held.pop(number, [])
        if number in self._faults.lost:
            return overtaken
        later = self._faults.late.get(number, 0)
        if later:
            self._held.setdefault(number + later, []).append(text)
            return overtaken
        return [text] * (2 if number in self._faults.repeated else 1) + overtaken

    def _packet(self, number: int) -> str:
        ulaw, payload = self._silence, self._silence_payload
        if self._speech:
            ulaw = bytes(self._speech[: self._packet_bytes]).ljust(self._packet_bytes, b"\xff")
            payload = base64.b64encode(ulaw).decode()
            del self._speech[: self._packet_bytes]
        self.caller_lane += ulaw
        mark = self._quote
        timestamp_ms = FIRST_TIMESTAMP_MS + number * self._packet_bytes // _BYTES_PER_MS
        return self._message(
            f'"event":"media","media":{{"track":"inbound","chunk":{mark}{number + 1}{mark},'
            f'"timestamp":{mark}{timestamp_ms}{mark},"payload":"{payload}"}}'
        )

    def _message(self, inside: str) -> str:
        mark = self._quote
        return f'{{{inside},"sequenceNumber":{mark}{next(self._sequence)}{mark},"streamSid":"{self.stream_sid}"}}'

    async def _send(self, inside: str) -> None:
        assert self._socket is not None, "the call was placed"
        with contextlib.suppress(ConnectionClosed):
            await self._socket.send(self._message(inside))

    async def _listen(self, socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for message in socket:
                await self._return(socket, self._take(message))
        self._end(f"the service closed the socket with code {socket.close_code}")

    def _take(self, message: str | bytes) -> list[str]:
        """Do what one message of the service's asks for. Gives the marks to be returned."""
        now = self.position
        try:
            told = json.loads(message)
            if told["streamSid"] != self.stream_sid:
                raise ValueError("another stream's streamSid")
            match told["event"]:
                case "media":
                    return self.playback.play(base64.b64decode(told["media"]["payload"], validate=True), now)
                case "mark":
                    return self.playback.mark(str(told["mark"]["name"]), now)
                case "clear":
                    return self.playback.clear(now)
            raise ValueError("an event that Twilio does not know")
        except (KeyError, TypeError, ValueError) as error:
            if len(self.breaches) < _BREACHES_MAX:
                self.breaches.append(f"{type(error).__name__} {error}: {message[:120]!r}")
        return []

    async def _return(self, socket: ClientConnection, marks: list[str]) -> None:
        for name in marks:
            await socket.send(self._message(f'"event":"mark","mark":{{"name":{json.dumps(name)}}}'))

    def _end(self, why: str) -> None:
        if not self.ended.is_set():
            self.ended_by = why
            self.playback.advance(self.position)
            self.ended.set()

    async def _settle(self) -> None:
        """Wait for both tasks to end, let none of their faults pass, and make the lanes equally long."""
        await asyncio.wait(self._tasks)
        for task in self._tasks:
            if not task.cancelled():
                task.result()
        self.caller_lane += b"\xff" * (len(self.playback.lane) - len(self.caller_lane))

    def _sids(self) -> dict[str, object]:
        return {"accountSid": self.account_sid, "callSid": self.call_sid}

    def _fields(self) -> dict[str, str]:
        return {"AccountSid": self.account_sid, "CallSid": self.call_sid, "ApiVersion": "2010-04-01"}

    def _note_stream(self, event: str) -> None:
        if self._stream.status_url:
            more = {"StreamSid": self.stream_sid, "StreamEvent": event, "Timestamp": datetime.now(UTC).isoformat()}
            self._note(event, self._stream.status_url, self._fields() | more)

    def _note_over(self) -> None:
        if not self._direct:
            more = {
                "CallStatus": "completed",
                "CallDuration": str(len(self.playback.lane) // SAMPLE_RATE_HZ),
                "Direction": "inbound",
                "SequenceNumber": "0",
                "Timestamp": format_datetime(datetime.now(UTC)),
            }
            self._note("completed", f"{self._public}/twilio/status", self._fields() | self._numbers | more)

    def _note(self, event: str, public_url: str, fields: dict[str, str]) -> None:
        self._notes.append(asyncio.create_task(self._call_back(event, public_url, fields)))

    async def _call_back(self, event: str, public_url: str, fields: dict[str, str]) -> None:
        """Post a callback. `callbacks` keeps what it was answered, 0 for nothing: a carrier goes on without."""
        self.callbacks[event] = 0
        with contextlib.suppress(httpx.TransportError):
            self.callbacks[event] = (await self._post(public_url, fields)).status_code


@functools.cache
def _trust() -> ssl.SSLContext:
    return ssl.create_default_context()


def _doors(url: str) -> tuple[str, str]:
    """The service's address as http, and the media socket's if `url` is one."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https", "ws", "wss") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise CallFault(f"{url!r} is no service's address; one such as ws://127.0.0.1:8000 is right")
    path = parts.path.rstrip("/").removesuffix(_VOICE_PATH)
    before, _, token = path.partition(_STREAM_PATH)
    base = f"{parts.scheme.replace('ws', 'http')}://{parts.netloc}{before}"
    return base, f"{_socket_url(base)}{_STREAM_PATH}{token}" if token else ""


def _socket_url(base: str) -> str:
    return "ws" + base.removeprefix("http")


def _message(reply: httpx.Response) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(reply.json()["error"]["message"])
    return reply.text[:200] or reply.reason_phrase

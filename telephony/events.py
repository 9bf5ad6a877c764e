"""What can happen on a leg, whichever carrier it came from, and whose fault a broken one is."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The carrier connected the call's media. Nothing else comes before this."""

    call_id: str
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CallerAudio:
    """Mu-law at 8 kHz, usually 20 ms.

    `missing_ms` is how much of the caller's audio, by the carrier's own timestamps, was lost right before this.
    """

    ulaw: bytes
    missing_ms: int = 0


@dataclass(frozen=True, slots=True)
class Digit:
    """The caller pressed a key: one of 0-9 * # A-D."""

    digit: str


@dataclass(frozen=True, slots=True)
class Played:
    """The caller has heard all that was sent before `until_ms`, a position on the leg's own count of audio sent."""

    until_ms: int


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The carrier ended the media: the caller hung up, or the call went elsewhere."""

    reason: str


Event = CallStarted | CallerAudio | Digit | Played | CallEnded


class ProtocolError(Exception):
    """A leg's rules were broken. The message names carrier, call and field."""


class LocalProtocolError(ProtocolError):
    """We broke them: a bug of ours."""


class RemoteProtocolError(ProtocolError):
    """The carrier did: close the leg and go on serving the others."""

"""A call's states and the moves between them. Everything that may change a call's state is in this table."""

from enum import StrEnum


class CallState(StrEnum):
    RINGING = "ringing"
    LIVE = "live"
    ENDED = "ended"


class Outcome(StrEnum):
    COMPLETED = "completed"
    BUSY = "busy"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


MOVES: dict[CallState, frozenset[CallState]] = {
    CallState.RINGING: frozenset({CallState.LIVE, CallState.ENDED}),
    CallState.LIVE: frozenset({CallState.ENDED}),
    CallState.ENDED: frozenset(),
}


class WrongMove(Exception):
    """A call was asked to do what its state does not allow: a bug of ours."""


def move(before: CallState, after: CallState) -> CallState:
    """The state after, if the table allows it. Raises WrongMove."""
    if after not in MOVES[before]:
        raise WrongMove(f"a call that is {before} cannot become {after}")
    return after

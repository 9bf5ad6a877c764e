"""What a lane of a call shows: who spoke when, holes inside an utterance, clicks at the edges of packets."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.simulate.playback import Playback
from telephony import g711

Pcm = NDArray[np.float32]
Loud = NDArray[np.bool_]

WINDOW_S = 0.01
SPEECH_RMS = 10 ** (-50 / 20)
HOLE_MIN_S = 0.060
HOLE_MAX_S = 0.400
STOPPED_S = 0.3
"""Silence between two words is shorter than this."""

_RATE = g711.SAMPLE_RATE_HZ
_WINDOW = int(WINDOW_S * _RATE)
_PACKET = _RATE // 50
_AROUND = 80
_CUT_PEAK = 0.02
_CLICK_MIN = 0.03
_CLICK_TIMES = 4.0
_EDGES_MIN = 100
_SPEECH_PEAK = 0.01


@dataclass(frozen=True, slots=True)
class Span:
    """Speech, in seconds of the call."""

    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Hole:
    """Silence where speech was cut: an `underrun` (the carrier had nothing to play), or `silence` that was sent."""

    start_s: float
    length_s: float
    cause: str


def loud_windows(pcm: Pcm) -> Loud:
    """Which windows of 10 ms are above -50 dBFS: bool [len(pcm) // 80]."""
    windows = pcm[: len(pcm) // _WINDOW * _WINDOW].reshape(-1, _WINDOW)
    loud: Loud = np.square(windows).mean(axis=1) > SPEECH_RMS**2
    return loud


def spans(loud: Loud, apart_s: float) -> list[Span]:
    """Stretches of speech with at least `apart_s` of silence between them."""
    found: list[Span] = []
    for start, end in _runs(loud):
        if found and start * WINDOW_S - found[-1].end_s < apart_s:
            found[-1] = Span(found[-1].start_s, end * WINDOW_S)
        else:
            found.append(Span(start * WINDOW_S, end * WINDOW_S))
    return found


def speech_within(pcm: Pcm) -> Span:
    """From the first to the last loud sample of a recording: what is within 35 dB of its loudest 10 ms."""
    windows = np.square(pcm[: max(1, len(pcm) // _WINDOW) * _WINDOW].reshape(-1, min(_WINDOW, len(pcm)))).mean(axis=1)
    loud = np.flatnonzero(windows >= windows.max() * 10 ** (-35 / 10))
    return Span(int(loud[0]) * WINDOW_S, (int(loud[-1]) + 1) * WINDOW_S)


def silent_from(loud: Loud, at_s: float) -> float | None:
    """When the speech that is going on at `at_s` stops. None if there is none, or it never stops for 300 ms."""
    at = round(at_s / WINDOW_S)
    hold = round(STOPPED_S / WINDOW_S)
    if not loud[max(0, at - hold) : at + 1].any():
        return None
    for window in range(at, len(loud) - hold + 1):
        if not loud[window : window + hold].any():
            return window * WINDOW_S
    return None


def holes(playback: Playback) -> list[Hole]:
    """Find audible holes: over 60 ms of silence that nobody would make between two words.

    An underrun counts wherever the agent speaks within 300 ms before it and after it, unless it follows a flush.
    Silence that was sent counts up to 400 ms, and only where speech breaks off from one sample to the next: a pause or
    the closure of a plosive is faded into.
    """
    pcm = g711.decode(bytes(playback.lane))
    loud = loud_windows(pcm)
    found = []
    for dry in playback.dry:
        if not dry.flushed and dry.end - dry.start > HOLE_MIN_S * _RATE and _amid_speech(loud, dry.start, dry.end):
            found.append(Hole(dry.start / _RATE, (dry.end - dry.start) / _RATE, "underrun"))
    for start, end in _runs(pcm == 0):
        if any(dry.start < end and start < dry.end for dry in playback.dry):
            continue
        long_enough = HOLE_MIN_S < (end - start) / _RATE <= HOLE_MAX_S
        if long_enough and np.abs(pcm[max(0, start - 16) : start]).max(initial=0) > _CUT_PEAK:
            found.append(Hole(start / _RATE, (end - start) / _RATE, "silence"))
    return sorted(found, key=lambda hole: hole.start_s)


def clicks(playback: Playback) -> list[float]:
    """Find jumps at the edges of packets, in seconds: four times the steepest slope within 10 ms, and over -30 dBFS."""
    pcm = g711.decode(bytes(playback.lane))
    steps = np.abs(np.diff(pcm))
    found = []
    for edge in _edges(playback):
        around = np.concatenate((steps[edge - _AROUND : edge - 1], steps[edge : edge + _AROUND]))
        if steps[edge - 1] > max(_CLICK_MIN, _CLICK_TIMES * around.max(initial=0)):
            found.append(edge / _RATE)
    return found


def edge_roughness(playback: Playback) -> float | None:
    """How much rougher speech is at the edges of packets than amid them; 1 where no edge can be told.

    It shows what is too small to be a click, such as a filter that forgets its state at each packet. None with too
    little speech to say.
    """
    pcm = g711.decode(bytes(playback.lane))
    bends = np.abs(np.diff(pcm, n=2))
    at_edges, elsewhere = [], []
    for edge in _edges(playback):
        if np.abs(pcm[edge - _AROUND : edge + _AROUND]).max() < _SPEECH_PEAK or edge + 2 * _AROUND > len(bends):
            continue
        usual = bends[edge - _AROUND : edge + _AROUND].mean()
        if usual > 0:
            at_edges.append(bends[edge - 2 : edge].max() / usual)
            elsewhere += [bends[edge + by - 2 : edge + by].max() / usual for by in (-60, -30, 30, 60)]
    if len(at_edges) < _EDGES_MIN:
        return None
    return float(np.mean(at_edges) / np.mean(elsewhere))


def _amid_speech(loud: Loud, start: int, end: int) -> bool:
    near = round(STOPPED_S / WINDOW_S)
    first, last = start // _WINDOW, -(-end // _WINDOW)
    return bool(loud[max(0, first - near) : first].any() and loud[last : last + near].any())


def _edges(playback: Playback) -> Iterator[int]:
    """Where packets of 20 ms begin in the agent's lane, counted from each message's beginning."""
    ends = [*playback.pieces[1:], len(playback.lane)]
    for start, end in zip(playback.pieces, ends, strict=True):
        for edge in range(start, end, _PACKET):
            if _AROUND < edge < len(playback.lane) - _AROUND:
                yield edge


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where the flags are up: from each first one to behind each last one."""
    turns = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in zip(turns[::2], turns[1::2], strict=True)]

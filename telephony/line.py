"""The line of one call: the carrier's packets to the engine's frames, and back."""

import numpy as np
from numpy.typing import NDArray

from telephony import g711
from telephony.events import CallerAudio
from telephony.resample import Downsampler, Upsampler

Frame = NDArray[np.float32]

FRAME_MS = 80
FRAME_SAMPLES = 1_920
SLACK_MS = 60
FILL_MAX_MS = 2_000
AHEAD_MAX_MS = 400
# Less than this is jitter and not worth a cut.
SURPLUS_MIN_MS = 10
# A carrier that has sent nothing for so long after a silence of ours did not merely send late.
FORGIVE_MS = 1_000
QUIET_PEAK = 0.01

_FRAME_BYTES = FRAME_MS * g711.BYTES_PER_MS


class Line:
    """Packets (mu-law, 8 kHz, any length) to frames (float32 [1920], 24 kHz) and back, with the call's filter state.

    The line has a clock of its own: from the first packet on, a frame is due every 80 ms. A frame still unfinished
    60 ms later is finished with silence, and that time is *borrowed*. Should the carrier then report audio as lost, the
    borrowed time counts towards it; was the audio only late, all of it is heard, the line is now *ahead* (every frame
    would wait that much longer for the engine), and surplus is cut out of quiet packets until it is back on time.

    `lead_ms` (0 to 80) of silence goes before the first packet, so that the call's frames complete at the wanted phase
    of the engine's beat; it may be set until then. All times are seconds of one monotonic clock. Not thread-safe:
    event loop only.

    Counters, in milliseconds: `borrowed_ms` silence by our own clock, `filled_ms` silence for what the carrier lost,
    `skipped_ms` lost or overdue time that nothing was put in for, `dropped_ms` audio cut to get back on time;
    `broken_frames` counts frames of the engine's that held NaN.
    """

    def __init__(self, now_s: float, lead_ms: float = 0) -> None:
        if not 0 <= lead_ms <= FRAME_MS:
            raise ValueError(f"lead_ms is {lead_ms}; wanted 0 to {FRAME_MS}")
        self.borrowed_ms = 0.0
        self.filled_ms = 0.0
        self.skipped_ms = 0.0
        self.dropped_ms = 0.0
        self.broken_frames = 0
        self.lead_ms = lead_ms
        self._due_s = now_s + FRAME_MS / 1000
        self._gathered = bytearray()
        self._started = False
        self._owed_ms = 0.0
        self._borrowed_at_s = now_s
        self._up = Upsampler()
        self._down = Downsampler()

    @property
    def next_due_s(self) -> float:
        """When to call `overdue` unless a frame has come out of `hear` by then."""
        return self._due_s + SLACK_MS / 1000

    def ahead_ms(self, now_s: float) -> float:
        """By how much the line has been given more audio than time has passed. Negative: audio is late."""
        return (self._due_s - now_s) * 1000 - FRAME_MS + len(self._gathered) / g711.BYTES_PER_MS

    def hear(self, audio: CallerAudio, now_s: float) -> list[Frame]:
        """Take what the carrier sent and give the frames, float32 [1920], that it completes."""
        if not audio.ulaw:
            return []
        if not self._started:
            self._start(audio.ulaw, now_s)
        elif audio.missing_ms:
            self._fill(audio.missing_ms, now_s)
        self._gathered += self._on_time(audio.ulaw, now_s)
        return self._frames()

    def overdue(self, now_s: float) -> list[Frame]:
        """Finish with silence what is overdue: none before `next_due_s`, more than one after a stall of our own."""
        frames: list[Frame] = []
        while now_s >= self.next_due_s and len(frames) * FRAME_MS < AHEAD_MAX_MS:
            short = _FRAME_BYTES - len(self._gathered)
            self._borrow(short / g711.BYTES_PER_MS, now_s)
            self._gathered += g711.ULAW_SILENCE * short
            frames += self._frames()
        self._skip_to(now_s)
        return frames

    def say(self, pcm: Frame) -> bytes:
        """Turn one spoken frame, float32 [1920] in [-1, 1], into 640 bytes of mu-law. NaN makes it a silent one.

        Raises:
            ValueError: any other shape.
        """
        if pcm.shape != (FRAME_SAMPLES,):
            raise ValueError(f"a spoken frame has shape {pcm.shape}; wanted ({FRAME_SAMPLES},)")
        within = pcm.clip(-1, 1)
        if np.isnan(within.sum()):
            self.broken_frames += 1
            within = np.zeros_like(within)
        return g711.encode(self._down.process(within))

    def _start(self, ulaw: bytes, now_s: float) -> None:
        """Set the clock by the first packet, which counts as on time."""
        silence_due_s = self.next_due_s
        self._gathered += g711.ULAW_SILENCE * round(self.lead_ms * g711.BYTES_PER_MS)
        self._started = True
        self._owed_ms = 0.0
        to_come_ms = FRAME_MS - (len(self._gathered) + len(ulaw)) / g711.BYTES_PER_MS
        self._due_s = now_s + to_come_ms / 1000
        if self.borrowed_ms and self._due_s < silence_due_s:
            # Less than a frame after our own last silence: that one is still waiting, so this line begins ahead.
            self._due_s += FRAME_MS / 1000

    def _fill(self, missing_ms: float, now_s: float) -> None:
        """Put silence where the carrier lost audio, but never so much that the line runs ahead by over a frame."""
        covered_ms = min(missing_ms, self._owed_ms)
        self._owed_ms -= covered_ms
        room_ms = max(0.0, FRAME_MS - self.ahead_ms(now_s))
        silence = int(min(missing_ms - covered_ms, room_ms, FILL_MAX_MS) * g711.BYTES_PER_MS)
        self._gathered += g711.ULAW_SILENCE * silence
        self.filled_ms += silence / g711.BYTES_PER_MS
        self.skipped_ms += missing_ms - covered_ms - silence / g711.BYTES_PER_MS

    def _on_time(self, ulaw: bytes, now_s: float) -> bytes:
        """The packet, or what is left of it once surplus is cut: any that is quiet, and what exceeds the bound."""
        surplus_ms = self.ahead_ms(now_s) + len(ulaw) / g711.BYTES_PER_MS
        if surplus_ms < SURPLUS_MIN_MS:
            if self._owed_ms and surplus_ms <= 0 and (now_s - self._borrowed_at_s) * 1000 > FORGIVE_MS:
                self._owed_ms = 0.0
            return ulaw
        quiet = g711.peak(ulaw) < QUIET_PEAK
        cut_ms = surplus_ms if quiet else max(0.0, surplus_ms - AHEAD_MAX_MS)
        cut = min(len(ulaw), round(cut_ms * g711.BYTES_PER_MS))
        self.dropped_ms += cut / g711.BYTES_PER_MS
        self._owed_ms = max(0.0, self._owed_ms - cut / g711.BYTES_PER_MS)
        return ulaw[cut:]

    def _borrow(self, ms: float, now_s: float) -> None:
        self.borrowed_ms += ms
        self._owed_ms += ms
        self._borrowed_at_s = now_s

    def _skip_to(self, now_s: float) -> None:
        """Give up on time that passed while nobody asked, in whole frames: the beat's phase stays."""
        late_s = now_s - self.next_due_s
        if late_s >= 0:
            frames = int(late_s * 1000 / FRAME_MS) + 1
            self._due_s += frames * FRAME_MS / 1000
            self.skipped_ms += frames * FRAME_MS

    def _frames(self) -> list[Frame]:
        frames: list[Frame] = []
        while len(self._gathered) >= _FRAME_BYTES:
            frames.append(self._up.process(g711.decode(self._gathered[:_FRAME_BYTES])))
            del self._gathered[:_FRAME_BYTES]
            self._due_s += FRAME_MS / 1000
        return frames

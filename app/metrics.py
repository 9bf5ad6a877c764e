"""Every instrument of the service, with its unit and what it means. One registry for each Metrics: none is global."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

OUTCOMES = ("completed", "busy", "failed", "interrupted")
REFUSALS = ("full", "behind", "not_ready", "stopping")
RESPONSE_BUCKETS_S = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
# The beat is 80 ms: a tick near it is the last that keeps up.
TICK_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.16, 0.32)


class Metrics:
    """Any thread may count. Prometheus wants seconds, so what arrives in milliseconds is divided here."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls()
        self._audio()
        self._inside()

    def _calls(self) -> None:
        r = self.registry
        self.calls = Counter("personaline_calls", "Calls that have ended, by outcome.", ["outcome"], registry=r)
        for outcome in OUTCOMES:
            self.calls.labels(outcome)
        self.refused = Counter("personaline_calls_refused", "Calls refused as busy, by reason.", ["reason"], registry=r)
        for reason in REFUSALS:
            self.refused.labels(reason)
        self.live = Gauge("personaline_live_calls", "Calls whose media is up now.", registry=r)
        self.rows = Gauge("personaline_rows", "Calls that the engine can carry at once.", registry=r)
        self.rows_in_use = Gauge("personaline_rows_in_use", "Rows of the engine that are leased now.", registry=r)
        self.response = Histogram(
            "personaline_response_seconds",
            "From the end of the caller's speech to the first of the agent's answer, in seconds.",
            buckets=RESPONSE_BUCKETS_S,
            registry=r,
        )

    def _audio(self) -> None:
        r = self.registry
        frames = Counter(
            "personaline_frames_dropped", "80 ms frames dropped from a full queue, by queue.", ["queue"], registry=r
        )
        self.inbox_dropped = frames.labels("inbox")
        self.outbox_dropped = frames.labels("outbox")
        silence = Counter(
            "personaline_line_seconds",
            "Caller's audio that was not as it should be, in seconds: filled (lost on the way, silence in its place), "
            "borrowed (late, silence first), dropped (came after its silence or too much of it).",
            ["kind"],
            unit="seconds",
            registry=r,
        )
        self._filled, self._borrowed, self._dropped = (silence.labels(k) for k in ("filled", "borrowed", "dropped"))
        self.left_out = Counter(
            "personaline_speech_left_out_seconds",
            "Quiet audio of the agent's that was not sent, to be back on time after a pause of ours, in seconds.",
            unit="seconds",
            registry=r,
        )
        self.protocol_errors = Counter(
            "personaline_protocol_errors", "Legs closed for breaking their carrier's protocol.", ["carrier"], registry=r
        )

    def _inside(self) -> None:
        r = self.registry
        self.store_queue = Gauge("personaline_store_queue", "Writes on their way to the database.", registry=r)
        self.tick = Histogram(
            "personaline_engine_tick_seconds",
            "One step of the rows that had a frame, in seconds. The beat is 0.08.",
            buckets=TICK_BUCKETS_S,
            registry=r,
        )
        self.late_ticks = Counter(
            "personaline_engine_late_ticks", "Ticks that ended more than 80 ms after they were due.", registry=r
        )
        self.restarts = Counter(
            "personaline_engine_restarts", "Times the engine's process was started again.", registry=r
        )
        self.cpu = Gauge("personaline_process_cpu_seconds", "CPU time that this process has used.", registry=r)
        self.cpu.set_function(time.process_time)

    def add_line(self, borrowed_ms: float, filled_ms: float, dropped_ms: float) -> None:
        """What one call's line had to mend."""
        self._borrowed.inc(borrowed_ms / 1000)
        self._filled.inc(filled_ms / 1000)
        self._dropped.inc(dropped_ms / 1000)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self.registry)

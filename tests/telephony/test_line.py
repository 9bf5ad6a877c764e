import base64
import heapq
import random
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telephony import g711
from telephony.events import CallerAudio
from telephony.line import Frame, Line
from telephony.twilio import TwilioStream

SILENT_PACKET = g711.ULAW_SILENCE * 160
LOUD_PACKET = g711.encode((0.5 * np.sin(np.arange(160) * 2 * np.pi / 8)).astype(np.float32))


def speech(ms: int) -> bytes:
    """A 400 Hz tone, loud enough never to pass for silence."""
    return g711.encode((0.5 * np.sin(2 * np.pi * 400 / 8000 * np.arange(8 * ms))).astype(np.float32))


def hear_all(line: Line, packets: Iterable[bytes], from_s: float = 0.0) -> list[Frame]:
    """Packets that arrive when they should: each as its last sample is spoken."""
    frames: list[Frame] = []
    now_s = from_s
    for packet in packets:
        now_s += len(packet) / 8000
        frames += line.hear(CallerAudio(packet), now_s)
    return frames


def a_line_on_time(now_s: float = 0.08) -> Line:
    """One that has heard a whole loud frame up to `now_s` and owes nothing."""
    line = Line(now_s - 0.08)
    hear_all(line, [LOUD_PACKET] * 4, now_s - 0.08)
    return line


def loud_ms(frames: list[Frame]) -> float:
    """How much tone there is in what was heard, by its energy: the tone's power is 1/8."""
    return float(sum((frame**2).sum() for frame in frames)) * 8 / 24


def test_every_fourth_packet_completes_a_frame() -> None:
    line = Line(0.0)

    completed = [len(line.hear(CallerAudio(LOUD_PACKET), 0.02 * n)) for n in range(1, 9)]

    assert completed == [0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("packet_ms", [10, 20, 30, 40, 100, 240])
def test_frames_are_the_same_whatever_the_packets_length(packet_ms: int) -> None:
    call = speech(960)
    size = 8 * packet_ms

    frames = hear_all(Line(0.0), [call[at : at + size] for at in range(0, len(call), size)])

    assert [frame.shape for frame in frames] == [(1920,)] * 12
    assert np.array_equal(np.concatenate(frames), np.concatenate(hear_all(Line(0.0), [call])))


@given(st.lists(st.integers(0, 900), min_size=1, max_size=20))
def test_any_sizes_at_all_lose_no_sample(sizes: list[int]) -> None:
    frames = hear_all(Line(0.0), [speech(113)[:size] for size in sizes])

    assert len(frames) == sum(sizes) // 640


def test_the_lead_makes_the_first_frame_complete_that_much_sooner() -> None:
    line = Line(0.0, lead_ms=50)

    completed = [len(line.hear(CallerAudio(LOUD_PACKET), 0.02 * n)) for n in range(1, 7)]

    assert completed == [0, 1, 0, 0, 0, 1]


def test_the_lead_is_silence_in_front_of_the_caller() -> None:
    frames = hear_all(Line(0.0, lead_ms=40), [LOUD_PACKET] * 2)

    assert not frames[0][:960].any()
    assert np.abs(frames[0][1100:]).max() > 0.4


def test_a_lead_longer_than_a_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="lead_ms is 81; wanted 0 to 80"):
        Line(0.0, lead_ms=81)


def test_no_packet_at_all_still_makes_a_frame_every_80_ms() -> None:
    line = Line(100.0)
    spoken_at_s = []

    for _ in range(50):
        assert line.overdue(line.next_due_s - 0.001) == []
        spoken_at_s.append(line.next_due_s)
        (frame,) = line.overdue(line.next_due_s)
        assert not frame.any()

    assert spoken_at_s == pytest.approx([100.14 + 0.08 * n for n in range(50)])
    assert line.borrowed_ms == 50 * 80


def test_an_overdue_frame_keeps_what_was_heard_of_it() -> None:
    line = a_line_on_time()
    line.hear(CallerAudio(LOUD_PACKET), 0.10)

    assert line.overdue(0.21) == []
    (frame,) = line.overdue(0.22)

    assert loud_ms([frame]) == pytest.approx(20, abs=4)
    assert line.borrowed_ms == 60


def test_lost_audio_becomes_silence_of_the_same_length() -> None:
    line = a_line_on_time()

    frames = line.hear(CallerAudio(LOUD_PACKET, missing_ms=60), 0.16)

    assert len(frames) == 1
    assert line.filled_ms == 60
    assert line.ahead_ms(0.16) == pytest.approx(0)


def test_silence_our_clock_supplied_counts_towards_what_the_carrier_lost() -> None:
    """300 ms are lost; our clock put in 240 of them before the carrier said so."""
    line = a_line_on_time()
    while line.next_due_s < 0.40:
        line.overdue(line.next_due_s)

    assert line.borrowed_ms == 240
    line.hear(CallerAudio(LOUD_PACKET, missing_ms=300), 0.40)

    assert line.filled_ms == 60
    assert line.dropped_ms == 0
    assert line.ahead_ms(0.40) == pytest.approx(0)


def stalled_then_burst(line: Line, stall_ms: int, now_s: float = 0.08) -> tuple[list[Frame], float]:
    """Nothing for a while, then everything that was held back, at once. Gives what was heard of it, and when."""
    after_s = now_s + stall_ms / 1000
    while line.next_due_s < after_s:
        line.overdue(line.next_due_s)
    frames: list[Frame] = []
    for _ in range(stall_ms // 20):
        frames += line.hear(CallerAudio(LOUD_PACKET), after_s)
    return frames, after_s


def test_audio_that_was_only_late_is_all_heard() -> None:
    line = a_line_on_time()

    frames, now_s = stalled_then_burst(line, 320)

    assert loud_ms(frames) == pytest.approx(320, abs=10)
    assert line.dropped_ms == 0
    assert line.ahead_ms(now_s) == pytest.approx(line.borrowed_ms) == pytest.approx(240)


def test_borrowed_time_is_paid_back_out_of_quiet_packets_until_the_line_is_on_time() -> None:
    line = a_line_on_time()
    _, now_s = stalled_then_burst(line, 320)

    hear_all(line, [SILENT_PACKET] * 30, now_s)

    assert line.dropped_ms == 240
    assert line.ahead_ms(now_s + 0.6) == pytest.approx(0)


def test_speech_is_never_cut_to_pay_back() -> None:
    line = a_line_on_time()
    _, now_s = stalled_then_burst(line, 320)

    frames = hear_all(line, [LOUD_PACKET] * 100, now_s)

    assert len(frames) == 25
    assert line.dropped_ms == 0


@given(st.lists(st.sampled_from(["loud", "silent", "stall", "burst"]), max_size=60))
def test_the_line_never_runs_away(story: list[str]) -> None:
    line, now_s = a_line_on_time(), 0.08
    for part in story:
        if part == "stall":
            now_s += 0.5
            line.overdue(now_s)
        elif part == "burst":
            line.hear(CallerAudio(LOUD_PACKET * 25), now_s)
        else:
            now_s += 0.02
            line.hear(CallerAudio(LOUD_PACKET if part == "loud" else SILENT_PACKET), now_s)

        assert line.ahead_ms(now_s) <= 400.001


def test_what_the_lag_bound_cuts_is_counted() -> None:
    line = a_line_on_time()

    line.hear(CallerAudio(LOUD_PACKET * 50), 0.08)

    assert line.ahead_ms(0.08) == pytest.approx(400)
    assert line.dropped_ms == 600


def test_a_loss_reported_beyond_real_time_is_not_filled() -> None:
    """A timestamp that jumps an hour while 20 ms pass must not cost the caller an hour of delay."""
    line = a_line_on_time()

    line.hear(CallerAudio(LOUD_PACKET, missing_ms=3_600_000), 0.10)

    assert line.filled_ms + line.skipped_ms == 3_600_000
    assert line.ahead_ms(0.10) <= 100


def test_a_loss_nobody_watched_is_filled_up_to_two_seconds() -> None:
    line = a_line_on_time()

    frames = line.hear(CallerAudio(LOUD_PACKET, missing_ms=5_000), 5.10)

    assert line.filled_ms == 2_000
    assert line.skipped_ms == 3_000
    assert len(frames) == 25


def test_a_pause_the_carrier_never_made_up_for_does_not_hide_a_later_loss() -> None:
    line = a_line_on_time()
    while line.next_due_s < 3.0:
        line.overdue(line.next_due_s)
    hear_all(line, [LOUD_PACKET] * 100, 3.0)

    line.hear(CallerAudio(LOUD_PACKET, missing_ms=40), 5.06)

    assert line.filled_ms == 40


def test_a_caller_first_heard_late_starts_no_frame_behind_our_own_silence() -> None:
    """The first packet comes right after a silent frame of ours; its frame would complete 60 ms after that one."""
    line = Line(0.0)
    assert len(line.overdue(0.14)) == 1

    line.hear(CallerAudio(LOUD_PACKET), 0.141)

    assert line.ahead_ms(0.141) == pytest.approx(80)
    hear_all(line, [SILENT_PACKET] * 10, 0.141)
    assert line.ahead_ms(0.341) == pytest.approx(0)


def test_after_a_stall_of_our_own_the_beat_keeps_its_phase() -> None:
    line = a_line_on_time()

    frames = line.overdue(20.0)

    assert len(frames) == 5
    assert line.skipped_ms > 19_000
    assert 20.0 < line.next_due_s <= 20.08
    assert (line.next_due_s - 0.22) / 0.08 == pytest.approx(round((line.next_due_s - 0.22) / 0.08))


def test_an_empty_packet_changes_nothing() -> None:
    line = Line(0.0)

    assert line.hear(CallerAudio(b""), 5.0) == []
    assert line.next_due_s == Line(0.0).next_due_s


def test_a_tone_heard_and_said_back_is_the_same_tone_10_ms_later() -> None:
    """Two resamplings of 2.5 ms each make 40 samples of 8 kHz."""
    call = speech(800)
    line = Line(0.0)

    said = g711.decode(b"".join(line.say(frame) for frame in line.hear(CallerAudio(call), 0.8)))

    wanted = g711.decode(call)
    noise = said[200:] - wanted[160:-40]
    assert np.mean(noise**2) < np.mean(wanted**2) / 1000


def test_a_spoken_frame_is_640_bytes_and_silence_is_silence() -> None:
    assert Line(0.0).say(np.zeros(1920, np.float32)) == g711.ULAW_SILENCE * 640


def test_too_loud_a_frame_is_clipped() -> None:
    line = Line(0.0)

    said = line.say(np.full(1920, 9.0, np.float32))

    assert g711.decode(said)[60:].min() > 0.97


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_a_broken_frame_from_the_engine_spoils_no_later_one(poison: float) -> None:
    line = Line(0.0)
    broken = np.zeros(1920, np.float32)
    broken[700] = poison
    line.say(broken)

    assert line.say(np.zeros(1920, np.float32)) == g711.ULAW_SILENCE * 640
    assert line.broken_frames == int(np.isnan(poison))


def test_nan_is_said_as_silence() -> None:
    line = Line(0.0)

    assert line.say(np.full(1920, np.nan, np.float32)) == g711.ULAW_SILENCE * 640


def test_a_frame_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1919,\); wanted \(1920,\)"):
        Line(0.0).say(np.zeros(1919, np.float32))


def deliveries(seed: int, packets: int) -> list[tuple[float, int]]:
    """(arrival, packet number): 3 % lost, some of them in runs, 2 % sent twice, 3 % overtaken by the next ones."""
    chance = random.Random(seed)
    arrivals: list[tuple[float, int]] = []
    number = 0
    while number < packets:
        if number and chance.random() < 0.02:
            number += chance.choice([1, 1, 1, 2, 5, 30])
        at_s = (number + 1) * 0.02 + chance.random() * 0.01
        heapq.heappush(arrivals, (at_s + (0.045 if chance.random() < 0.03 else 0), number))
        if chance.random() < 0.02:
            heapq.heappush(arrivals, (at_s + chance.random() * 0.2, number))
        number += 1
    return [heapq.heappop(arrivals) for _ in range(len(arrivals))]


def media(number: int) -> str:
    payload = base64.b64encode(LOUD_PACKET).decode()
    return (
        f'{{"event":"media","streamSid":"MZ01","media":{{"track":"inbound","chunk":"{number + 1}",'
        f'"timestamp":"{155 + 20 * number}","payload":"{payload}"}}}}'
    )


START = (
    '{"event":"start","streamSid":"MZ01","start":{"streamSid":"MZ01","callSid":"CA01",'
    '"mediaFormat":{"encoding":"audio/x-mulaw","sampleRate":8000,"channels":1}}}'
)


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_packets_lost_repeated_and_overtaken_move_the_line_by_no_more_than_a_frame(seed: int) -> None:
    """Every packet is loud, so nothing is ever paid back: only the accounting keeps the line on time."""
    leg, line = TwilioStream(), Line(0.0)
    leg.receive(START)
    frames, worst_ms = 0, 0.0

    for now_s, number in deliveries(seed, 10_000):
        while line.next_due_s <= now_s:
            frames += len(line.overdue(line.next_due_s))
        for event in leg.receive(media(number)):
            assert isinstance(event, CallerAudio)
            frames += len(line.hear(event, now_s))
        worst_ms = max(worst_ms, line.ahead_ms(now_s), -line.ahead_ms(now_s) - 60)

    assert worst_ms <= 80
    assert abs(frames * 80 - now_s * 1000) <= 160
    assert leg.repeated > 300
    assert line.filled_ms > 1000

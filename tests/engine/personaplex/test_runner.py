"""Calls as rows of one batch: each says what it would say alone, whatever the others do."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.engine.contract import FRAME_SAMPLES, EngineFault, Role, Spoken
from app.engine.personaplex.model.ring import Kv, Ring
from app.engine.personaplex.model.weights import TOKENIZER_NAME, find_checkpoint
from app.engine.personaplex.prefix import PrefixCache
from app.engine.personaplex.rebuild import LATE_FRAMES
from app.engine.personaplex.runner import PersonaPlexRunner
from tests.engine.personaplex.runners import (
    CAPTAIN,
    HARBOUR,
    SHORT,
    Call,
    Stage,
    poison,
    same_speech,
    sound,
    tiny_runner,
)
from tests.engine.tiny import make_tiny_checkpoint, tiny_tokenizer

ROWS = 3
CONTEXT = 112


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), context=CONTEXT)


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> PersonaPlexRunner:
    warm = tiny_runner(checkpoint, ROWS)
    warm.warm_up([HARBOUR, CAPTAIN])
    return warm


def text_of(said: list[Spoken]) -> str:
    return "".join(frame.text for frame in said)


def test_a_call_gets_a_frame_of_speech_and_its_text_for_every_frame_heard(runner: PersonaPlexRunner) -> None:
    said = Stage(runner).alone(0, Call(1, HARBOUR, 60))

    assert len(said) == 60
    assert {frame.pcm.shape for frame in said} == {(FRAME_SAMPLES,)}
    assert all(np.isfinite(frame.pcm).all() and np.abs(frame.pcm).max() <= 1 for frame in said)
    assert text_of(said).strip()


def test_the_same_seed_says_the_same_again_and_another_something_else(checkpoint: Path) -> None:
    said = []
    for seed in (5, 5, 6):
        runner = tiny_runner(checkpoint, 1, seed=seed)
        runner.warm_up([])
        said.append(Stage(runner).alone(0, Call(1, HARBOUR, 20)))

    assert same_speech(said[0], said[1])
    assert not same_speech(said[0], said[2])


def test_without_a_seed_two_calls_differ(checkpoint: Path) -> None:
    runner = tiny_runner(checkpoint, 2, seed=None)
    runner.warm_up([])

    assert not same_speech(*(Stage(runner).alone(row, Call(1, HARBOUR, 20)) for row in (0, 1)))


def test_what_the_caller_says_changes_what_the_agent_says(runner: PersonaPlexRunner) -> None:
    one, other = (Stage(runner).alone(0, Call(number, SHORT, 30)) for number in (1, 2))

    assert not same_speech(one, other)


calls = st.builds(
    Call,
    number=st.integers(0, 50),
    role=st.sampled_from([HARBOUR, CAPTAIN, SHORT]),
    frames=st.integers(1, 120),
    skips=st.frozensets(st.integers(0, 120), max_size=20),
    handed_over=st.none() | st.tuples(st.integers(0, 100), st.sampled_from([HARBOUR, CAPTAIN, SHORT])),
)


Played = list[tuple[Call, int]]
schedules = st.lists(st.tuples(calls, st.integers(0, 40)), min_size=3, max_size=5)
costly = settings(
    phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@settings(costly, max_examples=3)
@given(played=schedules, data=st.data())
def test_joins_leaves_skips_handoffs_and_rebuilds_never_change_what_another_row_says(
    runner: PersonaPlexRunner, played: Played, data: st.DataObject
) -> None:
    """Nor do the ticks that a row itself skips. Freed rows are full of NaN: whoever read them would sound of it."""
    assert not changed_by_company(runner, played, data)


@pytest.mark.slow
@settings(costly, max_examples=30)
@given(played=schedules, data=st.data())
def test_many_more_schedules_never_change_what_another_row_says(
    runner: PersonaPlexRunner, played: Played, data: st.DataObject
) -> None:
    assert not changed_by_company(runner, played, data)


def changed_by_company(runner: PersonaPlexRunner, played: Played, data: st.DataObject) -> list[Call]:
    """The calls that say something else together than each alone in row 0, without the ticks it skips."""
    stage = Stage(runner)
    waiting, heard = list(played), []
    pause = 0
    while waiting or len(stage.free) < ROWS:
        if waiting and pause == 0 and stage.free:
            call, pause = waiting.pop(0)
            heard.append(stage.begin(data.draw(st.sampled_from(stage.free)), call))
        stage.tick()
        pause = max(0, pause - 1)

    return [
        call
        for (call, _), said in zip(played, heard, strict=True)
        if not same_speech(said, Stage(runner).alone(0, replace(call, skips=frozenset())))
    ]


def test_a_long_call_keeps_its_prompt_in_the_window_and_drops_no_frame(runner: PersonaPlexRunner) -> None:
    """Three windows long: the row's position goes back each time, and never past the window's end."""
    runner.join(0, HARBOUR)
    positions = []
    active = np.array([True, False, False])
    for _ in range(3 * CONTEXT):
        spoken = runner.step(np.full((ROWS, FRAME_SAMPLES), 0.01, np.float32), active)
        assert spoken[0] is not None
        runner.between()
        positions.append(runner._positions[0])
        assert int(runner._lm_state.position[0]) == positions[-1]
    runner.leave(0)

    rebuilds = sum(after < before for before, after in pairwise(positions))
    assert rebuilds >= 3
    assert max(positions) < CONTEXT - 1


def test_calls_that_are_due_together_are_each_rebuilt_as_if_alone(runner: PersonaPlexRunner) -> None:
    """They began together, so only one can be read beforehand: the others' turn costs time, and nothing else."""
    played = [Call(number, role, 100) for number, role in enumerate((HARBOUR, HARBOUR, CAPTAIN))]
    stage = Stage(runner)
    heard = [stage.begin(row, call) for row, call in enumerate(played)]
    while len(stage.free) < ROWS:
        stage.tick()

    for call, said in zip(played, heard, strict=True):
        assert same_speech(said, Stage(runner).alone(2 - call.number, call))


def test_a_sliding_window_goes_on_without_end_too(checkpoint: Path) -> None:
    sliding = tiny_runner(checkpoint, 1, window="slide")
    sliding.warm_up([])
    said = Stage(sliding).alone(0, Call(1, HARBOUR, 2 * CONTEXT))

    assert len(said) == 2 * CONTEXT
    assert sliding._positions[0] > 2 * CONTEXT


def test_up_to_its_rebuild_a_call_says_what_a_sliding_one_says_and_then_something_else(checkpoint: Path) -> None:
    said = []
    for window in ("rebuild", "slide"):
        runner = tiny_runner(checkpoint, 1, window=window)
        runner.warm_up([])
        said.append(Stage(runner).alone(0, Call(1, HARBOUR, 2 * CONTEXT)))

    prompt = runner._prompt_frames[0]
    before = CONTEXT - CONTEXT // 8 - prompt - 1
    assert same_speech(said[0][:before], said[1][:before])
    assert not same_speech(said[0], said[1])


def made_of_its_history(runner: PersonaPlexRunner, row: int) -> bool:
    """Whether a row's keys and values are those of its prompt's and its frames' columns, read in one pass."""
    state, position = runner._lm_state, int(runner._positions[row])
    now = state.kv.row(row).first(position)
    kv = now.like(position)
    kv.copy_(now)
    prompt = int(runner._prompt_frames[row])
    columns = state.history[row, prompt:position]
    runner._lm.transformer.extend(runner._lm.embed(columns), kv, prompt)
    return torch.allclose(kv.values, now.values, atol=1e-4)


def test_a_handoff_gives_the_call_the_new_prompt_and_the_last_frames(runner: PersonaPlexRunner) -> None:
    """As a new call of that persona that had heard and said those very frames."""
    stage = Stage(runner)
    stage.begin(1, Call(3, replace(HARBOUR, voice="NATM1"), 30, handed_over=(20, CAPTAIN)))
    for _ in range(20):
        stage.tick()
    before = runner._lm_state.history[1, runner._prompt_frames[1] : runner._positions[1]].clone()
    stage.tick()

    prefix = runner._prefix(CAPTAIN)
    length = len(prefix.prompt)
    assert runner._prompt_frames[1] == length
    assert runner._positions[1] == length + 21
    assert runner._lm_state.history[1, length : length + 20].equal(before)
    assert runner._lm_state.kv.row(1).first(length).values.equal(prefix.kv.values)
    assert made_of_its_history(runner, 1)
    stage.end(1)


def test_rows_are_always_made_of_their_own_last_frames(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebuilds in small parts, handoffs upon handoffs, calls that end in the middle of one, at random."""
    monkeypatch.setattr("app.engine.personaplex.rebuild.CHUNK_FRAMES", 4)
    runner = tiny_runner(checkpoint, ROWS, seed=None)
    runner.warm_up([HARBOUR, CAPTAIN, SHORT])
    random = np.random.default_rng(5)
    roles = (HARBOUR, CAPTAIN, SHORT)
    fed: list[list[torch.Tensor]] = [[] for _ in range(ROWS)]
    for row in range(ROWS):
        runner.join(row, roles[row])
    changed = 0
    for tick in range(250):
        for row in range(ROWS):
            luck = random.random()
            for _ in range(int(luck < 0.02) + int(luck < 0.008)):
                runner.change(row, roles[random.integers(3)])
            if 0.02 < luck < 0.026:
                runner.leave(row)
                poison(runner, row)
                runner.join(row, roles[random.integers(3)])
                fed[row].clear()
        active = random.random(ROWS) < 0.85
        places = (runner._positions % runner._lm.config.ring).tolist()
        runner.step(np.stack([sound(row, tick) for row in range(ROWS)]), active)
        for row in np.flatnonzero(active).tolist():
            fed[row].append(runner._lm_state.history[row, places[row]].clone())
        before = runner._positions.copy()
        runner.between()
        for row in range(ROWS):
            kept = int(runner._positions[row] - runner._prompt_frames[row])
            held = runner._lm_state.history[row, runner._prompt_frames[row] : runner._positions[row]]
            assert kept == 0 or held.equal(torch.stack(fed[row][-kept:])), f"tick {tick}, row {row}"
            if runner._positions[row] != before[row]:
                changed += 1
                assert made_of_its_history(runner, row), f"tick {tick}, row {row}"
    assert changed > 15


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_keys_in_a_byte_each_are_the_prompts_own_bytes_after_every_rebuild_and_handoff(
    checkpoint: Path, kv: Kv
) -> None:
    """So that no call's prompt wears out by being rounded again and again."""
    runner = tiny_runner(checkpoint, 2, kv=kv)
    runner.warm_up([HARBOUR, CAPTAIN])
    stage = Stage(runner)
    said = [
        stage.begin(0, Call(1, HARBOUR, 3 * CONTEXT)),
        stage.begin(1, Call(2, HARBOUR, 200, handed_over=(20, CAPTAIN))),
    ]
    made_anew = 0
    for _ in range(180):
        before = runner._positions.copy()
        stage.tick()
        made_anew += int((runner._positions < before).sum())

    assert made_anew >= 3
    for row, role in enumerate((HARBOUR, CAPTAIN)):
        prefix = runner._prefix(role)
        now = runner._lm_state.kv.row(row).first(len(prefix.prompt))
        assert now.values.view(torch.uint8).equal(prefix.kv.values.view(torch.uint8))
        assert now.scales.equal(prefix.kv.scales)
        assert all(np.isfinite(frame.pcm).all() for frame in said[row])


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_a_runner_that_keeps_keys_in_a_byte_each_reads_prompts_as_an_exact_one_does(checkpoint: Path, kv: Kv) -> None:
    rounded, exact = tiny_runner(checkpoint, 1, kv=kv), tiny_runner(checkpoint, 1)
    for runner in (rounded, exact):
        runner.warm_up([HARBOUR])

    one, other = (runner._prefix(HARBOUR).hidden[0] for runner in (rounded, exact))
    assert torch.cosine_similarity(one, other, dim=0) > 0.995
    assert not one.equal(other)


def test_a_call_that_ends_while_it_is_made_anew_leaves_nothing_to_the_rows_next_owner(
    runner: PersonaPlexRunner,
) -> None:
    stage = Stage(runner)
    stage.begin(0, Call(1, HARBOUR, 500))
    while not runner._rebuilder._jobs:
        stage.tick()
    stage.end(0)

    call = Call(2, HARBOUR, 80)
    assert same_speech(stage.alone(0, call), Stage(runner).alone(1, call))


@pytest.mark.parametrize("steps", [1, 2, 3, LATE_FRAMES])
def test_a_row_is_made_anew_whichever_of_several_late_frames_brings_it_past_its_time(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Late frames are stepped between two ticks, and only after a tick there is time for this."""
    monkeypatch.setattr("app.engine.personaplex.rebuild.CHUNK_FRAMES", 8)
    runner = tiny_runner(checkpoint, 1)
    runner.warm_up([HARBOUR])
    runner.join(0, HARBOUR)
    made_anew, tick = 0, 0
    while made_anew < 4:
        for _ in range(steps):
            runner.step(sound(0, tick)[None], np.array([True]))
            tick += 1
        before = int(runner._positions[0])
        runner.between()
        if runner._positions[0] < before:
            made_anew += 1
            assert made_of_its_history(runner, 0), f"frame {tick}"
        assert runner._positions[0] <= runner._lm.config.ring
    prefix = runner._prefix(HARBOUR)
    assert runner._lm_state.kv.row(0).first(len(prefix.prompt)).values.equal(prefix.kv.values)


def test_a_call_for_whose_copy_there_is_no_memory_goes_on_and_others_are_made_anew(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = tiny_runner(checkpoint, 2)
    runner.warm_up([HARBOUR])
    stage = Stage(runner)
    stage.begin(0, Call(1, HARBOUR, 3 * CONTEXT))
    like = Ring.like

    def full(ring: Ring, slots: int) -> Ring:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 170 MiB.\nand so on")

    monkeypatch.setattr(Ring, "like", full)
    while runner._positions[0] < 2 * CONTEXT:
        stage.tick()
    monkeypatch.setattr(Ring, "like", like)

    assert caplog.text.count("no memory to make a call anew") == 1
    assert "Tried to allocate 170 MiB." in caplog.text
    stage.begin(1, Call(2, HARBOUR, 2 * CONTEXT))
    before = 0
    while before <= runner._positions[1]:
        before = int(runner._positions[1])
        stage.tick()
    assert made_of_its_history(runner, 1)


def test_calls_that_began_together_are_due_apart(checkpoint: Path) -> None:
    due = set()
    for seed in range(4):
        runner = tiny_runner(checkpoint, 1, seed=seed)
        runner.warm_up([])
        runner.join(0, SHORT)
        before = 0
        while before <= runner._positions[0]:
            before = int(runner._positions[0])
            runner.step(np.zeros((1, FRAME_SAMPLES), np.float32), np.array([True]))
            runner.between()
        due.add(before)

    assert len(due) == 4


def test_a_call_begins_after_the_prompts_silence_as_the_sound_decoder_does(runner: PersonaPlexRunner) -> None:
    """Fresh, the silence and then the call's codes give the very sound: no click where the call begins."""
    runner.join(1, SHORT)
    mimi, codes = runner._mimi, [torch.tensor([runner._lm.config.silence_tokens])]
    said = []
    for frame in range(8):
        agent = runner._lm_state.next_agent[1, 1:2].clone()
        active = np.array([False, True, False])
        spoken = runner.step(np.stack([sound(1, frame)] * ROWS), active)[1]
        assert spoken is not None
        said.append(spoken.pcm)
        codes.append(torch.cat((agent, runner._lm_state.next_agent[1, 2:]))[None])
    runner.leave(1)

    state, one = mimi.state(1), torch.ones(1, dtype=torch.bool)
    fresh = [mimi.decode(state, frame, one).clamp(-1, 1)[0].numpy() for frame in codes]
    assert np.allclose(np.stack(fresh[1:]), np.stack(said), atol=1e-5)


def test_the_greeting_is_said_first_word_for_word_and_reported(runner: PersonaPlexRunner) -> None:
    greeting = "Good morning, you have reached the harbour office."
    said = Stage(runner).alone(0, Call(1, replace(HARBOUR, greeting=greeting), 120))

    assert text_of(said).strip().startswith(greeting)
    reported = [index for index, frame in enumerate(said) if frame.said]
    assert [said[index].said for index in reported] == [greeting]
    assert text_of(said[: reported[0] + 1]).strip() == greeting


def test_guided_texts_are_said_one_after_the_other(runner: PersonaPlexRunner) -> None:
    runner.join(0, HARBOUR)
    texts = ["This call may be recorded.", "Please hold the line."]
    for text in texts:
        runner.say(0, text, 80)
    active = np.array([True, False, False])
    frames = [runner.step(np.zeros((ROWS, FRAME_SAMPLES), np.float32), active)[0] for _ in range(160)]
    runner.leave(0)

    said = [frame for frame in frames if frame is not None]
    assert [frame.said for frame in said if frame.said] == texts
    assert " ".join(texts) in " ".join(text_of(said).split())


def test_a_persona_that_never_got_to_speak_does_not_greet(runner: PersonaPlexRunner) -> None:
    runner.join(0, HARBOUR)
    runner.change(0, replace(CAPTAIN, greeting="This is the captain."))
    runner.change(0, replace(SHORT, greeting="Hello again."))
    frames = [
        runner.step(np.zeros((ROWS, FRAME_SAMPLES), np.float32), np.array([True, False, False]))[0] for _ in range(60)
    ]
    runner.leave(0)

    assert [frame.said for frame in frames if frame is not None and frame.said] == ["Hello again."]


def test_a_guided_text_longer_than_the_row_can_hold_is_said_in_parts(
    runner: PersonaPlexRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.personaplex.seat.CAPACITY", 5)
    text = "Please hold the line while I look that up for you."
    runner.join(0, SHORT)
    runner.say(0, text, 80)
    active = np.array([True, False, False])
    frames = [runner.step(np.zeros((ROWS, FRAME_SAMPLES), np.float32), active)[0] for _ in range(200)]
    runner.leave(0)

    said = [frame for frame in frames if frame is not None]
    assert [frame.said for frame in said if frame.said] == [text]
    assert text in text_of(said)


def test_a_turn_ends_when_words_and_sound_are_over() -> None:
    from app.engine.personaplex.model.config import PAD
    from app.engine.personaplex.seat import _QUIET_FRAMES, Seat

    class OneWord:
        def piece(self, token: int) -> str:
            return " hello" if token == 9 else ""

    seat, pcm = Seat(0, OneWord()), np.zeros(FRAME_SAMPLES, np.float32)  # type: ignore[arg-type]
    frames = [(False, PAD)] * 20 + [(True, 9)] + [(True, PAD)] * 5 + [(False, PAD)] * 20
    ends = [seat.frame(pcm, audible, token, 0).ends for audible, token in frames]

    assert ends.index(True) == 26 + _QUIET_FRAMES - 1
    assert sum(ends) == 1


def test_a_prompt_with_other_variables_reads_only_what_changed(runner: PersonaPlexRunner) -> None:
    """The prefix is the same as when all of it is read, and the kept beginning is bit for bit the old one's."""
    one = runner._prefix(replace(HARBOUR, prompt="You work for the harbour office and your name is Ada Stone."))
    other = runner._prefix(replace(HARBOUR, prompt="You work for the harbour office and your name is Bill."))
    shared = one.prompt.shared(other.prompt)

    assert 20 < shared < len(other.prompt)
    assert other.kv.first(shared).values.equal(one.kv.first(shared).values)
    fresh = tiny_runner(runner._checkpoint.folder, 1)
    fresh.warm_up([])
    whole = fresh._prefix(replace(HARBOUR, prompt="You work for the harbour office and your name is Bill."))
    assert np.allclose(whole.kv.values, other.kv.values, atol=1e-4)
    assert np.allclose(whole.hidden, other.hidden, atol=1e-4)


def test_a_prompt_that_is_kept_is_not_read_again(runner: PersonaPlexRunner) -> None:
    assert runner._prefix(HARBOUR) is runner._prefix(replace(HARBOUR, greeting="Hello."))


def test_prompts_used_long_ago_go_to_the_host_and_then_away(
    runner: PersonaPlexRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.personaplex.prefix.HOT_FRAMES", 100)
    monkeypatch.setattr("app.engine.personaplex.prefix.COLD_FRAMES", 150)
    cache = PrefixCache(runner._lm)
    voice = runner._voice(HARBOUR)
    first, *others = (runner._tokenizer.role(f"You are number {number}.") for number in range(9))
    kept = cache.of(voice, first)
    for text in others[:3]:
        cache.of(voice, text)
        cache.make_room()

    assert sum(len(prefix.prompt) for prefix in cache._hot.values()) <= 100
    assert cache.of(voice, first).kv.values.equal(kept.kv.values)
    for text in others:
        cache.of(voice, text)
        cache.make_room()
    assert sum(len(prefix.prompt) for prefix in cache._cold.values()) <= 150
    assert cache.of(voice, first) is not kept
    assert torch.allclose(cache.of(voice, first).kv.values, kept.kv.values, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_too_and_agrees_with_full(checkpoint: Path, dtype: torch.dtype) -> None:
    """Free-running words part soon in another precision; the prompt's last hidden state shows the same model."""
    half, full = tiny_runner(checkpoint, 1, dtype=dtype), tiny_runner(checkpoint, 1)
    for runner in (half, full):
        runner.warm_up([])
    said = Stage(half).alone(0, Call(1, HARBOUR, 12))

    assert all(np.isfinite(frame.pcm).all() for frame in said)
    assert half._prefix(HARBOUR).kv.values.dtype == dtype
    one, other = (runner._prefix(HARBOUR).hidden[0].float() for runner in (half, full))
    assert torch.cosine_similarity(one, other, dim=0) > 0.999


def test_a_voice_that_is_gone_stops_the_start_but_not_a_call(
    runner: PersonaPlexRunner, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A persona may be changed while the service runs; its callers are answered all the same."""
    voiceless = replace(HARBOUR, voice="NATF9")

    with pytest.raises(EngineFault, match="NATF9"):
        tiny_runner(checkpoint, 1).warm_up([voiceless])
    assert len(Stage(runner).alone(0, Call(1, voiceless, 3))) == 3
    assert "persona harbour speaks with the voice NATF2 instead" in caplog.text
    nobody_known = tiny_runner(checkpoint, 1)
    nobody_known.warm_up([])
    assert len(Stage(nobody_known).alone(0, Call(1, voiceless, 3))) == 3


def test_where_the_usual_voice_is_missing_too_a_voice_that_is_loaded_speaks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = tiny_runner(make_tiny_checkpoint(tmp_path / "checkpoint"), 1)
    (tmp_path / "checkpoint" / "voices" / "NATF2.pt").unlink()
    runner.warm_up([CAPTAIN])

    assert len(Stage(runner).alone(0, Call(1, HARBOUR, 3))) == 3
    assert "persona harbour speaks with the voice NATM1 instead" in caplog.text


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "checkpoint")
    (folder / TOKENIZER_NAME).write_bytes(tiny_tokenizer(410))

    with pytest.raises(EngineFault, match="410 tokens where the model has 400"):
        tiny_runner(folder, 1).warm_up([])


def test_a_voice_from_a_recording_speaks(checkpoint: Path) -> None:
    speech = np.concatenate([sound(9, frame) for frame in range(10)])[:-100]
    runner = PersonaPlexRunner(
        find_checkpoint(checkpoint), 1, torch.device("cpu"), torch.float32, lambda _: speech, seed=1
    )
    runner.warm_up([HARBOUR])

    said = Stage(runner).alone(0, Call(1, HARBOUR, 5))

    assert runner._prompt_frames[0] == 10 + 6 + len(runner._tokenizer.role(HARBOUR.prompt)) + 6
    assert len(said) == 5


def test_arrays_of_another_shape_are_refused(runner: PersonaPlexRunner) -> None:
    with pytest.raises(ValueError, match=r"found pcm \[2, 1920\], active \[3\]; \[3, 1920\] and \[3\] are right"):
        runner.step(np.zeros((2, FRAME_SAMPLES), np.float32), np.zeros(3, np.bool_))


def test_a_prompt_longer_than_the_window_still_carries_a_call(
    runner: PersonaPlexRunner, caplog: pytest.LogCaptureFixture
) -> None:
    role = Role("long", "The ferry leaves at seven in the morning and again at noon. " * 12)
    said = Stage(runner).alone(0, Call(1, role, 40))

    assert len(said) == 40
    assert all(np.isfinite(frame.pcm).all() for frame in said)
    assert "persona long: its prompt takes" in caplog.text

"""Recordings in, answers out: of the same length, alone or as a batch, and every fault before the work begins."""

import json
import os
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.engine import Role
from app.engine.echo import EchoRunner
from app.offline import OfflineFault, answer_recordings, converse, pair, read_speech, role_for
from app.settings import Settings
from tests.speech import FLOAT32, speech, write

ROOT = Path(__file__).resolve().parent.parent
ROLE = Role("ada", "You work for the harbour.")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def answers(tiny: Path, folder: Path, inputs: list[Path], role: Role = ROLE, **given: Any) -> list[tuple[Any, bytes]]:
    """The text and the sound that were written for each input."""
    outputs = [(folder / f"{index}.out.wav", folder / f"{index}.json") for index in range(len(inputs))]
    recordings = pair(inputs, [wav for wav, _ in outputs], [text for _, text in outputs])
    settings = Settings(personaplex_checkpoint=tiny, personaplex_device="cpu")
    answer_recordings(settings, recordings, role, **{"seed": 1, "greedy": False} | given)
    return [(json.loads(text.read_text()), sound_of(wav)) for wav, text in outputs]


def sound_of(path: Path) -> bytes:
    with wave.open(str(path)) as wav:
        assert (wav.getnchannels(), wav.getsampwidth(), wav.getframerate()) == (1, 2, 24_000)
        return bytes(wav.readframes(wav.getnframes()))


def test_the_command_writes_sound_as_long_as_the_input_and_its_words(tiny: Path, tmp_path: Path) -> None:
    """The installed command, in a process of its own."""
    write(tmp_path / "in.wav", speech(24_000, 1.234))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    words = ["offline", "--input-wav", "in.wav", "--output-wav", "out.wav", "--output-text", "out.json"]
    words += ["--text-prompt", "You work for the harbour.", "--voice-prompt", "NATM1", "--checkpoint", str(tiny)]
    words += [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--weights",
        "int8",
        "--kv",
        "int8",
        "--no-graphs",
        "--seed",
        "5",
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "app.cli", *words], env=environment, cwd=tmp_path, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("answered by tiny, float32 with int8 weights and int8 keys and values on CPU")
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(sound_of(tmp_path / "out.wav")) == 2 * len(speech(24_000, 1.234))
    assert len(written["frames"]) == 16
    assert written["text"] == "".join(written["frames"]).strip()
    assert written["frame_ms"] == 80


@pytest.mark.parametrize(("rate_hz", "length_s"), [(8_000, 0.3), (16_000, 0.16), (44_100, 0.5), (24_000, 0.08)])
def test_the_answer_is_as_long_as_the_recording_at_any_rate(
    tiny: Path, tmp_path: Path, rate_hz: int, length_s: float
) -> None:
    [(text, sound)] = answers(tiny, tmp_path, [write(tmp_path / "in.wav", speech(rate_hz, length_s), rate_hz)])

    assert len(sound) / 2 == pytest.approx(24_000 * length_s, abs=1)
    assert len(text["frames"]) == -(-len(sound) // 2 // 1_920)


def test_a_batch_of_ragged_recordings_says_what_each_alone_would(tiny: Path, tmp_path: Path) -> None:
    lengths_s = (0.5, 1.13, 0.08)
    inputs = [write(tmp_path / f"{length}.wav", speech(24_000, length)) for length in lengths_s]
    together = answers(tiny, tmp_path, inputs)

    for one, said in zip(inputs, together, strict=True):
        [(text, sound)] = answers(tiny, tmp_path, [one])
        assert said[0] == text
        assert len(said[1]) == len(sound)
        apart = np.abs(np.frombuffer(said[1], "<i2").astype(int) - np.frombuffer(sound, "<i2"))
        assert apart.max() <= 1


def test_the_seed_decides_what_is_said_and_greedy_needs_none(tiny: Path, tmp_path: Path) -> None:
    source = [write(tmp_path / "in.wav", speech(24_000))]
    first, again, other = (answers(tiny, tmp_path, source, seed=seed) for seed in (1, 1, 2))
    greedy = [answers(tiny, tmp_path, source, seed=seed, greedy=True) for seed in (1, None)]

    assert first == again
    assert first != other
    assert greedy[0] == greedy[1] != first


def test_weights_and_keys_may_be_kept_in_a_byte(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is heard a little: the answer is another one, but an answer."""
    source = [write(tmp_path / "in.wav", speech(24_000, 0.4))]
    whole = answers(tiny, tmp_path, source)
    for name in ("PERSONAPLEX_WEIGHTS", "PERSONAPLEX_KV"):
        monkeypatch.setenv(name, "int8")
    [(text, sound)] = answers(tiny, tmp_path, source)

    assert len(sound) == len(whole[0][1])
    assert len(text["frames"]) == len(whole[0][0]["frames"])
    assert sound != whole[0][1]


def test_a_voice_may_be_a_name_a_packed_file_or_a_recording(tiny: Path, tmp_path: Path) -> None:
    source = [write(tmp_path / "in.wav", speech(24_000))]
    write(tmp_path / "mine.wav", speech(16_000), 16_000)
    settings = Settings(personaplex_checkpoint=tiny)
    roles = {
        voice: role_for(settings, None, "You work for the harbour.", voice)
        for voice in ("NATF2", str(tiny / "voices" / "NATF2.pt"), "NATM1", "mine.wav")
    }
    said = {voice: answers(tiny, tmp_path, source, role) for voice, role in roles.items()}

    named, packed, other, own = said.values()
    assert named == packed
    assert named != other != own


def test_a_stereo_recording_is_mixed(tmp_path: Path) -> None:
    sides = np.stack([speech(24_000), np.zeros(24_000)], axis=1)

    mixed = read_speech(write(tmp_path / "in.wav", sides, kind=FLOAT32))

    assert np.allclose(mixed, speech(24_000) / 2, atol=1e-6)


def test_each_row_ends_with_its_recording_and_hears_only_it() -> None:
    """With an engine that says back what it hears."""
    heard = [np.full(length, level, np.float32) for length, level in ((5_000, 0.1), (1_920, 0.2), (2_000, 0.3))]
    runner = EchoRunner(3)
    runner.warm_up([])
    ticks: list[None] = []

    said = converse(runner, heard, replace(ROLE, greeting=""), lambda: ticks.append(None))

    assert [len(answer.pcm) for answer in said] == [5_000, 1_920, 2_000]
    assert [len(answer.frames) for answer in said] == [3, 1, 2]
    assert len(ticks) == 3
    for answer, pcm in zip(said, heard, strict=True):
        assert set(np.unique(answer.pcm)) <= {np.float32(0), pcm[0]}


# --- who answers


PERSONA = "name: {name}\nprompt: You work for {name}.\nvoice: NATM1\ngreeting: Hi{more}\n"


def personas(folder: Path, **more: str) -> Settings:
    folder.mkdir()
    for name, text in more.items():
        (folder / f"{name}.yaml").write_text(PERSONA.format(name=name, more=text))
    return Settings(personas_dir=folder)


def test_the_default_persona_answers_unless_one_is_named(tmp_path: Path) -> None:
    settings = personas(tmp_path / "personas", ark="\ndefault: true", zoo="")

    assert role_for(settings, None, None, None).name == "ark"
    assert role_for(settings, "zoo", None, None) == Role("zoo", "You work for zoo.", "Hi", "NATM1")


def test_prompts_stand_in_place_of_a_persona(tmp_path: Path) -> None:
    settings = Settings(personas_dir=tmp_path / "absent")

    assert role_for(settings, None, "You are kind.", None) == Role("offline", "You are kind.")
    assert role_for(settings, None, None, "VARM3") == Role("offline", "", voice="VARM3")
    assert role_for(settings, None, "x", "a/b.pt").voice == str(tmp_path / "a" / "b.pt")


def test_what_does_not_fit_together_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = personas(tmp_path / "personas", ark=" {{{{guest}}}}\nvariables: {{guest: null}}".format())
    a, b, c = tmp_path / "a.wav", tmp_path / "b.wav", tmp_path / "c.json"

    for said, asked in {
        "found --persona beside a prompt": lambda: role_for(settings, "ark", "x", None),
        "--persona: found 'zoo'; one of ark is right": lambda: role_for(settings, "zoo", None, None),
        "variables of persona ark: missing: guest": lambda: role_for(settings, "ark", None, None),
        "found 2 --input-wav, 1 --output-wav and 1 --output-text": lambda: pair([a, b], [b], [c]),
        f"{b}: named twice": lambda: pair([a], [b], [b]),
        f"{a}: named twice": lambda: pair([a], [a], [c]),
        f"{tmp_path}: found no place for a file": lambda: pair([a], [tmp_path], [c]),
        "/b.wav: found no place for a file": lambda: pair([a], [tmp_path / "absent" / "b.wav"], [c]),
    }.items():
        with pytest.raises(OfflineFault) as caught:
            asked()  # type: ignore[no-untyped-call]
        assert said in str(caught.value)

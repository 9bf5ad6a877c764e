"""Recordings answered by PersonaPlex as calls would be, as fast as the machine goes: `personaline offline`."""

import json
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soxr
from rich.console import Console
from rich.progress import Progress

from app.calls import role_of
from app.engine import FRAME_MS, FRAME_SAMPLES, SAMPLE_RATE_HZ, Role, Runner
from app.engine.contract import Pcm
from app.engine_choice import Plan, log_kinds, make_personaplex, plan_personaplex, voices_of
from app.personas import WrongVariables, load_personas
from app.settings import Settings
from app.wav import read_channels

if TYPE_CHECKING:
    from app.engine.personaplex.runner import VoiceSource


class OfflineFault(Exception):
    """What was asked for cannot be done. One line: what was found and what is right."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What one caller says, and where the answer goes: a wav of the same length, and its words as JSON."""

    input_wav: Path
    output_wav: Path
    output_text: Path


@dataclass(frozen=True, slots=True)
class Answer:
    """What the agent said to one recording: sound as long as the recording, and the text of each frame."""

    pcm: Pcm
    frames: list[str]


def pair(inputs: Sequence[Path], wavs: Sequence[Path], texts: Sequence[Path]) -> list[Recording]:
    """One output of each kind for every input, in order.

    Raises OfflineFault, also for outputs that could not be written in the end.
    """
    if not len(inputs) == len(wavs) == len(texts):
        found = f"{len(inputs)} --input-wav, {len(wavs)} --output-wav and {len(texts)} --output-text"
        raise OfflineFault(f"found {found}; one output of each kind for every input is right")
    outputs = [*wavs, *texts]
    for path in outputs:
        if path.is_dir() or not path.parent.is_dir():
            raise OfflineFault(f"{path}: found no place for a file; a name in a folder that exists is right")
        if outputs.count(path) > 1 or path in inputs:
            raise OfflineFault(f"{path}: named twice; each file by a name of its own is right")
    return [Recording(*paths) for paths in zip(inputs, wavs, texts, strict=True)]


def role_for(settings: Settings, persona: str | None, text_prompt: str | None, voice_prompt: str | None) -> Role:
    """The role of a persona, the default one if none is named, or one made of the two prompts.

    Raises OfflineFault, PersonaFaults.
    """
    if text_prompt is not None or voice_prompt is not None:
        if persona is not None:
            raise OfflineFault("found --persona beside a prompt; either --persona or --text-prompt and --voice-prompt")
        role = Role("offline", text_prompt or "")
        return role if voice_prompt is None else replace(role, voice=_place_of(voice_prompt))
    personas = load_personas(settings.personas_dir)
    chosen = personas.default if persona is None else personas.by_name.get(persona)
    if chosen is None:
        raise OfflineFault(f"--persona: found {persona!r}; one of {', '.join(personas.by_name)} is right")
    try:
        return role_of(chosen)
    except WrongVariables as fault:
        raise OfflineFault(f"{fault}; a persona whose variables have defaults is right here") from fault


def _place_of(voice: str) -> str:
    """A file's whole path, so that it is not looked for among the personas; a voice's name as it is."""
    return str(Path(voice).absolute()) if voice.endswith((".pt", ".wav")) else voice


def answer_recordings(
    settings: Settings, recordings: Sequence[Recording], role: Role, seed: int | None, greedy: bool
) -> Plan:
    """Answer all recordings as one batch, a row each, and write what was said. Tells how it ran.

    Raises:
        WavFault, VoiceFault, EngineFault, OfflineFault.
    """
    if greedy:
        role = replace(role, text_temperature=0.0, audio_temperature=0.0)
    heard = [read_speech(recording.input_wav) for recording in recordings]
    plan = plan_personaplex(settings.model_copy(update={"rows": len(recordings)}))
    log_kinds(settings, plan)
    runner = _make_runner(settings, plan, seed)
    try:
        runner.warm_up([role])
        with _bar(heard) as progress:
            answers = converse(runner, heard, role, progress)
    finally:
        runner.close()
    for recording, answer in zip(recordings, answers, strict=True):
        _write(recording, answer)
    return plan


def read_speech(path: Path) -> Pcm:
    """A recording as the model hears it: float32 [T] at 24 kHz in [-1, 1], its channels mixed. Raises WavFault."""
    samples, rate_hz = read_channels(path)
    pcm: Pcm = soxr.resample(samples.mean(axis=1, dtype=np.float32), rate_hz, SAMPLE_RATE_HZ)
    return pcm.clip(-1, 1)


def converse(runner: Runner, heard: Sequence[Pcm], role: Role, progress: Callable[[], object]) -> list[Answer]:
    """One call a row of a warm runner, each as long as its recording: a row that has ended rests while others go on.

    `progress` is called after each tick.
    """
    frames = [-(-len(pcm) // FRAME_SAMPLES) for pcm in heard]
    said = [np.zeros((count, FRAME_SAMPLES), np.float32) for count in frames]
    texts: list[list[str]] = [[] for _ in heard]
    for row in range(len(heard)):
        runner.join(row, role)
    for tick in range(max(frames)):
        active = np.array([tick < count for count in frames])
        for row, spoken in enumerate(runner.step(_tick_of(heard, tick), active)):
            if spoken is not None:
                said[row][tick] = spoken.pcm
                texts[row].append(spoken.text)
            if tick + 1 == frames[row]:
                runner.leave(row)
        runner.between()
        progress()
    return [Answer(said[row].reshape(-1)[: len(pcm)], texts[row]) for row, pcm in enumerate(heard)]


def _tick_of(heard: Sequence[Pcm], tick: int) -> Pcm:
    """Frame `tick` of every recording, [S, 1920]; silence fills up what has ended."""
    frame = np.zeros((len(heard), FRAME_SAMPLES), np.float32)
    for row, pcm in enumerate(heard):
        part = pcm[tick * FRAME_SAMPLES : (tick + 1) * FRAME_SAMPLES]
        frame[row, : len(part)] = part
    return frame


def _make_runner(settings: Settings, plan: Plan, seed: int | None) -> Runner:
    named = voices_of(plan.checkpoint, settings.personas_dir)

    def voice(name: str) -> "VoiceSource":
        return Path(name) if name.endswith(".pt") else named(name)

    return make_personaplex(plan, voice, settings.personaplex_window, seed)


@contextmanager
def _bar(heard: Sequence[Pcm]) -> Iterator[Callable[[], object]]:
    """A progress bar on a terminal, else nothing."""
    console = Console(stderr=True)
    ticks = -(-max(map(len, heard)) // FRAME_SAMPLES)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("speaking", total=ticks)
        yield lambda: bar.advance(task)


def _write(recording: Recording, answer: Answer) -> None:
    text = {"text": "".join(answer.frames).strip(), "frame_ms": FRAME_MS, "frames": answer.frames}
    samples = np.round(answer.pcm.clip(-1, 1) * 32_767).astype("<i2")
    try:
        with wave.open(str(recording.output_wav), "wb") as wav:
            wav.setnchannels(1)
            wav.setsampwidth(2)
            wav.setframerate(SAMPLE_RATE_HZ)
            wav.writeframes(samples.tobytes())
        recording.output_text.write_text(json.dumps(text, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OfflineFault(f"{error.filename or recording.output_wav}: cannot be written: {error.strerror}") from error

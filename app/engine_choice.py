"""Which engine answers, and how its runner is made: ENGINE, what is installed, and what the machine can carry."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.engine import EngineFault, Runner
from app.engine.echo import EchoRunner
from app.machine import Device, dtype_for, find_device, require_packages
from app.model_files import llm_path
from app.settings import Settings

if TYPE_CHECKING:
    from app.engine.personaplex.model.weights import Checkpoint
    from app.engine.personaplex.runner import VoiceSource

ECHO_ROWS = 200
MOST_ROWS = 64
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_log = logging.getLogger("personaline")

Choice = tuple[str, Callable[[], Runner]]
"""The engine's name, and how to make its runner."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How PersonaPlex would run on this machine."""

    checkpoint: "Checkpoint"
    device: Device
    dtype: str
    rows: int

    def __str__(self) -> str:
        calls = f"{self.rows} call{'s' * (self.rows > 1)} at once"
        return f"{self.checkpoint.folder.name}, {self.dtype} on {self.device}, {calls}"


def choose_engine(settings: Settings) -> Choice:
    """What ENGINE names. `auto` takes PersonaPlex where its weights and a device for them are, else the cascade.

    One line of the log says which, and why. torch is imported only if PersonaPlex's weights are there.

    Raises ModelFileFault or EngineFault when what it needs is not there; the message says how to get it.
    """
    if settings.engine == "echo":
        return "echo", lambda: EchoRunner(settings.rows or ECHO_ROWS)
    if settings.engine == "cascade":
        return _cascade(settings)
    try:
        plan = plan_personaplex(settings)
    except EngineFault as fault:
        if settings.engine == "personaplex":
            raise
        _log.info("ENGINE=auto takes the cascade: %s", fault)
        return _cascade(settings)
    _log.info("ENGINE=%s takes PersonaPlex: %s", settings.engine, plan)
    return _personaplex(settings, plan)


def checkpoint_folder(settings: Settings) -> Path:
    """PERSONAPLEX_CHECKPOINT, else where `personaline download` puts it."""
    from app.weights_hub import cached_folder

    given = settings.personaplex_checkpoint
    return given.expanduser() if given else cached_folder()


def find_weights(settings: Settings) -> "Checkpoint":
    """Raises EngineFault for files that are missing, with the remedy."""
    from app.engine.personaplex.model.weights import find_checkpoint

    folder = checkpoint_folder(settings)
    if not folder.exists() and settings.personaplex_checkpoint is None:
        raise EngineFault(
            f"PersonaPlex's weights are not in {folder}: fetch them with personaline download, or name their folder "
            f"in PERSONAPLEX_CHECKPOINT"
        )
    try:
        return find_checkpoint(folder)
    except EngineFault as fault:
        raise EngineFault(f"{fault} (personaline download)") from fault


def plan_personaplex(settings: Settings) -> Plan:
    """Find the weights, a device and room for them.

    Raises:
        EngineFault: what is missing, and the remedy.
    """
    from app.engine.personaplex.sizes import footprint, rows_that_fit

    checkpoint = find_weights(settings)
    require_packages()
    weights_bytes = footprint(checkpoint.lm, checkpoint.mimi_config, ELEMENT_BYTES["bfloat16"]).weights_bytes
    device = find_device(settings.personaplex_device, weights_bytes)
    dtype = dtype_for(settings.personaplex_dtype, device.kind)
    needs = footprint(checkpoint.lm, checkpoint.mimi_config, ELEMENT_BYTES[dtype])
    fitting = rows_that_fit(needs, device.free_bytes)
    rows = rows_for(settings, device, fitting)
    if fitting < rows:
        remedy = f"ROWS={fitting} is the most" if fitting else "see what would fit with: personaline doctor"
        found = f"{needs.needed_bytes(rows) / 1e9:.1f} GB for {rows} call{'s' * (rows > 1)} in {dtype}"
        raise EngineFault(f"PersonaPlex needs {found}, and there is {device}: {remedy}")
    return Plan(checkpoint, device, dtype, rows)


def rows_for(settings: Settings, device: Device, fitting: int) -> int:
    """ROWS, else as many as fit on an NVIDIA GPU, up to 64; one elsewhere. At least one, fitting or not."""
    return settings.rows or (max(1, min(MOST_ROWS, fitting)) if device.kind == "cuda" else 1)


def voices_of(checkpoint: "Checkpoint", own: Path) -> "Callable[[str], VoiceSource]":
    """From a persona's voice to where its sound is: one of the checkpoint's voices, or a wav file in the folder `own`.

    What is returned raises EngineFault for a voice that is not there or is none.
    """

    def find(name: str) -> "VoiceSource":
        if name.endswith(".wav"):
            from app.voice_wav import read_voice

            return read_voice(own / name)
        from app.engine.personaplex.voices import unpack_voices, voice_file

        packed = checkpoint.voices
        return voice_file(packed if packed.is_dir() else unpack_voices(packed, checkpoint.folder / "voices"), name)

    return find


def _personaplex(settings: Settings, plan: Plan) -> Choice:
    def make() -> Runner:
        import torch

        from app.engine.personaplex.runner import PersonaPlexRunner

        voice = voices_of(plan.checkpoint, settings.personas_dir)
        return PersonaPlexRunner(
            plan.checkpoint, plan.rows, torch.device(plan.device.kind), getattr(torch, plan.dtype), voice,
            settings.personaplex_window,
        )  # fmt: skip

    return "personaplex", make


def _cascade(settings: Settings) -> Choice:
    from app.engine.cascade.parts import Parts, require_packages

    require_packages()
    parts = Parts(llm_path(settings.cascade_llm), settings.cascade_asr, settings.cascade_tts, settings.cascade_vad)

    def make() -> Runner:
        from app.engine.cascade.runner import CascadeRunner

        return CascadeRunner(parts, settings.rows)

    return "cascade", make

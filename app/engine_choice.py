"""Which engine answers, and how its runner is made: ENGINE, what is installed, and what the machine can carry."""

import logging
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from app import __version__
from app.engine import EngineFault, Runner
from app.engine.echo import EchoRunner
from app.machine import (
    Device,
    dtype_for,
    find_device,
    may_be_gpu,
    require_installed,
    require_kinds,
    require_packages,
)
from app.model_files import llm_path, models_folder
from app.settings import Settings

if TYPE_CHECKING:
    from app.engine.cascade.parts import Parts
    from app.engine.personaplex.model.config import LmConfig, MimiConfig
    from app.engine.personaplex.model.quantize import Weights
    from app.engine.personaplex.model.ring import Kv
    from app.engine.personaplex.model.weights import Checkpoint
    from app.engine.personaplex.runner import VoiceSource, Window
    from app.engine.personaplex.sizes import Footprint

ECHO_ROWS = 200
MOST_ROWS = 256
ENOUGH_ROWS = 4
"""Calls that a GPU should carry before "auto" quantises anything to make room for more."""
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_KINDS: "tuple[tuple[Weights, Kv], ...]" = (("bf16", "bf16"), ("int8", "bf16"), ("bf16", "int8"), ("int8", "int8"))
"""Of weights and of keys and values, in the order in which "auto" takes them."""
_LAST_RESORT = (
    "int4 weights are a last resort: a published int4 of this model comes to a cosine of 0.877 with the whole one, "
    "its int8 to 0.998; personaline bench quality compares them here"
)

_log = logging.getLogger("personaline")


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine's name, how to make its runner, and how many calls that is planned for: it may find it carries fewer.

    `own_process`: the runner shall run in a process of its own. `make` can then be pickled.
    """

    name: str
    make: Callable[[], Runner]
    own_process: bool
    rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How PersonaPlex would run on this machine. `measured`: as in PersonaPlexRunner."""

    checkpoint: "Checkpoint"
    device: Device
    dtype: str
    rows: int
    weights: "Weights" = "bf16"
    kv: "Kv" = "bf16"
    graphs: bool = True
    measured: Path | None = None

    def __str__(self) -> str:
        calls = f"{'up to ' if self.measured else ''}{self.rows} call{'s' * (self.rows > 1)} at once"
        return (
            f"{self.checkpoint.folder.name}, {described(self.dtype, self.weights, self.kv)} on {self.device}, {calls}"
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """How many calls fit with these kinds of weights and of keys and values."""

    weights: "Weights"
    kv: "Kv"
    needs: "Footprint"
    calls: int


def choose_engine(settings: Settings) -> Choice:
    """What ENGINE names. `auto` takes PersonaPlex where its weights and a device for them are, else the cascade.

    One line of the log says which, and why. This process imports no torch to choose PersonaPlex for a GPU, and holds
    no memory of one.

    Raises ModelFileFault or EngineFault when what it needs is not there; the message says how to get it.
    """
    if settings.engine == "echo":
        rows = settings.rows or ECHO_ROWS
        return Choice("echo", partial(EchoRunner, rows), False, rows)
    if settings.engine == "cascade":
        return _cascade(settings)
    try:
        plan = plan_apart(settings)
    except EngineFault as fault:
        if settings.engine == "personaplex":
            raise
        _log.info("ENGINE=auto takes the cascade: %s", fault)
        return _cascade(settings)
    _log.info("ENGINE=%s takes PersonaPlex: %s", settings.engine, plan)
    log_kinds(settings, plan)
    voice = voices_of(plan.checkpoint, settings.personas_dir)
    return Choice("personaplex", partial(make_personaplex, plan, voice, settings.personaplex_window), True, plan.rows)


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


def plan_apart(settings: Settings) -> Plan:
    """As `plan_personaplex`, but a GPU is asked by a process that ends with its answer.

    Asking makes a context on the GPU, half a gigabyte of it, which only the end of the process gives back.

    Raises EngineFault.
    """
    find_weights(settings)
    require_installed()
    if not may_be_gpu(settings.personaplex_device):
        return plan_personaplex(settings)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        try:
            return apart.submit(plan_personaplex, settings).result()
        except BrokenProcessPool as error:
            raise EngineFault("the process that asked for a GPU broke off: see what personaline doctor says") from error


def plan_personaplex(settings: Settings) -> Plan:
    """Find the weights, a device and room for them.

    Raises:
        EngineFault: what is missing, and the remedy.
    """
    from app.engine.personaplex.sizes import lm_bytes

    checkpoint = find_weights(settings)
    require_packages()
    device = find_device(settings.personaplex_device, lm_bytes(checkpoint.lm, ELEMENT_BYTES["bfloat16"]))
    dtype = dtype_for(settings.personaplex_dtype, device.kind)
    fit = best_fit(settings, checkpoint.lm, checkpoint.mimi_config, device, dtype)
    require_kinds(device, fit.weights, fit.kv)
    rows = rows_for(settings, device, fit.calls)
    if fit.calls < rows:
        found = f"{fit.needs.needed_bytes(rows) / 1e9:.1f} GB for {rows} call{'s' * (rows > 1)}"
        found += f" in {described(dtype, fit.weights, fit.kv)}"
        remedy = remedy_for(fit, checkpoint.lm, checkpoint.mimi_config, device, dtype)
        raise EngineFault(f"PersonaPlex needs {found}, and there is {device}: {remedy}")
    timed = settings.rows is None and device.kind == "cuda"
    measured = models_folder() / f"ticks-{__version__}.json" if timed else None
    return Plan(checkpoint, device, dtype, rows, fit.weights, fit.kv, settings.personaplex_graphs, measured)


def best_fit(settings: Settings, lm: "LmConfig", mimi: "MimiConfig", device: Device, dtype: str) -> Fit:
    """How weights, and keys and values, are kept: as they were asked for; "auto" quantises as little as it can.

    That is, on an NVIDIA GPU, so little that ROWS calls fit, or 4. If they never do, so that the most calls fit.
    Weights go before keys and values, because int8's quality is known of them only; it is proven of neither here.
    """
    order = _KINDS if device.kind == "cuda" else _KINDS[:1]
    kinds = dict.fromkeys(
        (
            weights if settings.personaplex_weights == "auto" else settings.personaplex_weights,
            kv if settings.personaplex_kv == "auto" else settings.personaplex_kv,
        )
        for weights, kv in order
    )
    fits = [fit_of(lm, mimi, device, dtype, weights, kv) for weights, kv in kinds]
    most = max(fits, key=lambda fit: (fit.calls, -fit.needs.needed_bytes(1)))
    return next((fit for fit in fits if fit.calls >= _wanted(settings, device)), most)


def fit_of(lm: "LmConfig", mimi: "MimiConfig", device: Device, dtype: str, weights: "Weights", kv: "Kv") -> Fit:
    from app.engine.personaplex.sizes import footprint, rows_that_fit

    needs = footprint(lm, mimi, ELEMENT_BYTES[dtype], weights, kv)
    return Fit(weights, kv, needs, rows_that_fit(needs, device.free_bytes))


def remedy_for(fit: Fit, lm: "LmConfig", mimi: "MimiConfig", device: Device, dtype: str) -> str:
    """What would make room where not as many calls fit as were asked for."""
    if fit.calls:
        return f"ROWS={fit.calls} is the most"
    kinds: tuple[tuple[Weights, str], ...] = (("int8", ""), ("int4", ", as a last resort"))
    for weights, note in kinds if device.kind == "cuda" else ():
        if calls := fit_of(lm, mimi, device, dtype, weights, "int8").calls:
            return f"PERSONAPLEX_WEIGHTS={weights} and PERSONAPLEX_KV=int8 make room for {calls}{note}"
    return "see what would fit with: personaline doctor"


def rows_for(settings: Settings, device: Device, fitting: int) -> int:
    """ROWS, else as many as fit on an NVIDIA GPU, up to 256; one elsewhere. At least one, fitting or not."""
    return settings.rows or (max(1, min(MOST_ROWS, fitting)) if device.kind == "cuda" else 1)


def described(dtype: str, weights: str, kv: str) -> str:
    """Such as "bfloat16 with int8 weights and int8 keys and values"."""
    kept = [f"{weights} weights"] * (weights != "bf16") + [f"{kv} keys and values"] * (kv != "bf16")
    return f"{dtype} with {' and '.join(kept)}" if kept else dtype


def log_kinds(settings: Settings, plan: Plan) -> None:
    """Say what was quantised unasked, and what may be heard of it."""
    asked = (settings.personaplex_weights, settings.personaplex_kv)
    if any(ours == "auto" and kind != "bf16" for ours, kind in zip(asked, (plan.weights, plan.kv), strict=True)):
        otherwise = f"fewer than {_wanted(settings, plan.device)} calls fit otherwise"
        keep = "PERSONAPLEX_WEIGHTS=bf16 and PERSONAPLEX_KV=bf16 keep all as it is"
        _log.info("%s: %s; %s", described(plan.dtype, plan.weights, plan.kv), otherwise, keep)
    if plan.weights == "int4":
        _log.warning(_LAST_RESORT)


def _wanted(settings: Settings, device: Device) -> int:
    """Calls that there shall be room for, if they fit at all."""
    return settings.rows or (ENOUGH_ROWS if device.kind == "cuda" else 1)


def voices_of(checkpoint: "Checkpoint", own: Path) -> "Callable[[str], VoiceSource]":
    """From a persona's voice to where its sound is: one of the checkpoint's voices, or a wav file in the folder `own`.

    What is returned raises EngineFault for a voice that is not there or is none. It can be pickled.
    """
    return partial(_find_voice, checkpoint, own)


def _find_voice(checkpoint: "Checkpoint", own: Path, name: str) -> "VoiceSource":
    if name.endswith(".wav"):
        from app.voice_wav import read_voice

        return read_voice(own / name)
    from app.engine.personaplex.voices import unpack_voices, voice_file

    packed = checkpoint.voices
    return voice_file(packed if packed.is_dir() else unpack_voices(packed, checkpoint.folder / "voices"), name)


def make_personaplex(
    plan: Plan, voice: "Callable[[str], VoiceSource]", window: "Window", seed: int | None = None
) -> Runner:
    """A runner as planned; nothing is loaded yet. `seed`: as in PersonaPlexRunner."""
    import torch

    from app.engine.personaplex.runner import PersonaPlexRunner

    return PersonaPlexRunner(
        plan.checkpoint, plan.rows, torch.device(plan.device.kind), getattr(torch, plan.dtype), voice, window, seed,
        plan.weights, plan.kv, plan.graphs, plan.measured,
    )  # fmt: skip


def _cascade(settings: Settings) -> Choice:
    from app.engine.cascade.parts import Parts, require_packages, rows_for_this_machine

    require_packages()
    parts = Parts(llm_path(settings.cascade_llm), settings.cascade_asr, settings.cascade_tts, settings.cascade_vad)
    rows = settings.rows or rows_for_this_machine()
    return Choice("cascade", partial(_make_cascade, parts, rows), False, rows)


def _make_cascade(parts: "Parts", rows: int) -> Runner:
    from app.engine.cascade.runner import CascadeRunner

    return CascadeRunner(parts, rows)

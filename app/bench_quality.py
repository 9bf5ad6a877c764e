"""`personaline bench quality`: which call is made, with which model; what it shows is in the engine's `quality`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from app.engine import EngineFault
from app.engine_choice import find_weights, voices_of
from app.machine import dtype_for, find_device, require_packages
from app.offline import read_speech, role_for
from app.settings import Settings


def measure(
    settings: Settings,
    persona: str | None,
    wav: Path | None,
    frames: int,
    weights: str,
    kv: str,
    json_file: Path | None,
    progress: Callable[[str, int, int], object],
) -> list[str]:
    """The figures as lines of Markdown; `weights` and `kv` such as "int8,fp8", empty for none of them.

    Raises:
        EngineFault, PersonaFaults, OfflineFault, WavFault.
    """
    checkpoint = find_weights(settings)
    require_packages()
    import torch

    from app.engine.personaplex.bench import quality
    from app.engine.personaplex.bench.run import write
    from app.engine.personaplex.model.quantize import Weights
    from app.engine.personaplex.model.ring import Kv
    from app.engine.personaplex.sizes import footprint

    kinds = quality.kinds_to_compare(_kinds("--weights", weights, get_args(Weights)), _kinds("--kv", kv, get_args(Kv)))
    pcm = read_speech(wav) if wav is not None else None
    role = role_for(settings, persona, None, None)
    weights_bytes = footprint(checkpoint.lm, checkpoint.mimi_config, torch.bfloat16.itemsize).weights_bytes
    device = find_device(settings.personaplex_device, weights_bytes)
    dtype = getattr(torch, dtype_for(settings.personaplex_dtype, device.kind))
    listening = quality.Listening(
        checkpoint, role, voices_of(checkpoint, settings.personas_dir), frames, pcm, *([wav.name] if wav else [])
    )
    found = quality.compare(listening, kinds, torch.device(device.kind), dtype, progress)
    if json_file is not None:
        write(json_file, quality.as_json(found))
    return quality.as_lines(found)


def _kinds(name: str, text: str, right: tuple[Any, ...]) -> list[Any]:
    given = [part for part in text.split(",") if part]
    if not set(given) <= set(right):
        raise EngineFault(f"{name}: found {text!r}; some of {', '.join(right)} are right")
    return given

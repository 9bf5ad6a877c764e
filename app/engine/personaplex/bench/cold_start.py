"""From nothing to ready: a process of its own loads the model as the service does, and is watched from outside."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from app.engine.contract import EngineFault, Role
from app.engine.personaplex.bench.memory import anonymous_bytes, cap_memory
from app.engine.personaplex.model.quantize import Weights
from app.engine.personaplex.model.ring import Kv
from app.engine.personaplex.model.weights import Checkpoint, find_checkpoint
from app.engine.personaplex.runner import PersonaPlexRunner
from app.engine.personaplex.voices import unpack_voices, voice_file, voice_names

_SAMPLED_EVERY_S = 0.02
_USERS_FAULT = 2


@dataclass(frozen=True)
class Load:
    """What is loaded, and how; `cap_bytes` is as of `cap_memory`."""

    checkpoint: str
    rows: int
    device: str
    dtype: str
    weights: Weights
    kv: Kv
    graphs: bool
    cap_bytes: float | None


@dataclass(frozen=True, slots=True)
class ColdStart:
    """`seconds` from the start of the process to ready; `host_bytes` its memory at the peak, without files' pages:
    None on a system that does not tell.
    """

    seconds: float
    host_bytes: int | None


def cold_start(load: Load) -> ColdStart:
    """Start, load, capture, read one prompt, end. The page cache is left as it is found.

    Raises EngineFault with what the other process said.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(load))]
    began_s, peak_bytes = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while True:
            try:
                said, faults = process.communicate(timeout=_SAMPLED_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                peak_bytes = max(peak_bytes, anonymous_bytes(process.pid) or 0)
    if process.returncode != 0:
        reason = faults.strip().splitlines()[-1:] or [f"it ended with {process.returncode}"]
        raise EngineFault(f"loading {load.checkpoint}: {reason[0]}")
    return ColdStart(float(said) - began_s, peak_bytes or None)


def _load(load: Load) -> None:
    device = torch.device(load.device)
    if load.cap_bytes is not None:
        cap_memory(device, load.cap_bytes)
    checkpoint = find_checkpoint(Path(load.checkpoint))
    voice, names = _voices(checkpoint)
    runner = PersonaPlexRunner(
        checkpoint, load.rows, device, getattr(torch, load.dtype), voice,
        weights=load.weights, kv=load.kv, graphs=load.graphs,
    )  # fmt: skip
    runner.warm_up([Role("bench", "You are a helpful assistant.", voice=names[0])])


def _voices(checkpoint: Checkpoint) -> tuple[Callable[[str], Path], list[str]]:
    packed = checkpoint.voices
    folder = packed if packed.is_dir() else unpack_voices(packed, checkpoint.folder / "voices")
    return lambda name: voice_file(folder, name), voice_names(folder)


if __name__ == "__main__":
    try:
        _load(Load(**json.loads(sys.argv[1])))
    except EngineFault as fault:
        sys.stderr.write(f"{fault}\n")
        raise SystemExit(_USERS_FAULT) from None
    # The clock is the same for every process of a system.
    sys.stdout.write(f"{time.monotonic()}\n")

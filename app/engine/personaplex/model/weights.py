"""A checkpoint's files: where they are, and their tensors streamed one by one to where they belong."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.engine.contract import EngineFault
from app.engine.personaplex.model.config import LmConfig, MimiConfig, read_configs

# A machine without torch can still be told which files are missing.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from app.engine.personaplex.model.entries import Entry

MODEL_NAME = "model.safetensors"
MIMI_NAME = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER_NAME = "tokenizer_spm_32k_3.model"
CONFIG_NAME = "config.json"
VOICES_NAME, VOICES_ARCHIVE_NAME = "voices", "voices.tgz"

_PART_BYTES = 64 * 2**20
"""Of a tensor at once. Twice that is pinned while a GPU is loaded."""
_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model, all of them there. `voices` is the folder of voices, or the archive not yet unpacked."""

    folder: Path
    model: Path
    mimi: Path
    tokenizer: Path
    voices: Path
    lm: LmConfig
    mimi_config: MimiConfig


def find_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, under NVIDIA's file names or those that its `config.json` gives.

    Raises:
        EngineFault: files that are missing, all of them named, or a `config.json` that cannot be used.
    """
    if not folder.is_dir():
        raise EngineFault(f"{folder}: no such folder; download the model, or name the folder that holds {MODEL_NAME}")
    lm, mimi_config = read_configs(folder / CONFIG_NAME)
    names = _names(folder / CONFIG_NAME)
    model = folder / names.get("moshi_name", MODEL_NAME)
    mimi = folder / names.get("mimi_name", MIMI_NAME)
    tokenizer = folder / names.get("tokenizer_name", TOKENIZER_NAME)
    voices = _voices(folder)
    missing = [file.name for file in (model, mimi, tokenizer) if not file.is_file()]
    if voices is None:
        missing.append(f"{VOICES_ARCHIVE_NAME} (or a folder {VOICES_NAME} with .pt files)")
    if voices is None or missing:
        raise EngineFault(f"{folder}: missing: {', '.join(missing)}; download the model again to complete it")
    return Checkpoint(folder, model, mimi, tokenizer, voices, lm, mimi_config)


def load(file: Path, entries: "Mapping[str, Entry]") -> None:
    """Copy the tensors of a safetensors file to where `entries` wants them.

    Nothing is left beside the file: `quantize.load_model` keeps what was quantised for the next start.

    Raises:
        EngineFault: the file cannot be read, or has keys, shapes or types other than `entries`. All of them are
            named, and nothing has been copied yet.
    """
    check(file, entries)
    stream(file, entries)


def stream(file: Path, entries: "Mapping[str, Entry]", done: Callable[[str], object] = lambda key: None) -> None:
    """Copy tensors of a file that has them, one at a time and only the rows wanted. `done` hears of each that is there.

    The file is mapped anew for each tensor, so that this process never holds more of it than one, and copied in parts:
    what is cast or quantised needs room for one part beside it. A part goes to a GPU through pinned memory, which it
    reads without a detour while the next part is being fetched.

    Raises:
        EngineFault: the file cannot be read.
    """
    staging: _Staging | None = None
    for key, entry in entries.items():
        if entry.into is None:
            continue
        if staging is None and entry.into.device.type == "cuda":
            staging = _Staging(entry.into.device)
        with opened(file) as tensors:
            wanted = tensors.get_slice(key)[: entry.rows].reshape(entry.into.shape)
            for rows in parts(wanted):
                entry.into[rows].copy_(wanted[rows] if staging is None else staging.send(wanted[rows]))
        done(key)


def parts(tensor: "Tensor") -> Iterator[slice]:
    """What to copy of a tensor at once: some of axis 0."""
    step = max(1, _PART_BYTES * len(tensor) // max(1, tensor.nbytes))
    return (slice(first, first + step) for first in range(0, len(tensor), step))


class _Staging:
    """Two places in pinned host memory, filled in turn: while a GPU reads one, the other is filled."""

    def __init__(self, device: "torch.device") -> None:
        import torch

        self._device = device
        self._places = [torch.empty(_PART_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._read = [torch.cuda.Event() for _ in range(2)]

    def send(self, part: "Tensor") -> "Tensor":
        """A copy on the device, for what the current stream does next. Its host memory may go at once."""
        import torch

        if part.nbytes > _PART_BYTES:
            return part.to(self._device)
        place, read = self._places[0], self._read[0]
        self._places.reverse()
        self._read.reverse()
        read.synchronize()
        held = place[: part.nbytes].view(part.dtype).view(part.shape)
        held.copy_(part)
        sent = held.to(self._device, non_blocking=True)
        read.record(torch.cuda.current_stream(self._device))
        return sent


def check(file: Path, entries: "Mapping[str, Entry]") -> None:
    """Raises EngineFault as `load` does; nothing but the file's header is read."""
    with opened(file) as tensors:
        found = {key: described(tensors, key) for key in tensors.keys()}  # noqa: SIM118 - no mapping, it has only keys()
    faults = [line for key in found.keys() | entries.keys() if (line := _fault(key, found.get(key), entries.get(key)))]
    if faults:
        raise EngineFault(
            f"{file}: its tensors are not those of this model, so nothing of it was loaded; download it again, or put "
            f"the {CONFIG_NAME} that belongs to it beside it:\n" + "\n".join(sorted(faults))
        )


def described(tensors: Any, key: str) -> tuple[str, tuple[int, ...]]:
    """A tensor's type, in the words of the format, and its shape."""
    part = tensors.get_slice(key)
    return part.get_dtype(), tuple(part.get_shape())


def _fault(key: str, found: tuple[str, tuple[int, ...]] | None, entry: "Entry | None") -> str | None:
    if found is None:
        return f"{key}: found nothing; right is {_shown(entry.shape)}" if entry else None
    kind, shape = found
    if entry is None:
        return f"{key}: found {kind} {_shown(shape)}; right is no such key"
    # Of what is never read only the shape matters.
    if shape == entry.shape and (kind in _FLOATS or entry.into is None):
        return None
    return f"{key}: found {kind} {_shown(shape)}; right is {_shown(entry.shape)} of {', '.join(_FLOATS)}"


def _shown(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped. Raises EngineFault."""
    from safetensors import SafetensorError, safe_open

    try:
        found = safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise EngineFault(f"{file}: no such file; download it") from error
    except (OSError, SafetensorError) as error:
        raise EngineFault(f"{file}: cut short or no safetensors file ({error}); download it again") from error
    with found as tensors:
        yield tensors


def _voices(folder: Path) -> Path | None:
    unpacked, archive = folder / VOICES_NAME, folder / VOICES_ARCHIVE_NAME
    if any(unpacked.glob("*.pt")):
        return unpacked
    return archive if archive.is_file() else None


def _names(file: Path) -> dict[str, str]:
    """The file names in a `config.json` that has been read before, without those that are not given."""
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    keys = ("moshi_name", "mimi_name", "tokenizer_name")
    given = {key: values[key] for key in keys if values.get(key) is not None}
    for key, name in given.items():
        # Only a name: a path could lead out of the folder.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise EngineFault(f"{file}: {key} is {name!r}; the name of a file in the same folder is right")
    return given

"""Voices as NVIDIA ships them: the archive unpacked safely, and each `.pt` file checked against the checkpoint."""

import gzip
import io
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from app.engine.contract import EngineFault
from app.engine.personaplex.model.config import CODEBOOKS, COLUMN_ROWS, LmConfig

# The archive can be unpacked on a machine that has no torch yet.
if TYPE_CHECKING:
    from torch import Tensor

_SUFFIX = ".pt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MOST_UNPACKED_BYTES = 128 * 2**20
_CACHE_COLUMNS = 4
_ACOUSTIC_ROWS = [*range(2, 1 + CODEBOOKS), *range(2 + CODEBOOKS, COLUMN_ROWS)]
_ZIP = b"PK\x03\x04"
_UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    struct.error, pickle.UnpicklingError,
)  # fmt: skip
_SAME = 0.02
"""How far apart, of the embedding's length, two sums of 17 bfloat16 embeddings may be: rounding makes 0.004."""


@dataclass(frozen=True, eq=False)
class CodedVoice:
    """A voice as Mimi's codes, int64 [K, V], of a recording of V frames."""

    name: str
    codes: "Tensor"

    @property
    def frames(self) -> int:
        return self.codes.shape[1]


@dataclass(frozen=True, eq=False)
class PackedVoice:
    """A voice of V frames as NVIDIA packs it: summed input embeddings instead of tokens, tied to one checkpoint.

    `embeddings` [V-1, D] are the inputs of positions 0 to V-2. `last_column` int64 [17] are the tokens of position
    V-1, and `next_acoustics` int64 [14] the delayed ones of position V: the agent's codebooks 1 to 7, then the user's.
    """

    name: str
    embeddings: "Tensor"
    last_column: "Tensor"
    next_acoustics: "Tensor"

    @property
    def frames(self) -> int:
        return self.embeddings.shape[0] + 1


Voice = CodedVoice | PackedVoice


def read_packed_voice(file: Path, config: LmConfig, initial_embedding: "Tensor") -> PackedVoice:
    """Read a `.pt` voice onto the host. Code in the file is never run.

    `initial_embedding` [D], of any type and device, is the checkpoint's input for a column of nothing but initial
    tokens: a voice begins with it, so one that does not was made for other embedding tables.

    Raises:
        EngineFault: the file cannot be read, is no voice, or one for another checkpoint.
    """
    values = _load(file)
    embeddings, cache = (_tensor(file, values, key) for key in ("embeddings", "cache"))
    _check_shapes(file, embeddings, cache, config)
    rows = embeddings.reshape(-1, config.dim)
    frames = len(rows) + 1
    last_column = cache[0, :, (frames - 1) % _CACHE_COLUMNS].clone()
    next_acoustics = cache[0, _ACOUSTIC_ROWS, frames % _CACHE_COLUMNS].clone()
    _check_tokens(file, "text", last_column[:1], config.text_initial)
    _check_tokens(file, "audio", last_column[1:], config.audio_initial)
    _check_tokens(file, "audio", next_acoustics, config.audio_initial)
    if not rows.isfinite().all():
        raise EngineFault(f"{file}: embeddings holds values that are no numbers; unpack the voices again")
    _check_origin(file, rows[0], initial_embedding)
    return PackedVoice(file.stem, rows, last_column, next_acoustics)


def voice_names(folder: Path) -> list[str]:
    """The `.pt` voices in a folder, sorted; none when there is no such folder."""
    return sorted(file.stem for file in folder.glob(f"*{_SUFFIX}") if _NAME.fullmatch(file.stem))


def voice_file(folder: Path, name: str) -> Path:
    """The file of a voice. Raises EngineFault for a name that is not among `voice_names`, and lists them."""
    names = voice_names(folder)
    if name not in names:
        right = f"right are {', '.join(names)}" if names else "that folder holds no voices; download them"
        raise EngineFault(f"{folder}: no voice {name!r}; {right}")
    return folder / f"{name}{_SUFFIX}"


def unpack_voices(archive: Path, into: Path) -> Path:
    """Unpack `voices.tgz` to the folder `into`, which then holds NAME.pt files, and return it.

    All or nothing; a folder that has voices is left as it is. Two processes may do it at once.

    Raises:
        EngineFault: the archive cannot be read, is no archive of voices or tries to reach out of the folder, or the
            folder cannot be written. Nothing is left behind.
    """
    if voice_names(into):
        return into
    voices = _voices_in(archive)
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=into.parent, prefix=f".{into.name}-") as work:
            _write(voices, Path(work) / into.name, into)
    except OSError as error:
        raise EngineFault(f"{into}: the voices cannot be unpacked there: {error.strerror or error}") from error
    return into


def _write(voices: dict[str, bytes], unpacked: Path, into: Path) -> None:
    unpacked.mkdir()
    for name, content in voices.items():
        (unpacked / f"{name}{_SUFFIX}").write_bytes(content)
    try:
        unpacked.rename(into)
    except OSError:
        # Another process was quicker, and its folder is as whole as this one.
        if not voice_names(into):
            raise


def _voices_in(archive: Path) -> dict[str, bytes]:
    """The voices by name. They are read from the archive, never extracted, so no member chooses where it goes."""
    try:
        with gzip.open(archive) as packed:
            content = packed.read(_MOST_UNPACKED_BYTES + 1)
        if len(content) > _MOST_UNPACKED_BYTES:
            raise EngineFault(f"{archive}: more than {_MOST_UNPACKED_BYTES:,} bytes unpacked; voices are far smaller")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as members:
            voices = dict(_read(archive, members))
    except FileNotFoundError as error:
        raise EngineFault(f"{archive}: no such file; download it") from error
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        raise EngineFault(f"{archive}: cut short or no .tgz archive ({error}); download it again") from error
    if not voices:
        raise EngineFault(f"{archive}: holds no voices (NAME{_SUFFIX} files); download it again")
    return voices


def _read(archive: Path, members: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in members:
        place = PurePosixPath(member.name)
        if place.is_absolute() or ".." in place.parts or "\\" in member.name:
            raise EngineFault(f"{archive}: member {member.name!r} reaches out of the folder, so nothing was unpacked")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise EngineFault(f"{archive}: member {member.name!r} is a link or a device, so nothing was unpacked")
        content = members.extractfile(member) if member.isreg() else None
        if content is not None and place.suffix == _SUFFIX and _NAME.fullmatch(place.stem):
            yield place.stem, content.read()


def _load(file: Path) -> dict[Any, Any]:
    import torch

    try:
        with file.open("rb") as opened:
            # The older form of such files has a much laxer reader.
            values = torch.load(opened, map_location="cpu", weights_only=True) if opened.peek(4)[:4] == _ZIP else None
    except FileNotFoundError as error:
        raise EngineFault(f"{file}: no such voice; download the voices") from error
    except _UNREADABLE as error:
        found = "damaged, or it holds other things than tensors, and those are never loaded"
        raise EngineFault(f"{file}: no voice: {found}; unpack the voices again") from error
    if not isinstance(values, dict):
        found = "no .pt file of today's form" if values is None else f"holds a {type(values).__name__}"
        raise EngineFault(f"{file}: no voice: {found}; a dict of embeddings and cache is right")
    return values


def _tensor(file: Path, values: dict[Any, Any], key: str) -> "Tensor":
    import torch

    value = values.get(key)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        found = type(value).__name__ if key in values else f"only {', '.join(map(repr, values)) or 'nothing'}"
        raise EngineFault(f"{file}: no voice: {key} is missing or no tensor (found {found})")
    return value.detach()


def _check_shapes(file: Path, embeddings: "Tensor", cache: "Tensor", config: LmConfig) -> None:
    import torch

    shape = tuple(embeddings.shape)
    if len(shape) != 4 or shape[1:] != (1, 1, config.dim) or not 1 <= shape[0] < config.ring - 1:
        right = f"[1 to {config.ring - 2}, 1, 1, {config.dim}]"
        raise EngineFault(f"{file}: embeddings: found {list(shape)}; {right} is right for this checkpoint")
    if not embeddings.is_floating_point():
        raise EngineFault(f"{file}: embeddings: found {embeddings.dtype}; a float type is right")
    if tuple(cache.shape) != (1, COLUMN_ROWS, _CACHE_COLUMNS) or cache.dtype != torch.int64:
        right = f"[1, {COLUMN_ROWS}, {_CACHE_COLUMNS}] of torch.int64"
        raise EngineFault(f"{file}: cache: found {list(cache.shape)} of {cache.dtype}; {right} is right")


def _check_tokens(file: Path, kind: str, tokens: "Tensor", most: int) -> None:
    wrong = tokens[(tokens < 0) | (tokens > most)].tolist()
    if wrong:
        raise EngineFault(f"{file}: cache: {kind} token {wrong[0]}; 0 to {most} are right for this checkpoint")


def _check_origin(file: Path, first: "Tensor", initial_embedding: "Tensor") -> None:
    initial = initial_embedding.detach().to("cpu").double()
    away = (first.double() - initial).norm()
    if not away <= _SAME * initial.norm():
        raise EngineFault(
            f"voice {file.stem} was made for another checkpoint: {file} does not begin as this model's embedding "
            f"tables do; take the voices that came with the checkpoint"
        )

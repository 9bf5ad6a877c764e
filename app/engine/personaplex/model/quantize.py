"""Matrices in a byte or half a byte a number: stored numbers, and scales that make them what they were, nearly."""

import fcntl
import json
import logging
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from app.engine.contract import EngineFault
from app.engine.personaplex.model.weights import check, described, load, opened, parts, stream

if TYPE_CHECKING:
    from app.engine.personaplex.model.entries import Entry

Kind = Literal["int8", "fp8", "int4"]
"""How a matrix is stored; "fp8" is e4m3: four bits of exponent, three of mantissa."""
Weights = Literal["bf16", "int8", "fp8", "int4"]
"""How the large matrices are kept; "bf16" stands for the model's own dtype, whatever that is."""

GROUP = 128
"""Inputs that share a scale in int4, or fewer where that does not divide a matrix."""

_LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 15.0}
_STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
_LEAST_SCALE = 1e-30
_SHRINKS = (1.0, 0.9, 0.8, 0.7)
"""Of a group's range. Cutting off its ends makes the steps between finer: on normal numbers the error falls from 0.101
to 0.097 of their size, and on ones with heavy tails (Student's t, 4 degrees) from 0.145 to 0.140."""
_SLICE = 2**22
"""Numbers that are worked on at once, 16 MB in float32: no matrix is ever whole in it."""
_FORMAT = "1"
"""Of the file that keeps quantised matrices. Another number whenever the same matrix would be stored otherwise."""
_FILE_TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip

_log = logging.getLogger("personaline.engine")


class Quantized:
    """A matrix [out, in].

    int8 and fp8: `data` [out, in], `scales` float32 [out]; a value is stored * scale.

    int4: `data` uint8 [out, in / 2], `scales` bfloat16 [2, in / group, out], scales first and then zeros, whole numbers
    from 0 to 15; a value is (stored - zero) * scale. Byte j of a group has input j in its low half and input
    j + group / 2 in its high one, so that a kernel multiplies halves of a group without shuffling them.
    """

    def __init__(self, kind: Kind, data: Tensor, scales: Tensor) -> None:
        self.kind, self.data, self.scales = kind, data, scales

    @classmethod
    def empty(cls, kind: Kind, rows: int, inputs: int, device: torch.device) -> "Quantized":
        """A place for a matrix [rows, inputs].

        Raises:
            EngineFault: the GPU cannot multiply this kind.
            ValueError: an odd number of inputs in int4.
        """
        if device.type == "cuda":
            check_capability(kind, torch.cuda.get_device_capability(device))
        if kind != "int4":
            data = torch.empty(rows, inputs, dtype=_STORED[kind], device=device)
            return cls(kind, data, torch.empty(rows, device=device))
        if inputs % 2:
            raise ValueError(f"int4: found {inputs} inputs; an even number is right, two share a byte")
        data = torch.empty(rows, inputs // 2, dtype=torch.uint8, device=device)
        return cls(kind, data, torch.empty(2, inputs // _group(inputs), rows, dtype=torch.bfloat16, device=device))

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.data.shape
        return rows, 2 * width if self.kind == "int4" else width

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] if self.kind != "int4" else self.shape[1] // self.scales.shape[1]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: slice) -> "Quantized":
        """A view of some rows."""
        return Quantized(self.kind, self.data[rows], self.scales[..., rows])

    def chunk(self, count: int) -> list["Quantized"]:
        """Views of `count` equal parts, from the first row down."""
        parts = zip(self.data.chunk(count), self.scales.chunk(count, -1), strict=True)
        return [Quantized(self.kind, data, scales) for data, scales in parts]

    def slices(self) -> Iterator[slice]:
        """Rows that may be worked on at once, from the first down."""
        rows, inputs = self.shape
        step = max(1, _SLICE // inputs)
        return (slice(first, first + step) for first in range(0, rows, step))

    def copy_(self, weight: Tensor) -> None:
        """Quantise a matrix of any floating dtype, on any device, into this one."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"found a matrix {tuple(weight.shape)}; {self.shape} is right")
        for rows in self.slices():
            part = weight[rows].to(self.device).to(torch.float32)
            data, scales = _in_groups(part, self.group) if self.kind == "int4" else _in_rows(part, self.kind)
            self.data[rows] = data
            self.scales[..., rows] = scales

    def scale_rows(self, factor: Tensor) -> None:
        """Multiply the outputs by `factor` [out], exactly where these are powers of two."""
        scales = self.scales[0] if self.kind == "int4" else self.scales
        scales.copy_(scales * factor.to(self.device))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix [out, in] as numbers that anything multiplies."""
        if self.kind != "int4":
            return (self.data.to(torch.float32) * self.scales[:, None]).to(dtype)
        scale, zero = self.scales.to(torch.float32).transpose(1, 2)[..., None].unbind(0)
        halves = self.data.unflatten(1, (-1, self.group // 2))
        stored = torch.cat((halves & 15, halves >> 4), -1).to(torch.float32)
        return ((stored - zero) * scale).flatten(1).to(dtype)


Matrix = Tensor | Quantized


def empty_matrix(weights: Weights, rows: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Matrix:
    """A place for a matrix [rows, inputs] of a network that computes in `dtype`. Raises EngineFault."""
    if weights == "bf16":
        return torch.empty(rows, inputs, device=device, dtype=dtype)
    return Quantized.empty(weights, rows, inputs, device)


def check_capability(kind: Kind, capability: tuple[int, int]) -> None:
    """Raises EngineFault for a kind that a GPU of this compute capability cannot convert."""
    if kind == "fp8" and capability < (8, 9):
        found = f"fp8 weights on a GPU of compute capability {capability[0]}.{capability[1]}"
        raise EngineFault(f"{found}; fp8 takes 8.9 or later, int8 weights are right here")


def _group(inputs: int) -> int:
    return next(size for size in range(min(GROUP, inputs), 0, -1) if inputs % size == 0 and size % 2 == 0)


def _in_rows(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Of float32 [N, in]: data [N, in], scales [N]."""
    largest = _LARGEST[kind]
    scales = (x.abs().amax(1) / largest).clamp(min=_LEAST_SCALE)
    stored = (x / scales[:, None]).clamp(-largest, largest)
    return (stored.round() if kind == "int8" else stored).to(_STORED[kind]), scales


def _in_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Of float32 [N, in]: data [N, in / 2], scales [2, in / group, N]. Of several ranges each group takes the best."""
    x = x.unflatten(1, (-1, group))
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale, zero = _of_range(low, high)
    least = (_stored(x, scale, zero).sub_(zero).mul_(scale) - x).square_().sum(-1, keepdim=True)
    for shrink in _SHRINKS[1:]:
        other = _of_range(low * shrink, high * shrink)
        error = (_stored(x, *other).sub_(other[1]).mul_(other[0]) - x).square_().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, other[0], scale), torch.where(better, other[1], zero)
    low_half, high_half = _stored(x, scale, zero).to(torch.uint8).chunk(2, -1)
    return (low_half | high_half << 4).flatten(1), torch.stack((scale, zero))[..., 0].transpose(1, 2)


def _of_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero, of which the scale is what bfloat16 makes of it."""
    scale = ((high - low) / _LARGEST["int4"]).clamp(min=_LEAST_SCALE).to(torch.bfloat16).to(torch.float32)
    return scale, (-low / scale).round().clamp(0, _LARGEST["int4"])


def _stored(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (x / scale).round_().add_(zero).clamp_(0, _LARGEST["int4"])


def load_model(file: Path, entries: "Mapping[str, Entry]", weights: Weights) -> None:
    """As `weights.load`. Quantised matrices are kept in a file beside this one, and read from there the next time.

    That file is of no use once this one has another size or time, or the way to quantise has changed: then it is made
    anew. One that cannot be written is a line in the log.

    Raises:
        EngineFault: as `weights.load`.
    """
    if weights == "bf16":
        load(file, entries)
        return
    check(file, entries)
    large = {key: entry.into for key, entry in entries.items() if isinstance(entry.into, Quantized)}
    stream(file, {key: entry for key, entry in entries.items() if key not in large})
    kept = _Kept(file, weights, large)
    if kept.is_whole():
        kept.read()
    else:
        with kept:
            stream(file, {key: entries[key] for key in large}, kept.put)


class _Kept:
    """The file beside a checkpoint's that keeps its quantised matrices: `model.int8.safetensors`, for one.

    As a context it is written: to a file of another name, which only one process has at a time and which takes the
    right name when it is whole. Its header is known beforehand, so that matrices go there one by one.
    """

    def __init__(self, source: Path, kind: Kind, matrices: Mapping[str, Quantized]) -> None:
        self._file = source.with_name(f"{source.stem}.{kind}.safetensors")
        self._part = self._file.with_name(f"{self._file.name}.part")
        found = source.stat()
        size, time = str(found.st_size), str(found.st_mtime_ns)
        self._about = {"format": _FORMAT, "kind": kind, "source_bytes": size, "source_mtime_ns": time}
        # Scales first: what has several bytes a number has to begin at a multiple of them.
        self._tensors = {f"{key}.scales": matrix.scales for key, matrix in matrices.items()}
        self._tensors |= {f"{key}.data": matrix.data for key, matrix in matrices.items()}
        self._out: FileIO | None = None
        self._starts: dict[str, int] = {}

    def is_whole(self) -> bool:
        """Whether the file holds these very matrices, as far as its header and its length tell."""
        if not self._file.exists():
            return False
        try:
            with opened(self._file) as tensors:
                found = {key: described(tensors, key) for key in tensors.keys()}  # noqa: SIM118 - it has only keys()
                about = tensors.metadata()
        except EngineFault:
            _log.warning("%s: damaged; it is made anew", self._file)
            return False
        right = {name: (_FILE_TYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in self._tensors.items()}
        if about != self._about or found != right:
            _log.info("%s: of another checkpoint or version; it is made anew", self._file)
            return False
        return True

    def read(self) -> None:
        from app.engine.personaplex.model.entries import Entry

        stream(self._file, {name: Entry(tuple(tensor.shape), tensor) for name, tensor in self._tensors.items()})

    def __enter__(self) -> Self:
        try:
            self._out = _claimed(self._part)
            if self._out is None:
                _log.info("%s: another process is writing it", self._file)
                return self
            header, self._starts = _header(self._about, self._tensors)
            _write(self._out, header)
        except OSError as error:
            self._give_up(error)
        return self

    def put(self, key: str) -> None:
        """Write one matrix, which is there now."""
        if self._out is None:
            return
        try:
            for name in (f"{key}.scales", f"{key}.data"):
                self._out.seek(self._starts[name])
                for rows in parts(self._tensors[name]):
                    flat = self._tensors[name][rows].contiguous().flatten()
                    _write(self._out, flat.view(torch.uint8).cpu().numpy().data)
        except OSError as error:
            self._give_up(error)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._out is None:
            return
        if kind is not None:
            self._drop()
            return
        try:
            # Else a machine that loses power may have the name and not what it names.
            os.fsync(self._out.fileno())
            self._part.replace(self._file)
            self._out.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _log.warning("%s: not written (%s); the next start has to quantise again", self._file, error)
        self._drop()

    def _drop(self) -> None:
        if self._out is not None:
            with suppress(OSError):
                self._part.unlink()
            self._out.close()
            self._out = None


def _claimed(file: Path) -> FileIO | None:
    """An empty file to write, this process's alone until it is closed; None while it is another's. Raises OSError.

    One that a process left behind when it ended is taken over.
    """
    out = FileIO(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "w")
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two calls another process may have given the file its right name, and must not lose it.
        if file.exists() and os.path.samestat(os.fstat(out.fileno()), file.stat()):
            out.truncate(0)
            return out
    except BlockingIOError:
        pass
    except OSError:
        out.close()
        raise
    out.close()
    return None


def _header(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file, and where in it each tensor begins.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    table: dict[str, object] = {"__metadata__": about}
    starts: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        starts[name], end = end, end + tensor.nbytes
        offsets = [starts[name], end]
        table[name] = {"dtype": _FILE_TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _write(out: FileIO, data: bytes | memoryview) -> None:
    """All of it: a file without a buffer may take less than it is given."""
    left = memoryview(data)
    while left:
        left = left[out.write(left) :]

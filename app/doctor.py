"""What keeps PersonaPlex from answering here, and what to do about it: `personaline doctor`. Loads no weights."""

import importlib.metadata
import json
import math
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.engine import EngineFault
from app.engine.personaplex.model.config import LmConfig, MimiConfig
from app.engine.personaplex.sizes import COPIES, lm_bytes, lm_elements
from app.engine.personaplex.voices import voice_names
from app.engine_choice import (
    ELEMENT_BYTES,
    Fit,
    best_fit,
    checkpoint_folder,
    described,
    find_weights,
    fit_of,
    remedy_for,
    rows_for,
)
from app.machine import Device, dtype_for, find_device, require_kinds, require_packages
from app.settings import Settings
from app.weights_hub import PERSONAPLEX, HubFault, Unreachable, account, missing, usable_token

if TYPE_CHECKING:
    from app.engine.personaplex.model.quantize import Weights
    from app.engine.personaplex.model.ring import Kv
    from app.engine.personaplex.model.weights import Checkpoint

Level = Literal["OK", "WARN", "FAIL"]

_AGAIN = "fetch again with: personaline download"
_HEADER_MOST_BYTES = 100 * 2**20
_ONLY_BESIDE_TORCH = ("safetensors", "sentencepiece", "pyloudnorm")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `said` ends with the remedy unless the level is OK."""

    level: Level
    about: str
    said: str

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.about:<8}  {self.said}"


def examine(settings: Settings) -> Iterator[Finding]:
    """Every finding, as it is made: some take a second, and the hub may take ten."""
    yield Finding("OK", "python", platform.python_version())
    packages = _packages()
    yield packages
    yield from _weights(settings)
    yield _token(settings)
    if packages.level != "FAIL":
        yield from _device(settings)


def _packages() -> Finding:
    try:
        require_packages()
    except EngineFault as fault:
        return Finding("FAIL", "packages", str(fault))
    found = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *_ONLY_BESIDE_TORCH)]
    return Finding("OK", "packages", ", ".join(found))


# --- files


def _weights(settings: Settings) -> Iterator[Finding]:
    folder = checkpoint_folder(settings)
    if settings.personaplex_checkpoint is None:
        yield _disk(folder)
    try:
        checkpoint = find_weights(settings)
    except EngineFault as fault:
        yield Finding("FAIL", "files", str(fault))
        return
    cut = [file.name for file in missing()] if settings.personaplex_checkpoint is None else []
    if cut:
        yield Finding("FAIL", "files", f"not in their whole size: {', '.join(cut)}: {_AGAIN}")
    else:
        yield Finding("OK", "files", str(folder))
    yield _tensors(checkpoint.model, lm_elements(checkpoint.lm, checkpoint.lm.dep_q))
    yield _tensors(checkpoint.mimi, None)
    yield _voices(checkpoint)


def _disk(folder: Path) -> Finding:
    place = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(place).free
    needed = sum(file.size_bytes for file in missing())
    said = f"{free / 1e9:.1f} GB free at {place}"
    if free < needed:
        remedy = "free some, or set HF_HOME to a folder on another disk"
        return Finding("FAIL", "disk", f"{said}, and {needed / 1e9:.1f} GB are still to be fetched: {remedy}")
    return Finding("OK", "disk", said)


def _tensors(file: Path, elements: int | None) -> Finding:
    """A safetensors file by its header alone: whole, and of the size that its configuration gives.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    try:
        header, data_bytes = _header(file)
        ends = [int(tensor["data_offsets"][1]) for tensor in header.values()]
        found = sum(math.prod(tensor["shape"]) for tensor in header.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Finding("FAIL", "files", f"{file.name} cannot be read as safetensors ({error}): {_AGAIN}")
    if max(ends, default=0) != data_bytes:
        said = f"{file.name} has {data_bytes:,} bytes of tensors where its header tells of {max(ends, default=0):,}"
        return Finding("FAIL", "files", f"{said}: {_AGAIN}")
    if elements is not None and found != elements:
        said = f"{file.name} holds {found:,} numbers where its config.json makes {elements:,}"
        return Finding("FAIL", "files", f"{said}: put the config.json that belongs to it beside it")
    return Finding("OK", "files", f"{file.name}: {len(header)} tensors, {_size(data_bytes)}")


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header without its free text, and how many bytes of tensors follow it."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _HEADER_MOST_BYTES:
            raise ValueError("it begins with no header")
        header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no block of keys")
    header.pop("__metadata__", None)
    return header, file.stat().st_size - 8 - length


def _voices(checkpoint: "Checkpoint") -> Finding:
    if checkpoint.voices.is_dir():
        return Finding("OK", "voices", ", ".join(voice_names(checkpoint.voices)))
    return Finding("OK", "voices", f"{checkpoint.voices.name}, unpacked when first needed")


# --- token


def _token(settings: Settings) -> Finding:
    """A token is needed only as long as files are missing."""
    needed: Level = "FAIL" if missing() and settings.personaplex_checkpoint is None else "WARN"
    try:
        token = usable_token(settings.hf_token)
        if token is None:
            if needed == "WARN":
                return Finding("OK", "token", "none, and none is needed: the files are here")
            remedy = f"accept the licence on {PERSONAPLEX.page}, then set HF_TOKEN"
            return Finding("FAIL", "token", f"none: {remedy}")
        return Finding("OK", "token", f"works, of the account {account(token)}")
    except Unreachable as fault:
        return Finding("WARN", "token", f"not tried: {fault}")
    except HubFault as fault:
        return Finding(needed, "token", str(fault))


# --- device


def _device(settings: Settings) -> Iterator[Finding]:
    """The device, and which configurations fit on it. Without weights the real model's sizes are reckoned with."""
    try:
        checkpoint = find_weights(settings)
        lm, mimi = checkpoint.lm, checkpoint.mimi_config
    except EngineFault:
        lm, mimi = LmConfig(), MimiConfig()
    try:
        device = find_device(settings.personaplex_device, lm_bytes(lm, ELEMENT_BYTES["bfloat16"]))
    except EngineFault as fault:
        yield Finding("FAIL", "device", str(fault))
        return
    yield Finding("OK", "device", str(device))
    dtype = dtype_for(settings.personaplex_dtype, device.kind)
    fit = best_fit(settings, lm, mimi, device, dtype)
    try:
        require_kinds(device, fit.weights, fit.kv)
    except EngineFault as fault:
        yield Finding("FAIL", "device", str(fault))
    yield _memory(fit, rows_for(settings, device, fit.calls), dtype, device, remedy_for(fit, lm, mimi, device, dtype))
    yield _fits(lm, mimi, device, dtype)


def _memory(fit: Fit, rows: int, dtype: str, device: Device, remedy: str) -> Finding:
    needs = fit.needs
    work_bytes = needs.workspace_bytes + min(rows, COPIES) * needs.copy_bytes
    parts = f"weights {_size(needs.weights_bytes)}, codec {_size(needs.codec_weights_bytes)}"
    parts += f", {_size(needs.call_bytes)} a call, {_size(work_bytes)} to work with, the rest in reserve"
    said = f"{_size(needs.needed_bytes(rows))} for {_calls(rows)} in {described(dtype, fit.weights, fit.kv)}: {parts}"
    if fit.calls >= rows:
        return Finding("OK", "memory", said)
    return Finding("FAIL", "memory", f"{said}; {_size(device.free_bytes)} are free: {remedy}")


def _fits(lm: LmConfig, mimi: MimiConfig, device: Device, dtype: str) -> Finding:
    """Each kind of weights with each of keys, by arithmetic; fp8 takes what int8 takes."""
    kinds: tuple[Weights, ...] = ("bf16", "int8", "int4")
    kept: tuple[Kv, ...] = ("bf16", "int8")
    fits = [fit_of(lm, mimi, device, dtype, weights, kv) for weights in kinds for kv in kept]
    each = [f"{_calls(fit.calls)} in {described(dtype, fit.weights, fit.kv)}" for fit in fits]
    said = f"by memory alone {', '.join(each)}"
    if not any(fit.calls for fit in fits):
        return Finding("FAIL", "fits", f"{said}: a device with more memory is right")
    return Finding("OK", "fits", said)


def _calls(count: int) -> str:
    return f"{count:,} call{'s' * (count != 1)}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"

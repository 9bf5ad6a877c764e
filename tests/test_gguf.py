import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.gguf import GgufFault, check_gguf
from app.model_files import ModelFileFault, llm_path


def gguf(tensor_kind: int = 0, tensor_bytes: int = 64, alignment: int | None = None) -> bytes:
    """A small GGUF file, version 3: values of every shape, two tensors, the second [16] of F32 unless told."""
    keys = [
        text("general.architecture") + struct.pack("<I", 8) + text("tiny"),
        text("tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("bc") + text(""),
        text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 3.0),
        text("yes") + struct.pack("<I?", 7, True),
        *([] if alignment is None else [text("general.alignment") + struct.pack("<II", 4, alignment)]),
    ]
    step = alignment or 32
    tensors = [
        text("first") + struct.pack("<IQQIQ", 2, 2, 4, 0, 0),
        text("second") + struct.pack("<IQIQ", 1, 16 if tensor_kind == 0 else 256, tensor_kind, max(step, 32)),
    ]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    padding = -len(header) % step
    return header + bytes(padding) + bytes(max(step, 32)) + bytes(tensor_bytes)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    "whole",
    [gguf(), gguf(alignment=64), gguf(alignment=8), gguf(alignment=0), gguf(tensor_kind=12, tensor_bytes=144)],
    ids=["plain", "wide alignment", "narrow alignment", "alignment of zero", "q4_k"],
)
def test_a_whole_gguf_file_is_taken_and_one_byte_less_is_not(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(whole)
    assert llm_path(path) == path

    path.write_bytes(whole[:-1])
    with pytest.raises(ModelFileFault, match=rf"CASCADE_LLM=.*cut short: {len(whole) - 1:,} bytes of at least"):
        llm_path(path)


def test_a_gguf_cut_anywhere_is_never_taken(tmp_path: Path) -> None:
    whole, path = gguf(), tmp_path / "own.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GgufFault):
            check_gguf(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"PK\x03\x04 a zip", r"not a GGUF file, it begins with b'PK\\x03\\x04'"),
        (b"", "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1), "GGUF version 1, where 2 or 3 is read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("key") + struct.pack("<I", 99), "unknown kind 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("wide") + struct.pack("<I", 5), "a tensor of 5 dimensions"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_was_found(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(content)

    with pytest.raises(ModelFileFault, match=f"{found}.*leave CASCADE_LLM out"):
        llm_path(path)


def test_an_own_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileFault, match=r"CASCADE_LLM=\S+absent\.gguf: No such file"):
        llm_path(tmp_path / "absent.gguf")


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_spoilt_header_is_refused_or_read_but_never_crashes(tmp_path: Path, data: st.DataObject) -> None:
    spoilt = bytearray(gguf(alignment=32))
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(4, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "own.gguf"
    path.write_bytes(spoilt)
    with suppress(GgufFault):
        check_gguf(path)

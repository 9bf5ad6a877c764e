import fcntl
import json
import logging
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from app.engine import EngineFault
from app.engine.personaplex.model.config import CODEBOOKS, COLUMN_ROWS
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.linear import Linear
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.quantize import Kind, Quantized, Weights, check_capability, load_model
from app.engine.personaplex.model.ring import Ring
from app.engine.personaplex.model.weights import MODEL_NAME, load
from tests.engine.tiny import make_tiny_checkpoint, tiny_configs

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("int8", "fp8", "int4")
every_kind = pytest.mark.parametrize("kind", KINDS)


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised(kind: Kind, weight: Tensor) -> Quantized:
    matrix = Quantized.empty(kind, len(weight), weight.shape[1], CPU)
    matrix.copy_(weight)
    return matrix


def error_of(matrix: Quantized, weight: Tensor) -> float:
    return float((matrix.dequantised(torch.float32) - weight).norm() / weight.norm())


def same(one: Quantized, other: Quantized) -> bool:
    """Bit for bit."""
    return torch.equal(one.data.view(torch.uint8), other.data.view(torch.uint8)) and torch.equal(
        one.scales, other.scales
    )


# --- one matrix


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.009), ("fp8", 0.027), ("int4", 0.099)])
def test_a_matrix_is_nearly_what_it_was(kind: Kind, most: float) -> None:
    weight = some(64, 512)

    assert error_of(quantised(kind, weight), weight) < most


@every_kind
def test_a_rows_outlier_is_that_rows_matter(kind: Kind) -> None:
    weight = some(64, 512)
    weight[3, 100] = 1000.0
    matrix = quantised(kind, weight)

    assert matrix.dequantised(torch.float32)[3, 100] == pytest.approx(1000.0, rel=0.05)
    others = torch.arange(64) != 3
    assert same(quantised(kind, weight[others][:3]), matrix[:3])
    assert same(quantised(kind, weight[4:]), matrix[4:])


def test_a_channels_outliers_cost_int4_nothing_outside_their_group() -> None:
    weight = some(64, 512)
    even = error_of(quantised("int4", weight[:, 128:]), weight[:, 128:])
    weight[:, 100] *= 100
    matrix = quantised("int4", weight).dequantised(torch.float32)

    assert float((matrix - weight)[:, 128:].norm() / weight[:, 128:].norm()) == pytest.approx(even)


def test_no_number_is_further_off_than_half_a_step() -> None:
    weight = some(64, 512) * torch.logspace(-6, 3, 64)[:, None]
    largest = weight.abs().amax(1, keepdim=True)

    int8 = (quantised("int8", weight).dequantised(torch.float32) - weight).abs()
    assert bool((int8 <= 0.5001 * largest / 127).all())
    fp8 = (quantised("fp8", weight).dequantised(torch.float32) - weight).abs()
    assert bool((fp8 <= torch.maximum(weight.abs() / 16, largest / 448 * 2**-10) * 1.001).all())


@every_kind
@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_rows_of_a_single_value_are_kept_exactly_but_for_their_scale(kind: Kind, value: float) -> None:
    matrix = quantised(kind, torch.full((4, 64), value))

    assert torch.allclose(matrix.dequantised(torch.float32), torch.full((4, 64), value), rtol=2**-8, atol=0)


@every_kind
def test_a_large_matrix_is_the_same_as_its_parts(kind: Kind) -> None:
    """So large that it is not worked on at once."""
    weight = some(2_100, 2_048).to(torch.bfloat16)
    whole, parts = quantised(kind, weight), Quantized.empty(kind, 2_100, 2_048, CPU)
    for part, rows in zip(parts.chunk(3), weight.chunk(3), strict=True):
        part.copy_(rows)

    assert len(list(whole.slices())) > 1
    assert same(whole, parts)


@every_kind
def test_a_chunk_is_a_view_into_the_stack(kind: Kind) -> None:
    stack, weight = quantised(kind, torch.zeros(12, 64)), some(4, 64)

    stack.chunk(3)[1].copy_(weight)

    assert [part.shape for part in stack.chunk(3)] == [(4, 64)] * 3
    assert same(stack[4:8], quantised(kind, weight))
    assert not stack[:4].dequantised(torch.float32).any()
    assert not stack[8:].dequantised(torch.float32).any()


@every_kind
def test_rows_scaled_by_powers_of_two_lose_nothing(kind: Kind) -> None:
    matrix, factor = quantised(kind, some(8, 64)), torch.tensor([1.0, 2, 4, 0.5, 0.125, 1, 1024, 2**-12])
    before = matrix.dequantised(torch.float32)

    matrix.scale_rows(factor)

    assert torch.equal(matrix.dequantised(torch.float32), before * factor[:, None])


def test_a_narrow_matrix_has_smaller_groups() -> None:
    for inputs, group in ((4096, 128), (11_264, 128), (2816, 128), (176, 88), (64, 64), (2, 2)):
        assert Quantized.empty("int4", 3, inputs, CPU).group == group


def test_what_each_kind_takes() -> None:
    sizes = {kind: Quantized.empty(kind, 1024, 4096, CPU).nbytes for kind in KINDS}

    assert sizes == {"int8": 1024 * 4100, "fp8": 1024 * 4100, "int4": 1024 * (2048 + 32 * 4)}


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="found 7 inputs; an even number is right"):
        Quantized.empty("int4", 4, 7, CPU)
    with pytest.raises(ValueError, match=r"found a matrix \(3, 64\); \(4, 64\) is right"):
        Quantized.empty("int8", 4, 64, CPU).copy_(torch.zeros(3, 64))


def test_fp8_is_refused_where_a_gpu_has_none_of_it() -> None:
    fit: tuple[tuple[Kind, tuple[int, int]], ...] = (
        ("fp8", (8, 9)),
        ("fp8", (9, 0)),
        ("int8", (7, 5)),
        ("int4", (8, 0)),
    )
    for kind, capability in fit:
        check_capability(kind, capability)

    with pytest.raises(EngineFault, match=r"compute capability 8\.6; fp8 takes 8\.9 or later, int8 weights are right"):
        check_capability("fp8", (8, 6))


# --- a product


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_numbers_that_are_stood_for(kind: Kind, dtype: torch.dtype) -> None:
    matrix = quantised(kind, some(2_100, 2_048))
    linear = Linear(matrix)
    linear.pack(1)

    for shape in ((2_048,), (1, 2_048), (3, 2_048), (2, 5, 2_048)):
        x = some(*shape, seed=1).to(dtype)
        exact = functional.linear(x.double(), matrix.dequantised(torch.float32).double())
        found = linear(x)
        assert (found.dtype, found.shape) == (dtype, (*shape[:-1], 2_100))
        assert float((found.double() - exact).norm() / exact.norm()) < (1e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("weights", ["bf16", *KINDS])
def test_scaled_outputs_are_exact_multiples(weights: Weights) -> None:
    weight, factor, x = some(8, 64), torch.tensor([1.0, 2, 4, 0.5, 0.125, 1, 1024, 2**-12]), some(3, 64)
    linear = Linear(weight if weights == "bf16" else quantised(weights, weight))
    before = linear(x)

    linear.scale_rows(factor)

    assert torch.equal(linear(x), before * factor)


# --- a model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("quantised") / "tiny")


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """The model's file, alone in a folder."""
    path = tmp_path / MODEL_NAME
    path.write_bytes((checkpoint / MODEL_NAME).read_bytes())
    return path


def loaded(file: Path, weights: Weights) -> Lm:
    lm = Lm(tiny_configs()[0], CPU, torch.float32, weights)
    load_model(file, lm.entries(), weights)
    return lm


def matrices(lm: Lm) -> dict[str, Quantized]:
    return {key: entry.into for key, entry in lm.entries().items() if isinstance(entry.into, Quantized)}


def same_matrices(one: Lm, other: Lm) -> bool:
    ours, theirs = matrices(one), matrices(other)
    return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)


def quantised_anew(file: Path, kind: Kind) -> Lm:
    lm = Lm(tiny_configs()[0], CPU, torch.float32, kind)
    load(file, lm.entries())
    return lm


def forced_logits(lm: Lm, columns: Tensor) -> list[Tensor]:
    """Of the text and of each codebook, after each of the columns int64 [T, 17] and with the codes that followed."""
    lm.pack()
    ring = Ring.of(lm.config, 1, len(columns), CPU, torch.float32)
    hidden = lm.transformer.extend(lm.embed(columns), ring, 0)
    heard = [lm.text_logits(hidden)]

    def forced(codebook: int, logits: Tensor) -> Tensor:
        heard.append(logits)
        return columns[:, 1 + codebook]

    lm.depformer.run(hidden, columns[:, 0], forced)
    return heard


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.9995), ("fp8", 0.995), ("int4", 0.93)])
def test_a_quantised_model_answers_nearly_as_the_exact_one_to_the_same_past(
    checkpoint: Path, kind: Kind, least: float
) -> None:
    columns = torch.randint(96, (40, COLUMN_ROWS), generator=torch.Generator().manual_seed(1))
    exact = forced_logits(loaded(checkpoint / MODEL_NAME, "bf16"), columns)

    found = forced_logits(quantised_anew(checkpoint / MODEL_NAME, kind), columns)

    for right, logits in zip(exact, found, strict=True):
        assert not torch.equal(right, logits)
        assert float(functional.cosine_similarity(right, logits, -1).mean()) > least


@every_kind
def test_a_quantised_model_steps(checkpoint: Path, kind: Kind) -> None:
    lm = quantised_anew(checkpoint / MODEL_NAME, kind)
    lm.pack(3)
    state = LmState.of(lm.config, 3, CPU, torch.float32)
    user = torch.randint(96, (3, CODEBOOKS), generator=torch.Generator().manual_seed(1))

    frames = [lm.step(state, user, torch.ones(3, dtype=torch.bool), Reach(step + 1, 1, 1)) for step in range(5)]

    assert len({tuple(frame.flatten().tolist()) for frame in frames}) == 5


@every_kind
def test_the_large_matrices_are_quantised_and_nothing_else(checkpoint: Path, kind: Kind) -> None:
    lm = quantised_anew(checkpoint / MODEL_NAME, kind)
    large = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear_in.weight", "linear_out.weight"}

    for key, entry in lm.entries().items():
        if entry.into is not None:
            wanted = any(key.endswith(name) for name in large) or key.startswith("depformer_in.")
            assert isinstance(entry.into, Quantized) == wanted, key


# --- the file that keeps them


@every_kind
def test_what_the_first_start_quantised_the_next_one_reads(model: Path, kind: Kind) -> None:
    first = loaded(model, kind)
    kept = model.with_name(f"model.{kind}.safetensors")
    assert load_file(kept)["transformer.layers.0.self_attn.out_proj.weight.data"].shape[0] == 64

    assert same_matrices(loaded(model, kind), first)
    assert sorted(file.name for file in model.parent.iterdir()) == sorted([MODEL_NAME, kept.name])

    last = kept.stat().st_size - 1
    with kept.open("r+b") as changed:
        changed.seek(last)
        byte = changed.read(1)[0]
        changed.seek(last)
        changed.write(bytes([byte ^ 1]))
    assert not same_matrices(loaded(model, kind), first)


def test_what_is_not_quantised_comes_from_the_checkpoint_itself(model: Path) -> None:
    loaded(model, "int8")

    stored, lm = load_file(model), loaded(model, "int8")

    plain = {key: entry.into for key, entry in lm.entries().items() if isinstance(entry.into, Tensor)}
    assert "out_norm.alpha" in plain
    for key, tensor in plain.items():
        assert torch.equal(tensor, stored[key].float().reshape(tensor.shape)), key


def test_each_kind_has_a_file_of_its_own_and_the_models_own_dtype_none(model: Path) -> None:
    kinds: tuple[Weights, ...] = ("bf16", "int8", "int4")
    for weights in kinds:
        loaded(model, weights)

    names = sorted(file.name for file in model.parent.iterdir())
    assert names == ["model.int4.safetensors", "model.int8.safetensors", MODEL_NAME]


def test_another_checkpoint_under_the_same_name_is_quantised_anew(model: Path, tmp_path: Path) -> None:
    first = loaded(model, "int8")
    other = make_tiny_checkpoint(tmp_path / "other", seed=1) / MODEL_NAME
    model.write_bytes(other.read_bytes())

    second = loaded(model, "int8")

    assert not same_matrices(second, first)
    assert same_matrices(second, quantised_anew(other, "int8"))
    before = (tmp_path / "model.int8.safetensors").read_bytes()
    assert same_matrices(loaded(model, "int8"), second)
    assert (tmp_path / "model.int8.safetensors").read_bytes() == before


def cut(whole: bytes) -> bytes:
    return whole[:-1]


def emptied(whole: bytes) -> bytes:
    return b""


def of_another_version(whole: bytes) -> bytes:
    return changed_header(whole, lambda table: table["__metadata__"].update(format="0"))


def without_metadata(whole: bytes) -> bytes:
    return changed_header(whole, lambda table: table.pop("__metadata__"))


def with_a_key_renamed(whole: bytes) -> bytes:
    def rename(table: dict) -> None:  # type: ignore[type-arg]
        key = next(key for key in table if key.endswith(".data"))
        table[f"x{key}"] = table.pop(key)

    return changed_header(whole, rename)


def changed_header(whole: bytes, change) -> bytes:  # type: ignore[no-untyped-def]
    (length,) = struct.unpack("<Q", whole[:8])
    table = json.loads(whole[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + length :]


@pytest.mark.parametrize("damage", [cut, emptied, of_another_version, without_metadata, with_a_key_renamed])
def test_a_kept_file_of_no_use_is_made_anew(model: Path, damage) -> None:  # type: ignore[no-untyped-def]
    first = loaded(model, "int8")
    kept = model.with_name("model.int8.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))

    assert same_matrices(loaded(model, "int8"), first)
    assert kept.read_bytes() == whole


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("missing_bytes", [1, 100, 10_000, None])
def test_a_disk_without_room_is_a_line_in_the_log_and_leaves_nothing(
    model: Path, missing_bytes: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    kept = model.with_name("model.int8.safetensors")
    loaded(model, "int8")
    room_bytes = 0 if missing_bytes is None else kept.stat().st_size - missing_bytes
    kept.unlink()

    with files_of_at_most(room_bytes):
        lm = loaded(model, "int8")

    assert same_matrices(lm, quantised_anew(model, "int8"))
    assert [file.name for file in model.parent.iterdir()] == [MODEL_NAME]
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"{kept}: not written (")


def test_a_folder_that_cannot_be_written_is_a_line_in_the_log(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    model.with_name("model.int8.safetensors.part").mkdir()

    assert same_matrices(loaded(model, "int8"), quantised_anew(model, "int8"))
    assert "not written" in caplog.text


def test_a_file_that_another_process_is_writing_is_left_to_it(model: Path) -> None:
    part = model.with_name("model.int8.safetensors.part")
    with part.open("wb", buffering=0) as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        theirs.write(b"half of it")

        assert same_matrices(loaded(model, "int8"), quantised_anew(model, "int8"))

        assert part.read_bytes() == b"half of it"
        assert not model.with_name("model.int8.safetensors").exists()


def test_what_a_process_left_behind_half_written_is_taken_over(model: Path) -> None:
    kept = model.with_name("model.int8.safetensors")
    loaded(model, "int8")
    whole = kept.read_bytes()
    kept.unlink()
    kept.with_name(f"{kept.name}.part").write_bytes(b"x" * 2 * len(whole))

    loaded(model, "int8")

    assert kept.read_bytes() == whole
    assert sorted(file.name for file in model.parent.iterdir()) == sorted([MODEL_NAME, kept.name])


def test_a_load_that_fails_leaves_nothing_half_written(model: Path) -> None:
    lm = Lm(tiny_configs()[0], CPU, torch.float32, "int8")
    entries = lm.entries()
    key = next(reversed(matrices(lm)))
    entries[key] = Entry(entries[key].shape, Quantized.empty("int8", 3, 3, CPU))

    with pytest.raises(RuntimeError):
        load_model(model, entries, "int8")

    assert [file.name for file in model.parent.iterdir()] == [MODEL_NAME]


LOAD_TWICE_AND_TELL_THE_PEAKS = """
import sys, torch
from pathlib import Path
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.quantize import Quantized, load_model

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

torch.set_num_threads(1)
place = Quantized.empty(sys.argv[2], 2_500, 1_000, torch.device("cpu"))
place.data.zero_()
entries = {f"layer.{i}": Entry((2_500, 1_000), place) for i in range(60)}
for _ in range(2):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    load_model(Path(sys.argv[1]), entries, sys.argv[2])
    print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@every_kind
def test_neither_quantising_nor_reading_what_is_kept_holds_more_than_a_part_of_it(tmp_path: Path, kind: Kind) -> None:
    """Of 300 MB, sparse. What is held besides the matrix is a few slices of it in float32, and what torch brings in at
    its first use.
    """
    path, each_bytes = tmp_path / "big.safetensors", 5_000_000
    header = {
        f"layer.{i}": {"dtype": "BF16", "shape": [2_500, 1_000], "data_offsets": [i * each_bytes, (i + 1) * each_bytes]}
        for i in range(60)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + 60 * each_bytes)

    ran = subprocess.run(
        [sys.executable, "-c", LOAD_TWICE_AND_TELL_THE_PEAKS, path, kind], capture_output=True, text=True, check=True
    )

    quantising_bytes, reading_bytes = map(int, ran.stdout.split())
    assert quantising_bytes < 150e6
    assert reading_bytes < 30e6

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.engine import EngineFault
from app.engine.personaplex.model.config import LmConfig, MimiConfig
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.weights import MIMI_NAME, MODEL_NAME, TOKENIZER_NAME, find_checkpoint, load
from tests.engine.tiny import lm_shapes, make_tiny_checkpoint, mimi_shapes, tiny_configs


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three tensors: `stack` [4, 3] of bfloat16, `bias` [2] of float32, `flag` [1] of int64."""
    path = tmp_path / "some.safetensors"
    stack = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)
    save_file({"stack": stack, "bias": torch.tensor([0.5, -0.5]), "flag": torch.tensor([7])}, path)
    return path


def entries(**changed: Entry | None) -> dict[str, Entry]:
    right: dict[str, Entry | None] = {
        "stack": Entry((4, 3), torch.zeros(4, 3)),
        "bias": Entry((2,), torch.zeros(2, dtype=torch.bfloat16)),
        "flag": Entry((1,), None),
    }
    return {key: entry for key, entry in (right | changed).items() if entry is not None}


def test_each_tensor_arrives_in_the_type_and_shape_of_its_place(file: Path) -> None:
    stack, bias = torch.zeros(2, 6), torch.zeros(2, dtype=torch.bfloat16)

    load(file, entries(stack=Entry((4, 3), stack), bias=Entry((2,), bias)))

    assert stack.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert bias.tolist() == [0.5, -0.5]


def test_of_a_stack_only_the_first_rows_are_taken(file: Path) -> None:
    places = torch.full((3, 3), -1.0)

    load(file, entries(stack=Entry((4, 3), places[:2], rows=2)))

    assert places.tolist() == [[0, 1, 2], [3, 4, 5], [-1, -1, -1]]


def test_a_place_may_be_a_view_whose_numbers_lie_apart(file: Path) -> None:
    turned = torch.zeros(3, 4)

    load(file, entries(stack=Entry((4, 3), turned.T)))

    assert turned.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_every_wrong_key_is_in_one_error_and_nothing_is_copied(file: Path) -> None:
    stack = torch.zeros(4, 5)
    wanted = entries(
        stack=Entry((4, 5), stack), bias=None, flag=Entry((1,), torch.zeros(1)), absent=Entry((2, 2), torch.zeros(2, 2))
    )

    with pytest.raises(EngineFault) as caught:
        load(file, wanted)

    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{file}: its tensors are not those of this model")
    assert "download it again" in first
    assert lines == [
        "absent: found nothing; right is [2, 2]",
        "bias: found F32 [2]; right is no such key",
        "flag: found I64 [1]; right is [1] of BF16, F16, F32, F64",
        "stack: found BF16 [4, 3]; right is [4, 5] of BF16, F16, F32, F64",
    ]
    assert not stack.any()


def test_of_what_is_never_read_the_shape_still_counts(file: Path) -> None:
    with pytest.raises(EngineFault, match=r"flag: found I64 \[1\]; right is \[3\]"):
        load(file, entries(flag=Entry((3,), None)))


def test_a_long_list_of_wrong_keys_is_whole_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / MODEL_NAME
    save_file({"other": torch.zeros(1)}, path)

    with pytest.raises(EngineFault) as caught:
        load(path, {key: Entry(shape, None) for key, shape in lm_shapes(LmConfig()).items()})

    keys = [line.partition(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert len(keys) == 476
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 16742817792\n",
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 4) + b"{]}!",
        struct.pack("<Q", 2) + b"{}" + b"more",
    ],
    ids=["empty", "one byte", "pointer of a git checkout", "endless header", "no json", "more than it says"],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.safetensors"
    path.write_bytes(content)

    with pytest.raises(EngineFault) as caught:
        load(path, entries())

    assert re.fullmatch(
        r"\S+some\.safetensors: cut short or no safetensors file \(.*\); download it again", str(caught.value)
    )


def test_a_file_cut_anywhere_is_never_loaded(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(EngineFault, match="cut short or no safetensors file"):
            load(file, entries())


def test_a_file_that_is_not_there_and_a_folder_in_its_place_are_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match=r"absent: no such file; download it"):
        load(tmp_path / "absent", entries())
    with pytest.raises(EngineFault, match="no safetensors file"):
        load(tmp_path, entries())


LOAD_AND_TELL_THE_PEAK = """
import sys, torch
from pathlib import Path
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.weights import load

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

torch.set_num_threads(1)
place = torch.zeros(2_500, 1_000)
before = resident("VmRSS")
load(Path(sys.argv[1]), {f"layer.{i}": Entry((2_500, 1_000), place) for i in range(60)})
print(resident("VmHWM") - before, float(place[-1, -1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_never_holds_more_than_a_part_of_the_file_in_memory(tmp_path: Path) -> None:
    """The peak that the kernel saw, of private and of mapped pages; 300 MB, sparse but for the last number."""
    path, each_bytes = tmp_path / "big.safetensors", 5_000_000
    header = {
        f"layer.{i}": {"dtype": "BF16", "shape": [2_500, 1_000], "data_offsets": [i * each_bytes, (i + 1) * each_bytes]}
        for i in range(60)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.seek(60 * each_bytes - 2, 1)
        out.write(b"\x80\x3f")

    ran = subprocess.run(
        [sys.executable, "-c", LOAD_AND_TELL_THE_PEAK, path], capture_output=True, text=True, check=True
    )

    peak_bytes, last = ran.stdout.split()
    assert int(peak_bytes) < path.stat().st_size / 4
    assert float(last) == 1.0


def test_a_whole_checkpoint_is_found_and_loaded(tmp_path: Path) -> None:
    checkpoint = find_checkpoint(make_tiny_checkpoint(tmp_path / "tiny"))
    assert (checkpoint.lm, checkpoint.mimi_config) == tiny_configs()

    for path, shapes in (
        (checkpoint.model, lm_shapes(checkpoint.lm)),
        (checkpoint.mimi, mimi_shapes(checkpoint.mimi_config)),
    ):
        places = {key: torch.full(shape, torch.nan) for key, shape in shapes.items()}
        load(path, {key: Entry(tuple(place.shape), place) for key, place in places.items()})
        stored = load_file(path)
        assert all(torch.equal(place, stored[key].float()) for key, place in places.items())


def test_the_real_files_keys_are_475_and_318() -> None:
    """What the published files hold: 8,371,408,896 and 96,151,393 numbers."""
    lm, mimi = lm_shapes(LmConfig()), mimi_shapes(MimiConfig())

    assert (len(lm), sum(torch.Size(shape).numel() for shape in lm.values())) == (475, 8_371_408_896)
    assert (len(mimi), sum(torch.Size(shape).numel() for shape in mimi.values())) == (318, 96_151_393)


def test_the_same_seed_makes_the_same_checkpoint_and_another_seed_another(tmp_path: Path) -> None:
    one, same, other = (make_tiny_checkpoint(tmp_path / name, seed) for name, seed in (("1", 0), ("2", 0), ("3", 1)))

    for file in one.iterdir():
        assert file.read_bytes() == (same / file.name).read_bytes()
    assert (one / MODEL_NAME).read_bytes() != (other / MODEL_NAME).read_bytes()


# --- the files of a checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of the right names, and nothing in them."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (MODEL_NAME, MIMI_NAME, TOKENIZER_NAME, "voices.tgz"):
        (folder / name).touch()
    return folder


def test_files_under_their_own_names_need_no_config(folder: Path) -> None:
    checkpoint = find_checkpoint(folder)

    assert checkpoint.folder == folder
    assert (checkpoint.model, checkpoint.mimi) == (folder / MODEL_NAME, folder / MIMI_NAME)
    assert (checkpoint.tokenizer, checkpoint.voices) == (folder / TOKENIZER_NAME, folder / "voices.tgz")
    assert (checkpoint.lm, checkpoint.mimi_config) == (LmConfig(), MimiConfig())


def test_every_missing_file_is_named(folder: Path) -> None:
    (folder / MIMI_NAME).unlink()
    (folder / "voices.tgz").unlink()

    with pytest.raises(EngineFault) as caught:
        find_checkpoint(folder)

    assert str(caught.value) == (
        f"{folder}: missing: {MIMI_NAME}, voices.tgz (or a folder voices with .pt files); "
        "download the model again to complete it"
    )


def test_a_folder_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match=r"absent: no such folder; download the model, or name the folder that holds"):
        find_checkpoint(tmp_path / "absent")


def test_unpacked_voices_go_before_the_archive_once_there_are_any(folder: Path) -> None:
    (folder / "voices").mkdir()
    assert find_checkpoint(folder).voices == folder / "voices.tgz"

    (folder / "voices" / "NATF2.pt").touch()
    assert find_checkpoint(folder).voices == folder / "voices"


def test_the_config_may_give_the_files_other_names(folder: Path) -> None:
    shutil.move(folder / MODEL_NAME, folder / "lm.safetensors")
    shutil.move(folder / TOKENIZER_NAME, folder / "words.model")
    names = {"moshi_name": "lm.safetensors", "mimi_name": None, "tokenizer_name": "words.model"}
    (folder / "config.json").write_text(json.dumps(names))

    checkpoint = find_checkpoint(folder)

    assert checkpoint.model == folder / "lm.safetensors"
    assert checkpoint.mimi == folder / MIMI_NAME
    assert checkpoint.tokenizer == folder / "words.model"


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\x", "..", "", 7])
def test_a_name_in_the_config_cannot_lead_out_of_the_folder(folder: Path, name: object) -> None:
    (folder / "config.json").write_text(json.dumps({"moshi_name": name}))

    with pytest.raises(
        EngineFault, match=r"config\.json: moshi_name is .*; the name of a file in the same folder is right"
    ):
        find_checkpoint(folder)


def test_what_is_missing_can_be_told_on_a_machine_without_torch(folder: Path) -> None:
    (folder / MODEL_NAME).unlink()
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "safetensors", "sentencepiece")))
from pathlib import Path
from app.engine import EngineFault
from app.engine.personaplex import sizes, voices
from app.engine.personaplex.model.weights import find_checkpoint
try:
    find_checkpoint(Path({str(folder)!r}))
except EngineFault as fault:
    print(fault)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert f"missing: {MODEL_NAME}" in ran.stdout

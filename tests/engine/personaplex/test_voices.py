import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from app.engine import EngineFault
from app.engine.personaplex.model.config import LmConfig
from app.engine.personaplex.voices import (
    CodedVoice,
    PackedVoice,
    read_packed_voice,
    unpack_voices,
    voice_file,
    voice_names,
)
from tests.engine.tiny import VOICES, make_tiny_checkpoint, packed_voice, tiny_configs

FIXTURES = Path(os.environ.get("PARITY_FIXTURES") or Path(__file__).parents[2] / "fixtures" / "parity")
CONFIG = tiny_configs()[0]


def initial_embedding(weights: dict[str, Tensor], config: LmConfig) -> Tensor:
    audio = sum((weights[f"emb.{k}.weight"][config.audio_initial].float() for k in range(16)), torch.zeros(config.dim))
    return audio + weights["text_emb.weight"][config.text_initial].float()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def weights(tiny: Path) -> dict[str, Tensor]:
    return load_file(tiny / "model.safetensors")


@pytest.fixture(scope="module")
def initial(weights: dict[str, Tensor]) -> Tensor:
    return initial_embedding(weights, CONFIG)


@pytest.fixture
def voice(weights: dict[str, Tensor]) -> dict[str, Any]:
    """A good one, of 11 frames, to be spoilt."""
    return packed_voice(CONFIG, weights, 11, torch.Generator().manual_seed(1))


def saved(folder: Path, value: object) -> Path:
    path = folder / "own.pt"
    torch.save(value, path)
    return path


# --- reading a packed voice


def test_a_voice_packed_by_the_reference_is_the_inputs_and_tokens_of_its_frames() -> None:
    """The stored voice was made from codes that are stored beside it: the delayed tokens must be theirs."""
    with safe_open(FIXTURES / "lm_tiny_io.safetensors", "pt") as stored:
        values = {key: json.loads(text) for key, text in stored.metadata().items() if text[0] in "[{"}
        codes = stored.get_tensor("voice_codes")
    config = LmConfig.of(
        {**values["config"], "silence_tokens": values["silence_tokens"], "sine_tokens": values["sine_tokens"]}
    )
    sine = torch.tensor(config.sine_tokens)
    initial = initial_embedding(load_file(FIXTURES / "lm_tiny_weights.safetensors"), config)

    voice = read_packed_voice(FIXTURES / "lm_tiny_voice.pt", config, initial)

    assert (voice.name, voice.frames) == ("lm_tiny_voice", codes.shape[1])
    assert voice.embeddings.shape == (codes.shape[1] - 1, config.dim)
    expected = torch.cat((torch.tensor([3]), codes[:1, -1], codes[1:, -2], sine))
    assert torch.equal(voice.last_column, expected)
    assert torch.equal(voice.next_acoustics, torch.cat((codes[1:, -1], sine[1:])))


@pytest.mark.parametrize(("name", "frames"), VOICES.items())
def test_the_voices_of_a_checkpoint_fit_its_tables(
    tiny: Path, tmp_path: Path, initial: Tensor, name: str, frames: int
) -> None:
    folder = unpack_voices(tiny / "voices.tgz", tmp_path / "voices")

    voice = read_packed_voice(voice_file(folder, name), CONFIG, initial)

    assert (voice.name, voice.frames, voice.embeddings.dtype) == (name, frames, torch.bfloat16)
    assert (voice.last_column.shape, voice.next_acoustics.shape) == ((17,), (14,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_makes_no_stranger_of_a_voice(
    tmp_path: Path, voice: dict[str, Any], initial: Tensor, dtype: torch.dtype
) -> None:
    path = saved(tmp_path, voice)

    assert isinstance(read_packed_voice(path, CONFIG, initial.to(dtype)), PackedVoice)


def test_a_voice_of_another_checkpoint_is_told_apart(tmp_path: Path, voice: dict[str, Any]) -> None:
    make_tiny_checkpoint(tmp_path / "other", seed=1)
    other = initial_embedding(load_file(tmp_path / "other" / "model.safetensors"), CONFIG)

    with pytest.raises(EngineFault, match=r"voice own was made for another checkpoint: .*own\.pt does not begin"):
        read_packed_voice(saved(tmp_path, voice), CONFIG, other)


def test_a_voice_that_differs_by_a_twentieth_is_another_checkpoints(
    tmp_path: Path, voice: dict[str, Any], initial: Tensor
) -> None:
    with pytest.raises(EngineFault, match="another checkpoint"):
        read_packed_voice(saved(tmp_path, voice), CONFIG, initial * 1.05)


def spoilt(change: Callable[[dict[str, Any]], Any], said: str) -> Any:
    return pytest.param(change, said, id=said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        spoilt(lambda v: [v["embeddings"], v["cache"]], "holds a list; a dict of embeddings and cache"),
        spoilt(lambda v: v["cache"], "holds a Tensor; a dict"),
        spoilt(lambda v: {}, "embeddings is missing or no tensor (found only nothing)"),
        spoilt(lambda v: {"embeddings": v["embeddings"]}, "cache is missing or no tensor (found only 'embeddings')"),
        spoilt(lambda v: v | {"embeddings": [1.0]}, "embeddings is missing or no tensor (found list)"),
        spoilt(lambda v: v | {"embeddings": v["embeddings"].to_sparse()}, "embeddings is missing or no tensor"),
        spoilt(lambda v: v | {"embeddings": v["embeddings"][..., :32]}, "found [10, 1, 1, 32]; [1 to 2997, 1, 1, 64]"),
        spoilt(lambda v: v | {"embeddings": v["embeddings"][:, 0]}, "found [10, 1, 64]"),
        spoilt(lambda v: v | {"embeddings": v["embeddings"][:0]}, "found [0, 1, 1, 64]"),
        spoilt(lambda v: v | {"embeddings": torch.zeros(1, 1, 1, 64).expand(10**9, 1, 1, 64)}, "found [1000000000, 1,"),
        spoilt(lambda v: v | {"embeddings": v["embeddings"].long()}, "found torch.int64; a float type is right"),
        spoilt(lambda v: v | {"embeddings": v["embeddings"] / 0}, "holds values that are no numbers"),
        spoilt(lambda v: v | {"cache": v["cache"][:, :, :3]}, "cache: found [1, 17, 3] of torch.int64"),
        spoilt(lambda v: v | {"cache": v["cache"].int()}, "cache: found [1, 17, 4] of torch.int32"),
        spoilt(lambda v: v | {"cache": v["cache"] - 500}, "text token -497; 0 to 400 are right for this checkpoint"),
        spoilt(lambda v: v | {"cache": v["cache"].clamp(max=3).index_fill(1, torch.tensor([5]), 97)}, "audio token 97"),
    ],
)
def test_what_is_no_voice_of_this_model_is_refused(
    tmp_path: Path, voice: dict[str, Any], initial: Tensor, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    path = saved(tmp_path, change(voice))

    with pytest.raises(EngineFault) as caught:
        read_packed_voice(path, CONFIG, initial)

    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_of_a_position_that_is_past_may_be_anything(
    tmp_path: Path, voice: dict[str, Any], initial: Tensor
) -> None:
    """Of 11 frames, positions 10 and 11 lie in columns 2 and 3; what the others hold is left over."""
    voice["cache"][0, :, :2] = -2
    voice["cache"][0, [0, 1, 9], 3] = 10**9

    assert read_packed_voice(saved(tmp_path, voice), CONFIG, initial).frames == 11


class Burglar:
    """What a hostile file holds: a call that the reader is to make for it."""

    def __init__(self, touched: Path) -> None:
        self._touched = touched

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self._touched,)


@pytest.mark.parametrize("legacy", [False, True], ids=["today's form", "older form"])
def test_code_in_a_voice_is_never_run(tmp_path: Path, voice: dict[str, Any], initial: Tensor, legacy: bool) -> None:
    touched, path = tmp_path / "touched", tmp_path / "own.pt"
    torch.save(voice | {"more": Burglar(touched)}, path, _use_new_zipfile_serialization=not legacy)

    with pytest.raises(EngineFault, match=r"own\.pt: no voice"):
        read_packed_voice(path, CONFIG, initial)
    assert not touched.exists()

    torch.load(path, weights_only=False)
    assert touched.exists()


def test_a_voice_cut_anywhere_is_never_taken(tmp_path: Path, voice: dict[str, Any], initial: Tensor) -> None:
    path = saved(tmp_path, voice)
    whole = path.read_bytes()
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        with pytest.raises(EngineFault, match=r"own\.pt: no voice"):
            read_packed_voice(path, CONFIG, initial)


def test_a_voice_in_the_older_form_is_refused(tmp_path: Path, voice: dict[str, Any], initial: Tensor) -> None:
    """Its reader breaks in many more ways on a damaged file; NVIDIA's voices are not in it."""
    torch.save(voice, tmp_path / "own.pt", _use_new_zipfile_serialization=False)

    with pytest.raises(EngineFault, match=r"own\.pt: no voice: no \.pt file of today's form"):
        read_packed_voice(tmp_path / "own.pt", CONFIG, initial)


def test_a_voice_that_is_not_there_is_said_to_be_so(tmp_path: Path, initial: Tensor) -> None:
    with pytest.raises(EngineFault, match=r"absent\.pt: no such voice; download the voices"):
        read_packed_voice(tmp_path / "absent.pt", CONFIG, initial)


def test_a_coded_voice_is_as_long_as_its_codes() -> None:
    assert CodedVoice("mine", torch.zeros(8, 7, dtype=torch.int64)).frames == 7


# --- the archive


def member(name: str, content: bytes = b"voice", **changed: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changed.items():
        setattr(info, key, value)
    return info, content


def archive(folder: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    path = folder / "voices.tgz"
    with tarfile.open(path, "w:gz") as out:
        for info, content in members:
            out.addfile(info, io.BytesIO(content))
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_archive_becomes_a_folder_of_voices(tmp_path: Path) -> None:
    packed = archive(
        tmp_path,
        member("voices", b"", type=tarfile.DIRTYPE),
        member("voices/NATM0.pt", b"one"),
        member("./NATF1.pt", b"two"),
        member("voices/._NATM0.pt", b"a Mac's own"),
        member("voices/README.md", b"other"),
    )

    folder = unpack_voices(packed, tmp_path / "deep" / "voices")

    assert folder == tmp_path / "deep" / "voices"
    assert left_in(folder) == ["NATF1.pt", "NATM0.pt"]
    assert (folder / "NATM0.pt").read_bytes() == b"one"
    assert left_in(tmp_path / "deep") == ["voices"]


def test_voices_that_are_there_are_left_as_they_are(tmp_path: Path) -> None:
    into = unpack_voices(archive(tmp_path, member("voices/A.pt", b"first")), tmp_path / "voices")

    assert unpack_voices(archive(tmp_path, member("voices/A.pt", b"second")), into) == into
    assert unpack_voices(tmp_path / "absent.tgz", into) == into
    assert (into / "A.pt").read_bytes() == b"first"


def test_an_empty_folder_is_filled_and_one_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    packed = archive(tmp_path, member("voices/A.pt"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()

    assert voice_names(unpack_voices(packed, tmp_path / "empty")) == ["A"]
    with pytest.raises(EngineFault, match=r"taken: the voices cannot be unpacked there"):
        unpack_voices(packed, tmp_path / "taken")
    assert left_in(tmp_path) == ["empty", "taken", "voices.tgz"]
    assert left_in(tmp_path / "taken") == ["mine.txt"]


def test_many_may_unpack_at_once(tmp_path: Path) -> None:
    packed = archive(tmp_path, *(member(f"voices/V{n}.pt", bytes([n]) * 50_000) for n in range(18)))
    into, begin, seen = tmp_path / "voices", threading.Barrier(8), []

    def unpack() -> None:
        begin.wait()
        seen.append(voice_names(unpack_voices(packed, into)))

    threads = [threading.Thread(target=unpack) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen == [sorted(f"V{n}" for n in range(18))] * 8
    assert left_in(tmp_path) == ["voices", "voices.tgz"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (member("../out.pt"), "member '../out.pt' reaches out of the folder"),
        (member("voices/../../out.pt"), "reaches out of the folder"),
        (member("/out.pt"), "member '/out.pt' reaches out of the folder"),
        (member("voices\\..\\out.pt"), "reaches out of the folder"),
        (member("voices/B.pt", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "member 'voices/B.pt' is a link"),
        (member("voices/B.pt", b"", type=tarfile.LNKTYPE, linkname="voices/A.pt"), "is a link or a device"),
        (member("voices/B.pt", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "is a link or a device"),
        (member("voices/B.pt", b"", type=tarfile.BLKTYPE), "is a link or a device"),
        (member("voices/B.pt", b"", type=tarfile.FIFOTYPE), "is a link or a device"),
    ],
    ids=[
        "up",
        "up from inside",
        "absolute",
        "backslashes",
        "symbolic",
        "hard",
        "character device",
        "block device",
        "pipe",
    ],
)
def test_an_archive_with_a_member_that_is_no_plain_file_inside_is_refused_whole(
    tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes], said: str
) -> None:
    (tmp_path / "here").mkdir()
    packed = archive(tmp_path, member("voices/A.pt"), bad)

    with pytest.raises(EngineFault) as caught:
        unpack_voices(packed, tmp_path / "here" / "voices")

    assert str(caught.value).startswith(f"{packed}: ")
    assert said in str(caught.value)
    assert "so nothing was unpacked" in str(caught.value)
    assert left_in(tmp_path) == ["here", "voices.tgz"]
    assert left_in(tmp_path / "here") == []


def test_a_sparse_member_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    packed = archive(
        tmp_path, member("voices/A.pt", b"x", pax_headers={"GNU.sparse.size": "9000000000", "GNU.sparse.map": "0,1"})
    )

    with pytest.raises(EngineFault, match="link or a device"):
        unpack_voices(packed, tmp_path / "voices")


def test_an_archive_that_unpacks_to_far_more_than_voices_is_refused(tmp_path: Path) -> None:
    """Before it is read to its end, which is not even there."""
    path = tmp_path / "voices.tgz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        for _ in range(129):
            out.write(bytes(2**20))
    path.write_bytes(path.read_bytes()[:-8])

    with pytest.raises(EngineFault, match=r"voices\.tgz: more than 134,217,728 bytes unpacked"):
        unpack_voices(path, tmp_path / "voices")


def test_an_archive_cut_anywhere_leaves_nothing(tmp_path: Path) -> None:
    packed = archive(tmp_path, *(member(f"voices/V{n}.pt", os.urandom(200)) for n in range(3)))
    whole = packed.read_bytes()
    for length in range(0, len(whole), 7):
        packed.write_bytes(whole[:length])
        with pytest.raises(EngineFault, match=r"voices\.tgz: (cut short or no \.tgz archive|holds no voices)"):
            unpack_voices(packed, tmp_path / "voices")
    assert left_in(tmp_path) == ["voices.tgz"]


@pytest.mark.parametrize("content", [b"", b"hello", gzip.compress(b"hello"), gzip.compress(b"x" * 2000)])
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "voices.tgz"
    path.write_bytes(content)

    with pytest.raises(EngineFault, match=r"voices\.tgz: .*; download it again$"):
        unpack_voices(path, tmp_path / "voices")


def test_an_archive_without_voices_and_one_that_is_not_there_are_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match=r"voices\.tgz: holds no voices \(NAME\.pt files\); download it again"):
        unpack_voices(archive(tmp_path, member("voices/README.md")), tmp_path / "voices")
    with pytest.raises(EngineFault, match=r"absent\.tgz: no such file; download it"):
        unpack_voices(tmp_path / "absent.tgz", tmp_path / "voices")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(EngineFault, match=r"file/voices: the voices cannot be unpacked there: "):
        unpack_voices(archive(tmp_path, member("voices/A.pt")), tmp_path / "file" / "voices")


# --- names


def test_an_unknown_voice_is_answered_with_the_right_names(tmp_path: Path) -> None:
    for name in ("NATM0.pt", "NATF1.pt", "._NATF1.pt", "notes.txt"):
        (tmp_path / name).touch()

    assert voice_names(tmp_path) == ["NATF1", "NATM0"]
    assert voice_file(tmp_path, "NATM0") == tmp_path / "NATM0.pt"
    for wrong in ("NATF9", "../secret", "", "NATM0.pt"):
        with pytest.raises(EngineFault, match=r"no voice '.*'; right are NATF1, NATM0$"):
            voice_file(tmp_path, wrong)


def test_a_folder_without_voices_says_what_to_do(tmp_path: Path) -> None:
    assert voice_names(tmp_path / "absent") == []
    with pytest.raises(EngineFault, match="no voice 'NATF1'; that folder holds no voices; download them"):
        voice_file(tmp_path / "absent", "NATF1")

"""The doctor says what is missing and what to do about it, a line each, and never loads the weights."""

import json
import math
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from app.cli import cli
from app.doctor import Finding, examine
from app.engine.personaplex.model.config import LmConfig
from app.settings import Settings
from app.weights_hub import PERSONAPLEX
from tests.engine.tiny import lm_shapes, make_tiny_checkpoint
from tests.fake_hub import FakeModelRepo, serving

TOKEN = "hf_fakeFAKEfake0123456789"
AGAIN = "fetch again with: personaline download"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def tiny(made: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModelRepo]:
    with serving(FakeModelRepo(token=TOKEN)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def findings(about: str, **given: Any) -> list[Finding]:
    return [finding for finding in examine(Settings(**given)) if finding.about == about]


def one(about: str, **given: Any) -> Finding:
    [finding] = findings(about, **given)
    return finding


# --- the whole of it


def test_a_sound_checkpoint_has_no_fault(tiny: Path) -> None:
    said = list(examine(Settings(personaplex_checkpoint=tiny, personaplex_device="cpu")))

    assert {finding.level for finding in said} == {"OK"}
    assert [finding.about for finding in said] == [
        *("python", "packages"),
        *("files", "files", "files", "voices"),
        *("token", "device", "memory", "fits"),
    ]
    assert "model.safetensors: 151 tensors, 1.6 MB" in str(said[3])
    assert str(said[-1]).startswith("OK    fits      by memory alone ")


def test_a_machine_without_anything_is_told_each_step() -> None:
    said = {finding.about: finding for finding in examine(Settings(personaplex_device="cpu"))}

    assert said["files"].level == said["token"].level == "FAIL"
    assert "fetch them with personaline download" in said["files"].said
    assert f"accept the licence on {PERSONAPLEX.page}" in said["token"].said
    assert " GB free at " in said["disk"].said


def test_the_command_ends_with_2_when_something_fails_and_0_when_nothing_does(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ill = CliRunner().invoke(cli, ["doctor"], env={"PERSONAPLEX_DEVICE": "cpu"})
    well = CliRunner().invoke(cli, ["doctor"], env={"PERSONAPLEX_DEVICE": "cpu", "PERSONAPLEX_CHECKPOINT": str(tiny)})

    assert (ill.exit_code, well.exit_code) == (2, 0)
    assert "\nFAIL  files " in ill.output
    assert ill.output.startswith("OK    python    3.")
    assert "FAIL" not in well.output


def test_without_torch_the_command_that_installs_it_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "sentencepiece"):
        monkeypatch.setitem(sys.modules, name, None)
    said = {finding.about: finding for finding in examine(Settings(personaplex_checkpoint=tiny))}

    wanted = "PersonaPlex needs torch, sentencepiece: pip install 'personaline[personaplex]'"
    assert (said["packages"].level, said["packages"].said) == ("FAIL", wanted)
    assert said["files"].level == said["voices"].level == "OK"
    assert "device" not in said


# --- files


def test_the_real_models_header_is_enough(tmp_path: Path, tiny: Path) -> None:
    """A file of 16.7 GB with nothing in it but its header: reading more of it would take minutes."""
    offset, header = 0, {}
    for key, shape in lm_shapes(LmConfig()).items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    written = json.dumps(header).encode()
    with (tiny / "model.safetensors").open("wb") as out:
        out.write(len(written).to_bytes(8, "little") + written)
        out.truncate(8 + len(written) + offset)
    (tiny / "config.json").write_text("{}")

    said = findings("files", personaplex_checkpoint=tiny, personaplex_device="cpu")

    assert str(said[1]) == "OK    files     model.safetensors: 475 tensors, 16.74 GB"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer-e351c8d8-checkpoint125.safetensors"])
def test_a_file_that_was_cut_is_to_be_fetched_again(tiny: Path, name: str) -> None:
    whole = (tiny / name).read_bytes()
    (tiny / name).write_bytes(whole[:-10])

    [said] = [one for one in findings("files", personaplex_checkpoint=tiny) if one.level == "FAIL"]
    assert said.said.startswith(f"{name} has ")
    assert said.said.endswith(AGAIN)


def headed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content", [b"", b"\x05", b"<html>" * 9, *map(headed, (b"[]", b"{..}", b"\xff", b'{"a":1}', b'{"a":{"shape":2}}'))]
)
def test_a_file_that_is_no_safetensors_is_named(tiny: Path, content: bytes) -> None:
    (tiny / "model.safetensors").write_bytes(content)

    [said] = [one for one in findings("files", personaplex_checkpoint=tiny) if one.level == "FAIL"]
    assert said.said.startswith("model.safetensors ")
    assert said.said.endswith(AGAIN)


def test_a_config_that_belongs_to_another_model_is_named(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"num_layers": 3}))

    [said] = [one for one in findings("files", personaplex_checkpoint=tiny) if one.level == "FAIL"]
    assert "where its config.json makes" in said.said


def test_files_that_are_missing_are_all_named(tiny: Path) -> None:
    for name in ("tokenizer_spm_32k_3.model", "voices.tgz"):
        (tiny / name).unlink()

    said = one("files", personaplex_checkpoint=tiny)
    assert said.level == "FAIL"
    assert "tokenizer_spm_32k_3.model, voices.tgz" in said.said


def test_a_download_that_is_not_complete_is_named_by_its_files(made: Path, tmp_path: Path) -> None:
    """The tiny files under the real ones' names have not the real ones' sizes."""
    place = tmp_path / "hub" / "models--nvidia--personaplex-7b-v1" / "snapshots" / PERSONAPLEX.revision
    shutil.copytree(made, place)

    said = findings("files", personaplex_device="cpu")[0]
    assert said.level == "FAIL"
    assert said.said.startswith("not in their whole size: tokenizer_spm_32k_3.model, voices.tgz, ")


# --- token


def test_a_token_that_works_is_named_by_its_account(hub: FakeModelRepo) -> None:
    assert str(one("token", hf_token=TOKEN)) == "OK    token     works, of the account ada"


def test_a_token_that_the_hub_refuses_fails_only_while_it_is_needed(hub: FakeModelRepo, tiny: Path) -> None:
    needed, not_needed = one("token", hf_token="hf_x"), one("token", hf_token="hf_x", personaplex_checkpoint=tiny)

    assert (needed.level, not_needed.level) == ("FAIL", "WARN")
    assert needed.said.startswith("The hub refuses the token (401)")


def test_a_malformed_token_is_never_sent(hub: FakeModelRepo) -> None:
    said = one("token", hf_token="hf_\u2026abc")

    assert said.level == "FAIL"
    assert "U+2026" in said.said


def test_without_a_network_the_token_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        said = one("token", hf_token=TOKEN)

    assert said.level == "WARN"
    assert said.said.startswith("not tried: ")
    assert TOKEN not in said.said


# --- memory


def test_what_the_real_model_needs_is_reckoned_before_it_is_there() -> None:
    said = one("memory", personaplex_device="cpu", personaplex_dtype="bfloat16", rows=1024)

    assert said.level == "FAIL"
    assert said.said.startswith("1651.51 GB for 1,024 calls in bfloat16: weights 15.38 GB, ")
    assert " 1.59 GB a call" in said.said


def test_kinds_of_a_byte_are_reckoned_and_every_kind_is_told(tiny: Path) -> None:
    given: dict[str, Any] = {"personaplex_device": "cpu", "personaplex_weights": "int8", "personaplex_kv": "int8"}
    needs, fits = (one(about, rows=1024, personaplex_dtype="bfloat16", **given) for about in ("memory", "fits"))

    assert needs.said.startswith("863.69 GB for 1,024 calls in bfloat16 with int8 weights and int8 keys and values: ")
    assert " 832.8 MB a call" in needs.said
    for kinds in ("bfloat16", "bfloat16 with int8 keys and values", "bfloat16 with int4 weights"):
        assert re.search(rf" calls? in {kinds}(,|$)", fits.said), fits.said


def test_a_configuration_that_fits_is_told_in_parts(tiny: Path) -> None:
    said = one("memory", personaplex_checkpoint=tiny, personaplex_device="cpu", rows=3)

    assert said.level == "OK"
    assert said.said.startswith("1.09 GB for 3 calls in float32: weights ")

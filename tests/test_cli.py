"""The command as a user meets it: what is wrong is said in one clear line, with exit code 2 and no traceback."""

import os
import socket
import subprocess
import sys
import wave
from pathlib import Path

import pytest

from app.settings import Settings
from app.weights_hub import PERSONAPLEX
from tests.fake_hub import FakeModelRepo, serving

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """This machine's environment without any of our settings, and a database and cache of the test's own."""
    ours = {name.upper() for name in Settings.model_fields}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {
        "ENGINE": "echo",
        "DATABASE_URL": f"sqlite:///{tmp_path / 'calls.db'}",
        "PERSONALINE_CACHE": str(tmp_path / "models"),
        "HF_HOME": str(tmp_path / "huggingface"),
        "PYTHONPATH": str(ROOT),
        "NO_COLOR": "1",
    }


def personaline(environment: dict[str, str], *words: str, cwd: Path | None = None) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "app.cli", *words]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def one_fault(result: tuple[int, str, str]) -> str:
    """The fault that was told: alone on its line, and nothing like a traceback beside it."""
    code, _, errors = result
    lines = [line for line in errors.strip().splitlines() if line.startswith("personaline: ")]

    assert code == 2, errors
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    return lines[0]


def test_a_port_in_use_is_named_with_the_way_out(environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        fault = one_fault(personaline(environment, "serve", "--port", port))

    assert fault == (
        f"personaline: cannot listen on 127.0.0.1:{port}: another program uses this port; "
        "choose another with --port or PORT"
    )


def test_a_wrong_port_is_named_with_the_right_form(environment: dict[str, str]) -> None:
    fault = one_fault(personaline(environment | {"PORT": "80 80"}, "serve"))

    assert fault == "personaline: PORT: found '80 80'; right is a port from 1 to 65535"


def test_an_address_that_is_not_this_machines_is_named(environment: dict[str, str]) -> None:
    assert "no such address" in one_fault(personaline(environment, "serve", "--host", "192.0.2.1"))


def test_broken_personas_are_all_in_one_report(environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "personas"
    folder.mkdir()
    (folder / "one.yaml").write_text("name: one\nprompt: Hi.\nvoise: NATF2\n")
    (folder / "two.yaml").write_text("name: two\nprompt: [\n")
    code, _, errors = personaline(environment | {"PERSONAS_DIR": str(folder)}, "serve")
    checked, output, _ = personaline(environment, "check", str(folder))

    assert code == 2
    assert checked == 2
    for report in (errors, output):
        assert "one.yaml:3: voise: " in report
        assert "two.yaml:" in report
    assert "Traceback" not in errors


def test_a_database_that_is_none_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "calls.db"
    broken.write_bytes(b"this is not a database, but it is long enough to be looked at " * 20)

    assert str(broken) in one_fault(personaline(environment, "serve", "--port", "8976"))
    assert broken.read_bytes().startswith(b"this is not")


def test_a_truncated_model_is_named_before_it_is_opened(environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the embedded engine's packages are not installed (extra: cascade)")
    model = tmp_path / "own.gguf"
    model.write_bytes(b"GGUF\x03\x00\x00\x00")

    given = environment | {"ENGINE": "cascade", "CASCADE_LLM": str(model)}
    assert str(model) in one_fault(personaline(given, "serve", "--port", "8977"))


def test_a_missing_model_names_the_command_that_gets_it(environment: dict[str, str]) -> None:
    pytest.importorskip("xllamacpp", reason="the embedded engine's packages are not installed (extra: cascade)")
    fault = one_fault(personaline(environment | {"ENGINE": "cascade"}, "serve", "--port", "8978"))

    assert "personaline download cascade" in fault


def test_personaplex_without_its_weights_names_the_command_that_gets_them(environment: dict[str, str]) -> None:
    fault = one_fault(personaline(environment | {"ENGINE": "personaplex"}, "serve", "--port", "8979"))

    assert "personaline download" in fault


def test_download_alone_fetches_personaplex_and_says_in_one_line_why_it_cannot(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("HF_TOKEN=hf_abc\u2026\n")
    malformed = one_fault(personaline(environment, "download", cwd=tmp_path))
    with serving(FakeModelRepo(repo=PERSONAPLEX.repo, commit=PERSONAPLEX.revision, token="hf_right")) as hub:
        asked = environment | {"HF_ENDPOINT": hub.url}
        nameless = one_fault(personaline(asked, "download"))
        refused = one_fault(personaline(asked | {"HF_TOKEN": "hf_wrong"}, "download"))
        hub.refusal = (403, "GatedRepo", "Access to this model is restricted.")
        not_accepted = one_fault(personaline(asked | {"HF_TOKEN": "hf_right"}, "download"))
    unreachable = one_fault(personaline(asked, "download"))

    assert "HF_TOKEN is malformed: it holds U+2026" in malformed
    assert "The hub wants to know who asks" in nameless
    assert "The hub refuses the token (401)" in refused
    assert f"accept the licence of {PERSONAPLEX.repo} on {PERSONAPLEX.page}" in not_accepted
    assert "cannot be reached" in unreachable


def test_offline_says_in_one_line_what_it_cannot_use(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not a recording")
    outputs = ["--output-wav", "out.wav", "--output-text", "out.json"]
    given = environment | {"ENGINE": "personaplex"}
    recording = ROOT / "app" / "simulate" / "recordings" / "hours.wav"

    broken = one_fault(personaline(given, "offline", "--input-wav", "text.wav", *outputs, cwd=tmp_path))
    without = one_fault(personaline(given, "offline", "--input-wav", str(recording), *outputs, cwd=tmp_path))

    assert "text.wav: found a file that begins with" in broken
    assert "personaline download" in without


def test_a_recording_of_the_wrong_kind_is_named_and_nobody_is_called(
    environment: dict[str, str], tmp_path: Path
) -> None:
    text = tmp_path / "speech.wav"
    text.write_text("not a recording")
    empty = tmp_path / "empty.wav"
    with wave.open(str(empty), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))

    for path in (text, empty, tmp_path / "absent.wav"):
        fault = one_fault(personaline(environment, "call", "--wav", str(path)))
        assert path.name in fault


def test_a_service_that_is_not_there_is_named(environment: dict[str, str]) -> None:
    recording = ROOT / "app" / "simulate" / "recordings" / "hours.wav"

    assert "127.0.0.1:9" in one_fault(
        personaline(environment, "call", "--wav", str(recording), "--url", "ws://127.0.0.1:9")
    )


def test_a_name_in_the_env_file_that_is_no_setting_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TWILIO_TOKEN=x\n")

    assert "TWILIO_TOKEN is not a setting" in one_fault(personaline(environment, "serve", cwd=tmp_path))


def test_the_version_can_be_asked_for(environment: dict[str, str]) -> None:
    code, output, _ = personaline(environment, "version")

    assert code == 0
    assert output.count(".") == 2

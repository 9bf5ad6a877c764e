"""ENGINE=auto takes the best that is there and says why; what is asked for by name and is not there is a fault."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from app import engine_choice
from app.engine import EngineFault, Role, Runner
from app.engine_choice import Plan, choose_engine, plan_personaplex, voices_of
from app.machine import Device, dtype_for, find_device
from app.model_files import ModelFileFault
from app.settings import Settings
from app.voice_wav import VoiceFault
from tests.engine.tiny import make_tiny_checkpoint
from tests.speech import speech, write


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("PERSONALINE_CACHE", str(tmp_path / "models"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def settings(**given: Any) -> Settings:
    return Settings(**given)


def fault(**given: Any) -> str:
    with pytest.raises(EngineFault) as caught:
        choose_engine(settings(**given))
    return str(caught.value)


def a_frame_of(runner: Runner) -> int:
    """How many samples it says after one frame of silence."""
    runner.warm_up([])
    runner.join(0, Role("ada", "You work for the harbour."))
    spoken = runner.step(np.zeros((runner.rows, 1_920), np.float32), np.arange(runner.rows) == 0)
    runner.close()
    assert spoken[0] is not None
    return len(spoken[0].pcm)


# --- auto


def test_auto_takes_personaplex_where_its_weights_and_a_device_for_them_are(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A small model needs no GPU."""
    caplog.set_level(logging.INFO, "personaline")
    name, make = choose_engine(settings(personaplex_checkpoint=tiny))

    assert name == "personaplex"
    assert [line for line in caplog.messages if "ENGINE" in line] == [caplog.messages[-1]]
    assert caplog.messages[-1].startswith("ENGINE=auto takes PersonaPlex: tiny, float32 on CPU, ")
    assert caplog.messages[-1].endswith(" GB free, 1 call at once")
    assert a_frame_of(make()) == 1_920


def test_auto_without_weights_takes_the_cascade_says_why_and_leaves_torch_alone(tmp_path: Path) -> None:
    code = """if True:
        import logging, sys
        from app.engine_choice import choose_engine
        from app.model_files import ModelFileFault
        from app.settings import Settings
        logging.basicConfig(level="INFO", format="%(name)s %(message)s", stream=sys.stdout)
        try:
            choose_engine(Settings())
        except ModelFileFault as fault:
            print("fault", fault)
        print("torch" in sys.modules)
        """
    ours = {name.upper() for name in Settings.model_fields}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=kept | {"HF_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )

    lines = [line for line in ran.stdout.splitlines() if not line.startswith("alembic")]
    assert lines[0].startswith("personaline ENGINE=auto takes the cascade: PersonaPlex's weights are not in "), ran
    assert "personaline download" in lines[0]
    assert "personaline download cascade" in lines[1]
    assert lines[-1] == "False"


def test_auto_without_the_packages_takes_the_cascade(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "personaline")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModelFileFault, match="download cascade"):
        choose_engine(settings(personaplex_checkpoint=tiny))

    reason = "PersonaPlex needs torch: pip install 'personaline[personaplex]'"
    assert caplog.messages[-1] == f"ENGINE=auto takes the cascade: {reason}"


def test_the_cascade_is_taken_by_name_whatever_weights_there_are(tiny: Path) -> None:
    with pytest.raises(ModelFileFault):
        choose_engine(settings(engine="cascade", personaplex_checkpoint=tiny))


# --- by name


def test_personaplex_without_weights_names_the_folder_and_the_command(tmp_path: Path) -> None:
    said = fault(engine="personaplex")

    assert said.startswith(f"PersonaPlex's weights are not in {tmp_path / 'hub'}")
    assert said.endswith("fetch them with personaline download, or name their folder in PERSONAPLEX_CHECKPOINT")


def test_a_checkpoint_with_files_missing_names_them_all(tiny: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"")
    said = fault(engine="personaplex", personaplex_checkpoint=part)

    assert "tokenizer_spm_32k_3.model" in said
    assert "voices.tgz" in said
    assert "personaline download" in said


def test_a_gpu_that_is_asked_for_and_not_there_is_named(tiny: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")

    assert fault(engine="personaplex", personaplex_checkpoint=tiny, personaplex_device="cuda").startswith(
        "there is no NVIDIA GPU here"
    )


def test_a_large_model_is_not_put_on_the_cpu_unasked() -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has a GPU")

    with pytest.raises(EngineFault, match="there is no GPU here"):
        find_device("auto", 15_375_458_304)
    assert find_device("cpu", 15_375_458_304).kind == "cpu"


def test_more_calls_than_fit_are_refused_with_how_many_do(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Device("cpu", "CPU", 1_100_000_000)
    monkeypatch.setattr(engine_choice, "find_device", lambda wanted, weights_bytes: small)
    said = fault(engine="personaplex", personaplex_checkpoint=tiny, rows=1024)

    most = re.search(r"^PersonaPlex needs \d\.\d GB for 1024 calls in float32, .* free: ROWS=(\d+) is the most$", said)
    assert most is not None
    assert plan_personaplex(settings(personaplex_checkpoint=tiny, rows=int(most[1]))).rows == int(most[1])


def test_a_device_too_small_for_one_call_sends_to_the_doctor(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Device("cuda", "NVIDIA T4", 500_000_000)
    monkeypatch.setattr(engine_choice, "find_device", lambda wanted, weights_bytes: full)

    assert fault(engine="personaplex", personaplex_checkpoint=tiny).endswith(
        "GB for 1 call in bfloat16, and there is NVIDIA T4, 0.5 GB free: see what would fit with: personaline doctor"
    )


# --- what is taken


def plan_on(monkeypatch: pytest.MonkeyPatch, device: Device, **given: Any) -> Plan:
    monkeypatch.setattr(engine_choice, "find_device", lambda wanted, weights_bytes: device)
    return plan_personaplex(settings(**given))


def test_an_nvidia_gpu_takes_as_many_calls_as_fit_up_to_64(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = (Device("cuda", "NVIDIA", free) for free in (140_000_000_000, 1_100_000_000))
    most = plan_on(monkeypatch, large, personaplex_checkpoint=tiny)
    fewer = plan_on(monkeypatch, small, personaplex_checkpoint=tiny)

    assert (most.rows, most.dtype) == (64, "bfloat16")
    assert 1 < fewer.rows < 64
    assert plan_on(monkeypatch, large, personaplex_checkpoint=tiny, rows=100).rows == 100


def test_other_devices_take_one_call(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_on(monkeypatch, Device("mps", "Apple GPU", 60_000_000_000), personaplex_checkpoint=tiny)

    assert (plan.rows, plan.dtype) == (1, "bfloat16")


@pytest.mark.parametrize(
    ("wanted", "kind", "taken"),
    [
        ("auto", "cuda", "bfloat16"),
        ("auto", "mps", "bfloat16"),
        ("auto", "cpu", "float32"),
        ("float16", "mps", "float16"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_the_precision_follows_the_device_unless_it_is_named(wanted: str, kind: Any, taken: str) -> None:
    assert dtype_for(wanted, kind) == taken


# --- voices


def test_a_packed_voice_is_unpacked_when_first_asked_for(tmp_path: Path) -> None:
    plan = plan_personaplex(settings(personaplex_checkpoint=make_tiny_checkpoint(tmp_path / "new")))
    voice = voices_of(plan.checkpoint, tmp_path)

    assert voice("NATM1") == tmp_path / "new" / "voices" / "NATM1.pt"
    with pytest.raises(EngineFault, match="no voice 'NATF9'; right are NATF2, NATM1"):
        voice("NATF9")


def test_a_wav_voice_lies_beside_the_personas(tiny: Path, tmp_path: Path) -> None:
    write(tmp_path / "mine.wav", speech(16_000), 16_000)
    voice = voices_of(plan_personaplex(settings(personaplex_checkpoint=tiny)).checkpoint, tmp_path)

    pcm = voice("mine.wav")

    assert isinstance(pcm, np.ndarray)
    assert len(pcm) == 24_000
    with pytest.raises(VoiceFault, match=r"yours\.wav: there is no such file"):
        voice("yours.wav")

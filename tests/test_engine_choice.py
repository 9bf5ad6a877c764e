"""ENGINE=auto takes the best that is there and says why; what is asked for by name and is not there is a fault."""

import logging
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from app import engine_choice
from app.engine import EngineFault, Role, Runner
from app.engine.personaplex.model.config import LmConfig, MimiConfig
from app.engine_choice import Plan, best_fit, choose_engine, log_kinds, plan_personaplex, remedy_for, voices_of
from app.machine import Device, dtype_for, find_device, require_compiler
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
    choice = choose_engine(settings(personaplex_checkpoint=tiny))

    assert (choice.name, choice.own_process, choice.rows) == ("personaplex", True, 1)
    assert [line for line in caplog.messages if "ENGINE" in line] == [caplog.messages[-1]]
    assert caplog.messages[-1].startswith("ENGINE=auto takes PersonaPlex: tiny, float32 on CPU, ")
    assert caplog.messages[-1].endswith(" GB free, 1 call at once")
    assert a_frame_of(pickle.loads(pickle.dumps(choice.make))()) == 1_920


def test_the_other_engines_stay_in_this_process() -> None:
    echo, more = choose_engine(settings(engine="echo")), choose_engine(settings(engine="echo", rows=3))

    assert (echo.name, echo.own_process, echo.rows) == ("echo", False, 200)
    assert (more.make().rows, more.rows) == (3, 3)


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


def plan_on(monkeypatch: pytest.MonkeyPatch, device: Device, **given: Any) -> Plan:
    monkeypatch.setattr(engine_choice, "find_device", lambda wanted, weights_bytes: device)
    return plan_personaplex(settings(**given))


def refused(monkeypatch: pytest.MonkeyPatch, device: Device, **given: Any) -> str:
    with pytest.raises(EngineFault) as caught:
        plan_on(monkeypatch, device, **given)
    return str(caught.value)


def test_more_calls_than_fit_are_refused_with_how_many_do(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Device("cpu", "CPU", 1_100_000_000)
    said = refused(monkeypatch, small, personaplex_checkpoint=tiny, rows=1024)

    most = re.search(r"^PersonaPlex needs \d\.\d GB for 1024 calls in float32, .* free: ROWS=(\d+) is the most$", said)
    assert most is not None
    assert plan_on(monkeypatch, small, personaplex_checkpoint=tiny, rows=int(most[1])).rows == int(most[1])


def test_a_device_too_small_for_one_call_sends_to_the_doctor(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Device("cuda", "NVIDIA T4", 500_000_000)

    assert refused(monkeypatch, full, personaplex_checkpoint=tiny).endswith(
        "GB for 1 call in bfloat16 with int8 weights, and there is NVIDIA T4, 0.5 GB free: "
        "see what would fit with: personaline doctor"
    )


@pytest.mark.parametrize("capability", [(8, 6), (8, 0), (7, 5)])
@pytest.mark.parametrize("kind", ["personaplex_weights", "personaplex_kv"])
def test_fp8_on_a_gpu_without_it_names_int8(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kind: str
) -> None:
    older, newer = (Device("cuda", "NVIDIA", 80 * 10**9, one) for one in (capability, (8, 9)))
    found = "there is NVIDIA with {}.{}".format(*capability)
    said = refused(monkeypatch, older, personaplex_checkpoint=tiny, **{kind: "fp8"})

    assert said == f"fp8 needs an NVIDIA GPU of compute capability 8.9 or more, and {found}: int8 is right here"
    plan = plan_on(monkeypatch, newer, personaplex_checkpoint=tiny, **{kind: "fp8"})
    assert "fp8" in (plan.weights, plan.kv)


def test_fp8_is_nothing_for_apples_gpus(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apple = Device("mps", "Apple GPU", 60 * 10**9)

    assert "and there is Apple GPU: int8 is right here" in refused(
        monkeypatch, apple, personaplex_checkpoint=tiny, personaplex_kv="fp8"
    )


def test_a_gpu_is_asked_by_another_process_and_this_one_never_imports_torch(tiny: Path) -> None:
    code = """if True:
        import sys
        from app import engine_choice
        from app.settings import Settings
        engine_choice.may_be_gpu = lambda wanted: True
        print(engine_choice.choose_engine(Settings()).rows, "torch" in sys.modules)
        """
    ours = {name.upper() for name in Settings.model_fields}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    given = {"PERSONAPLEX_CHECKPOINT": str(tiny), "PERSONAPLEX_DEVICE": "cpu", "ENGINE": "personaplex"}
    ran = subprocess.run([sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, timeout=120)

    assert ran.stdout == "1 False\n", ran.stderr


def test_a_fault_comes_back_whole_from_another_process() -> None:
    """As everything does that crosses: pickled."""
    fault = pickle.loads(pickle.dumps(EngineFault("there is no GPU here")))

    assert (type(fault), str(fault)) == (EngineFault, "there is no GPU here")


# --- what is taken


def test_an_nvidia_gpu_takes_as_many_calls_as_fit_up_to_256_and_measures_them(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = (Device("cuda", "NVIDIA", free) for free in (140_000_000_000, 1_100_000_000))
    most = plan_on(monkeypatch, large, personaplex_checkpoint=tiny)
    fewer = plan_on(monkeypatch, small, personaplex_checkpoint=tiny)

    assert (most.rows, most.dtype, most.graphs) == (256, "bfloat16", True)
    assert 1 < fewer.rows < 64
    assert most.measured == fewer.measured
    assert most.measured is not None
    assert most.measured.parent == tmp_path / "models"
    assert str(most).endswith("up to 256 calls at once")


def test_rows_that_are_given_are_taken_unmeasured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device("cuda", "NVIDIA", 140_000_000_000)
    plan = plan_on(monkeypatch, gpu, personaplex_checkpoint=tiny, rows=1000, personaplex_graphs=False)

    assert (plan.rows, plan.measured, plan.graphs) == (1000, None, False)


REAL = LmConfig(), MimiConfig()


@pytest.mark.parametrize(
    ("free_gb", "given", "kinds", "calls"),
    [
        (12, {}, ("int8", "int8"), 1),
        (16, {}, ("int8", "int8"), 6),
        (24, {}, ("int8", "bf16"), 7),
        (32, {}, ("bf16", "bf16"), 8),
        (80, {}, ("bf16", "bf16"), 38),
        (141, {}, ("bf16", "bf16"), 76),
        # ROWS may ask for more than that, or be content with less.
        (24, {"rows": 3}, ("bf16", "bf16"), 3),
        (24, {"rows": 12}, ("int8", "int8"), 15),
        (84.5, {"rows": 75}, ("bf16", "int8"), 79),
        # What is asked for is taken, whatever else would fit.
        (24, {"personaplex_weights": "bf16"}, ("bf16", "int8"), 7),
        (24, {"personaplex_weights": "bf16", "personaplex_kv": "bf16"}, ("bf16", "bf16"), 3),
        (24, {"personaplex_kv": "int8"}, ("bf16", "int8"), 7),
        (12, {"personaplex_weights": "int4"}, ("int4", "int8"), 5),
        (80, {"personaplex_weights": "fp8", "personaplex_kv": "fp8"}, ("fp8", "fp8"), 82),
    ],
)
def test_the_real_model_is_quantised_only_where_fewer_than_four_calls_or_rows_fit(
    free_gb: float, given: dict[str, Any], kinds: tuple[str, str], calls: int
) -> None:
    """By arithmetic, as docs/running-on-a-gpu.md has it. Weights go before keys and values."""
    gpu = Device("cuda", "NVIDIA", int(free_gb * 1e9), (9, 0))
    fit = best_fit(settings(**given), *REAL, gpu, "bfloat16")

    assert (fit.weights, fit.kv) == kinds
    assert fit.calls == calls


def test_nothing_is_quantised_unasked_where_there_is_no_nvidia_gpu() -> None:
    for kind, dtype in (("cpu", "float32"), ("mps", "bfloat16")):
        fit = best_fit(settings(), *REAL, Device(kind, "x", 16 * 10**9), dtype)  # type: ignore[arg-type]

        assert (fit.weights, fit.kv, fit.calls) == ("bf16", "bf16", 0)


def test_what_would_make_room_for_a_call_is_named(tiny: Path) -> None:
    """int8 before int4."""

    def remedy(free_gb: float, **given: Any) -> str:
        gpu = Device("cuda", "NVIDIA", int(free_gb * 1e9))
        return remedy_for(best_fit(settings(**given), *REAL, gpu, "bfloat16"), *REAL, gpu, "bfloat16")

    assert remedy(16, personaplex_weights="bf16") == "PERSONAPLEX_WEIGHTS=int8 and PERSONAPLEX_KV=int8 make room for 6"
    assert remedy(10) == "PERSONAPLEX_WEIGHTS=int4 and PERSONAPLEX_KV=int8 make room for 3, as a last resort"
    assert remedy(6) == "see what would fit with: personaline doctor"


def test_the_log_says_what_was_quantised_unasked_and_warns_of_int4(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "personaline")
    whole = plan_personaplex(settings(personaplex_checkpoint=tiny))
    gpu = Device("cuda", "NVIDIA", 10**9)
    log_kinds(settings(), replace(whole, device=gpu))
    assert not caplog.messages
    log_kinds(settings(), replace(whole, device=gpu, weights="int8", kv="int8"))
    log_kinds(settings(personaplex_weights="int4"), replace(whole, device=gpu, weights="int4"))

    assert caplog.messages[0] == (
        "float32 with int8 weights and int8 keys and values: fewer than 4 calls fit otherwise; "
        "PERSONAPLEX_WEIGHTS=bf16 and PERSONAPLEX_KV=bf16 keep all as it is"
    )
    assert caplog.messages[1].startswith("int4 weights are a last resort: ")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


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
    voice = pickle.loads(pickle.dumps(voices_of(plan.checkpoint, tmp_path)))

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


def test_a_machine_whose_triton_has_no_c_compiler_is_told_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="it has no wheel for this system")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineFault, match="apt-get install gcc libc6-dev"):
        require_compiler()

    (tmp_path / "gcc").touch(0o755)
    require_compiler()

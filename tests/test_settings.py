from pathlib import Path

import pytest

from app.settings import Settings, SettingsFault, load_settings, misspelt


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def fault(**environment: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SettingsFault) as caught:
            load_settings()
    return str(caught.value)


def test_nothing_needs_to_be_set() -> None:
    settings = load_settings()

    assert (settings.engine, settings.port, settings.base_url) == ("auto", 8000, "http://127.0.0.1:8000")
    assert settings.personas_dir.joinpath("operator.yaml").is_file()


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("PORT=8001\nHOST=127.0.0.2\nLOG_LEVEL=DEBUG\n")
    monkeypatch.setenv("HOST", "127.0.0.3")

    settings = load_settings(port=8002)

    assert (settings.port, settings.host, settings.log_level) == (8002, "127.0.0.3", "debug")


def test_a_malformed_setting_is_named_with_what_is_right() -> None:
    assert fault(PORT="ninety") == "PORT: found 'ninety'; right is a port from 1 to 65535"
    assert fault(PORT="70000").startswith("PORT: found '70000'")
    assert fault(ENGINE="gpu") == "ENGINE: found 'gpu'; right is auto, personaplex, cascade or echo"
    assert "auto, cuda, mps or cpu" in fault(PERSONAPLEX_DEVICE="tpu")
    assert "auto, bfloat16, float32 or float16" in fault(PERSONAPLEX_DTYPE="int8")
    assert "auto, bf16, int8, fp8 or int4" in fault(PERSONAPLEX_WEIGHTS="q4")
    assert "auto, bf16, int8 or fp8" in fault(PERSONAPLEX_KV="int4")
    assert "1, or 0 to look for faults" in fault(PERSONAPLEX_GRAPHS="cuda")
    assert "rebuild or slide" in fault(PERSONAPLEX_WINDOW="grow")
    assert "https://voice.example.com" in fault(PUBLIC_URL="voice.example.com")
    assert "sqlite:///" in fault(DATABASE_URL="mysql://x/y")


def test_how_weights_and_keys_are_kept_is_left_to_the_machine_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    left = load_settings()
    monkeypatch.setenv("PERSONAPLEX_WEIGHTS", "INT8")
    monkeypatch.setenv("PERSONAPLEX_KV", "fp8")
    monkeypatch.setenv("PERSONAPLEX_GRAPHS", "0")
    chosen, given = load_settings(), load_settings(personaplex_weights="int4", personaplex_kv="int8")

    kinds = [(one.personaplex_weights, one.personaplex_kv, one.personaplex_graphs) for one in (left, chosen, given)]
    assert kinds == [("auto", "auto", True), ("int8", "fp8", False), ("int4", "int8", False)]


def test_every_malformed_setting_is_in_the_report() -> None:
    assert [line.split(":")[0] for line in fault(PORT="x", LOG_LEVEL="loud").splitlines()] == ["PORT", "LOG_LEVEL"]


def test_a_name_in_the_file_that_is_no_setting_is_named_with_the_one_meant() -> None:
    Path(".env").write_text("TWILIO_AUTH_TOKN=x\n")

    with pytest.raises(SettingsFault, match="TWILIO_AUTH_TOKN is not a setting; did you mean TWILIO_AUTH_TOKEN"):
        load_settings()


def test_a_name_in_the_environment_that_is_nearly_a_setting_is_worth_a_warning() -> None:
    assert misspelt({"TWILIO_AUTH_TOKN": "x", "PATH": "/bin", "HOSTNAME": "h", "PORT": "1"}) == [
        "TWILIO_AUTH_TOKN is not a setting; did you mean TWILIO_AUTH_TOKEN?"
    ]


def test_an_empty_value_is_the_same_as_none() -> None:
    Path(".env").write_text("TWILIO_AUTH_TOKEN=\nPUBLIC_URL=\nCASCADE_LLM=\nHF_TOKEN=\nPERSONAPLEX_CHECKPOINT=\n")
    settings = load_settings()

    assert settings.twilio_auth_token is None
    assert settings.hf_token is None
    assert settings.personaplex_checkpoint is None
    assert settings.cascade_llm is None
    assert settings.public_url is None


def test_a_secret_is_never_shown() -> None:
    Path(".env").write_text("TWILIO_AUTH_TOKEN=fake_auth_token_0123456789abcdef\nHF_TOKEN=hf_fake\n")

    assert "fake_auth_token" not in repr(load_settings())
    assert "hf_fake" not in repr(load_settings())


def test_the_hubs_token_of_the_environment_wins_over_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("HF_TOKEN=hf_file\n")
    from_the_file = load_settings().hf_token
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    from_the_environment = load_settings().hf_token

    assert from_the_file is not None
    assert from_the_environment is not None
    assert from_the_file.get_secret_value() == "hf_file"
    assert from_the_environment.get_secret_value() == "hf_environment"

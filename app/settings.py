"""Settings: one frozen object, read once from the environment and `.env`, passed down."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.store import database_url as to_database_url

_HERE = Path(__file__).resolve().parent.parent
_SECRETS = {"TWILIO_AUTH_TOKEN", "HF_TOKEN"}


class SettingsFault(Exception):
    """One or more settings cannot be used. One line for each: its name, what was found, what is right."""


def _public_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError("an address such as https://voice.example.com is right")
    return text.rstrip("/")


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _absent(value: object) -> object:
    """`NAME=` in an environment file means that the setting is not given."""
    return None if value == "" else value


Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "bfloat16", "float32", "float16"]
Weights = Literal["auto", "bf16", "int8", "fp8", "int4"]
Kv = Literal["auto", "bf16", "int8", "fp8"]
PublicUrl = Annotated[str, AfterValidator(_public_url)]
OptionalPath = Annotated[Path | None, BeforeValidator(_absent)]
OptionalText = Annotated[str | None, BeforeValidator(_absent)]
OptionalSecret = Annotated[SecretStr | None, BeforeValidator(_absent)]


class Settings(BaseSettings):
    """Field names are the environment's, in lower case."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_file_encoding="utf-8")

    engine: Annotated[Literal["auto", "personaplex", "cascade", "echo"], BeforeValidator(_lower)] = Field(
        default="auto", description="auto, personaplex, cascade or echo"
    )
    rows: int | None = Field(default=None, ge=1, le=1024, description="calls at once, 1 to 1024")
    host: str = Field(default="127.0.0.1", min_length=1, description="an address to listen on, such as 127.0.0.1")
    port: int = Field(default=8000, ge=1, le=65_535, description="a port from 1 to 65535")
    public_url: Annotated[PublicUrl | None, BeforeValidator(_absent)] = Field(
        default=None, description="what carriers call, such as https://voice.example.com"
    )
    database_url: Annotated[str, AfterValidator(to_database_url)] = Field(
        default="sqlite:///personaline.db", description="sqlite:///file.db or postgresql://user@host/name"
    )
    personas_dir: Path = Field(default=_HERE / "personas", description="a folder of persona files")
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        default="info", description="debug, info, warning or error"
    )
    twilio_account_sid: OptionalText = Field(default=None, description="AC and 32 hexadecimal digits")
    twilio_auth_token: OptionalSecret = Field(default=None, description="the account's primary auth token")
    dev_allow_unsigned: bool = Field(default=False, description="1 for local trials only, else 0")
    hf_token: OptionalSecret = Field(default=None, description="a Hugging Face access token")
    personaplex_checkpoint: OptionalPath = Field(default=None, description="a folder with PersonaPlex's weights")
    personaplex_device: Annotated[Device, BeforeValidator(_lower)] = Field(
        default="auto", description="auto, cuda, mps or cpu"
    )
    personaplex_dtype: Annotated[Dtype, BeforeValidator(_lower)] = Field(
        default="auto", description="auto, bfloat16, float32 or float16"
    )
    personaplex_weights: Annotated[Weights, BeforeValidator(_lower)] = Field(
        default="auto", description="auto, bf16, int8, fp8 or int4"
    )
    personaplex_kv: Annotated[Kv, BeforeValidator(_lower)] = Field(
        default="auto", description="auto, bf16, int8 or fp8"
    )
    personaplex_graphs: bool = Field(default=True, description="1, or 0 to look for faults")
    personaplex_window: Annotated[Literal["rebuild", "slide"], BeforeValidator(_lower)] = Field(
        default="rebuild", description="rebuild or slide"
    )
    cascade_llm: OptionalPath = Field(default=None, description="a GGUF chat model")
    cascade_asr: OptionalPath = Field(default=None, description="a folder with a moonshine tiny model")
    cascade_tts: OptionalPath = Field(default=None, description="a hibari voice (.onnx)")
    cascade_vad: OptionalPath = Field(default=None, description="a silero model in ggml form (.bin)")

    @property
    def base_url(self) -> str:
        """What carriers call: PUBLIC_URL, or this machine's own address for local trials."""
        return self.public_url or f"http://{self.host}:{self.port}"


def load_settings(env_file: Path = Path(".env"), **overrides: Any) -> Settings:
    """Read the environment, then `.env`, then what the command line gave.

    Raises:
        SettingsFault: every setting that is unknown or malformed, a line each.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    unknown = _unknown_in(env_file) if env_file.is_file() else []
    if unknown:
        raise SettingsFault("\n".join(unknown))
    try:
        return Settings(_env_file=env_file, **given)
    except ValidationError as error:
        raise SettingsFault("\n".join(_line(dict(fault)) for fault in error.errors())) from error


def misspelt(environment: Mapping[str, str]) -> list[str]:
    """Names in the environment that look like a setting with a letter wrong: worth a warning, no more."""
    known = [name.upper() for name in Settings.model_fields]
    return [
        f"{name} is not a setting; did you mean {close[0]}?"
        for name in environment
        if name not in known and (close := difflib.get_close_matches(name, known, n=1, cutoff=0.93))
    ]


def _unknown_in(env_file: Path) -> list[str]:
    known = {name.upper() for name in Settings.model_fields}
    try:
        names = list(dotenv_values(env_file))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsFault(f"{env_file}: cannot be read: {error}") from error
    return [_unknown_line(env_file, name, known) for name in names if name.upper() not in known]


def _unknown_line(env_file: Path, name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name.upper(), known, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{env_file}: {name} is not a setting; {meant}Known: {', '.join(sorted(known))}"


def _line(fault: dict[str, Any]) -> str:
    field = str(fault["loc"][0])
    name, found = field.upper(), fault.get("input")
    right = Settings.model_fields[field].description if field in Settings.model_fields else "no such setting"
    shown = "a secret value" if name in _SECRETS else repr(os.fspath(found) if isinstance(found, Path) else found)
    return f"{name}: found {shown}; right is {right}"

"""Who answers: one YAML file a persona, every fault of every file in one report, reloaded when a file changes."""

import asyncio
import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails
from watchfiles import awatch

from app.strict_yaml import Document, Fault, Loc, found, word

logger = logging.getLogger("personaline.personas")

VALUE_LIMIT = 500  # characters of one variable's value

Language = Literal["en"]
VOICES = (
    "NATF0", "NATF1", "NATF2", "NATF3", "NATM0", "NATM1", "NATM2", "NATM3",
    "VARF0", "VARF1", "VARF2", "VARF3", "VARF4", "VARM0", "VARM1", "VARM2", "VARM3", "VARM4",
)  # fmt: skip
_WAV = r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}\.wav"

_TEMPLATES = ("prompt", "greeting", "busy")
"""The texts that may hold placeholders."""
_PLACEHOLDER = re.compile(r"\{\{\s*([a-z][a-z0-9_]{0,39})\s*\}\}")
_BRACES = re.compile(r"\{\{[^{}]*\}\}|\{\{|\}\}")


def _text(pattern: str, says: str) -> Any:
    """A constraint whose wording serves twice: in a fault here, and under the cursor in an editor."""
    return Field(pattern=pattern, json_schema_extra={"patternErrorMessage": says})


Name = Annotated[str, _text(r"^[a-z][a-z0-9_-]{0,39}$", "the file's own name: a-z, then up to 39 of a-z 0-9 _ -")]
VariableName = Annotated[str, _text(r"^[a-z][a-z0-9_]{0,39}$", "a variable name: a-z, then up to 39 of a-z 0-9 _")]
PhoneNumber = Annotated[str, _text(r"^\+[1-9][0-9]{6,14}$", 'a number with + and country code such as "+15550100123"')]
Voice = Annotated[
    str,
    Field(pattern=f"^({'|'.join(VOICES)}|{_WAV})$"),
    WithJsonSchema(
        {
            "anyOf": [{"enum": list(VOICES)}, {"type": "string", "pattern": f"^{_WAV}$"}],
            "patternErrorMessage": f"one of {', '.join(VOICES)}, or a wav file beside this one such as my-voice.wav,",
        }
    ),
]
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=6000)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Sampling(_Strict):
    """How freely the speech model chooses its next token. The defaults are PersonaPlex's own."""

    text_temperature: float = Field(
        default=0.7, ge=0, le=2, description="Freedom of the words; 0 always takes the likeliest."
    )
    text_top_k: int = Field(default=25, ge=1, le=1_000, description="Words come from this many likeliest tokens.")
    audio_temperature: float = Field(
        default=0.8, ge=0, le=2, description="Freedom of the sound; 0 always takes the likeliest."
    )
    audio_top_k: int = Field(default=250, ge=1, le=2_048, description="Sound comes from this many likeliest tokens.")


class Limits(_Strict):
    """When a call is ended from our side."""

    duration_s: float = Field(default=1800, ge=10, le=86_400, description="The longest a call may last, in seconds.")
    silence_s: float = Field(default=60, ge=5, le=3_600, description="Hang up after nobody spoke for so many seconds.")


@dataclass(frozen=True, slots=True)
class Filled:
    """A persona's texts for one call: every placeholder replaced, each text on one line."""

    prompt: str
    greeting: str
    busy: str


class WrongVariables(ValueError):
    """A call's variables do not fit its persona. The message names each one."""

    def __init__(self, persona: str, missing: Sequence[str], unknown: Sequence[str], too_long: Sequence[str]) -> None:
        self.missing, self.unknown, self.too_long = tuple(missing), tuple(unknown), tuple(too_long)
        kinds = {"missing": missing, "unknown": unknown, f"longer than {VALUE_LIMIT} characters": too_long}
        said = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        super().__init__(f"variables of persona {persona}: {said}")


class Persona(_Strict):
    """Who answers a call: one file of the personas folder."""

    name: Name = Field(description="The file's name without .yaml.")
    summary: str = Field(default="", max_length=200, description="One line for lists and pages. Never spoken.")
    voice: Voice = Field(
        default="NATF2",
        description="One of PersonaPlex's voices (NAT natural, VAR varied; F female, M male), or a wav file beside "
        "this one with half a second or more of the voice.",
    )
    language: Language = Field(default="en", description="The language spoken.")
    prompt: Prompt = Field(
        description='The role: "You work for X which is a Y and your name is Z. Information: facts, prices, rules."'
    )
    variables: Mapping[VariableName, Annotated[str, Field(max_length=VALUE_LIMIT)] | None] = Field(
        default={}, description="Each {{placeholder}} with its default, or null where every call must give a value."
    )
    greeting: str = Field(default="", max_length=500, description="Said first. Empty: the caller begins.")
    busy: str = Field(
        default="",
        max_length=500,
        description="Said by the carrier, in its own voice, to a caller for whom there is no room; it then hangs up. "
        "Empty: the busy tone.",
    )
    numbers: tuple[PhoneNumber, ...] = Field(default=(), description="The phone numbers this persona answers.")
    default: bool = Field(default=False, description="Answers every number that no persona names. One persona only.")
    sampling: Sampling = Field(default=Sampling(), description="How freely the speech model chooses.")
    limits: Limits = Field(default=Limits(), description="The longest call and the longest silence.")
    record: bool = Field(default=False, description="Keep the sound of the call.")
    transcribe: bool = Field(default=True, description="Keep the words of the call.")

    def fill(self, variables: Mapping[str, str] | None = None) -> Filled:
        """Put a call's variables into prompt, greeting and busy words. What a value holds is never expanded again.

        Raises:
            WrongVariables: missing, unknown or too long ones, all of them named.
        """
        given = variables or {}
        values = {name: text for name, text in {**self.variables, **given}.items() if text is not None}
        missing = [name for name in self.variables if name not in values]
        unknown = [name for name in given if name not in self.variables]
        too_long = [name for name, text in values.items() if len(text) > VALUE_LIMIT]
        if missing or unknown or too_long:
            raise WrongVariables(self.name, missing, unknown, too_long)
        return Filled(*(_filled(getattr(self, field), values) for field in _TEMPLATES))

    @property
    def required(self) -> tuple[str, ...]:
        """The variables that every call must give."""
        return tuple(name for name, default in self.variables.items() if default is None)


def _filled(template: str, values: Mapping[str, str]) -> str:
    text = _PLACEHOLDER.sub(lambda found: values[found[1]], template)
    # A role prompt is one paragraph to both engines, and a control character has no sound.
    return " ".join("".join(" " if unicodedata.category(c)[0] == "C" else c for c in text).split())


class PersonaFaults(Exception):
    """Everything wrong with the persona files, one line a fault."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(map(str, faults)))


@dataclass(frozen=True)
class Personas:
    """The personas of one folder, in the order of their names. Never changes: a reload makes another one."""

    by_name: Mapping[str, Persona]
    default: Persona

    def __iter__(self) -> Iterator[Persona]:
        return iter(self.by_name.values())

    def __len__(self) -> int:
        return len(self.by_name)

    def for_number(self, number: str) -> Persona:
        """Who answers this number (E.164): the persona that names it, otherwise the default one."""
        return next((persona for persona in self if number in persona.numbers), self.default)


def load_personas(folder: Path) -> Personas:
    """Read every persona of a folder. Blocks on the disk.

    Raises:
        PersonaFaults: with every fault of every file.
    """
    personas, faults = _read_folder(folder)
    if faults:
        raise PersonaFaults(sorted(faults, key=_place))
    default = next((persona for persona in personas if persona.default), personas[0])
    return Personas(MappingProxyType({persona.name: persona for persona in personas}), default)


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check` found: the personas without a fault, and every fault."""

    personas: tuple[Persona, ...]
    faults: tuple[Fault, ...]

    def lines(self) -> list[str]:
        """One line a sound persona, then one line a fault."""
        return [_summary_line(persona) for persona in self.personas] + [str(fault) for fault in self.faults]


def check(path: Path) -> CheckReport:
    """Look at a folder of personas, or at one file by itself. Blocks on the disk; raises nothing."""
    personas, faults = _judged([Document(path)]) if path.is_file() else _read_folder(path)
    faulty = {fault.path.stem for fault in faults if fault.path != path}
    return CheckReport(
        tuple(persona for persona in personas if persona.name not in faulty), tuple(sorted(faults, key=_place))
    )


def _summary_line(persona: Persona) -> str:
    said = [f"{persona.name}: OK, {len(persona.prompt.split())} words of prompt"]
    said += ["answers " + ", ".join(persona.numbers)] if persona.numbers else []
    said += ["default"] if persona.default else []
    said += ["every call must give " + ", ".join(persona.required)] if persona.required else []
    return ", ".join(said)


class PersonaFolder:
    """The personas of a folder as they are now. A call keeps the Persona it began with."""

    def __init__(self, folder: Path) -> None:
        """Raises PersonaFaults: there are no last good personas to keep yet."""
        self.folder = folder
        self.current = load_personas(folder)
        self.faults: tuple[Fault, ...] = ()

    def reload(self) -> None:
        """Read the folder again. With a fault the last good personas stay and `faults` says why. Blocks on disk."""
        try:
            fresh = load_personas(self.folder)
        except PersonaFaults as error:
            if error.faults != self.faults:
                logger.error("personas not reloaded, the last good ones stay:\n%s", error)
            self.faults = error.faults
            return
        if self.faults or fresh != self.current:
            logger.info("personas reloaded: %s", _difference(self.current, fresh))
        self.current, self.faults = fresh, ()

    async def watch(self, stop: asyncio.Event) -> None:
        """Reload whenever something in the folder changes, until `stop` is set or the task is cancelled.

        A thread waits for the changes and reads them, so that no call waits for the disk. A folder that is itself
        removed or replaced is not seen: restart then.
        """
        async for _ in awatch(self.folder, stop_event=stop):
            await asyncio.to_thread(self.reload)


def _difference(before: Personas, after: Personas) -> str:
    old, new = before.by_name, after.by_name
    kinds = {
        "added": new.keys() - old.keys(),
        "removed": old.keys() - new.keys(),
        "changed": {name for name in old.keys() & new.keys() if old[name] != new[name]},
    }
    return "; ".join(f"{kind} {', '.join(sorted(names))}" for kind, names in kinds.items() if names) or "as before"


def json_schema() -> dict[str, Any]:
    """The persona file as JSON Schema 2020-12, for editors; `personas/persona.schema.json` holds it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Persona.model_json_schema()}
    return {**_polished(schema), "title": "Persona"}


def _polished(schema: Any) -> Any:
    """Without pydantic's titles (an editor shows them before the description), and every choice an enum."""
    if isinstance(schema, list):
        return [_polished(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "const" in schema:
        schema = {"enum": [schema["const"]], **{key: value for key, value in schema.items() if key != "const"}}
    if "patternProperties" in schema:
        schema = {**schema, "additionalProperties": False}
    return {key: _polished(value) for key, value in schema.items() if key != "title"}


def _read_folder(folder: Path) -> tuple[list[Persona], list[Fault]]:
    try:
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}; a folder of persona files is right"
        return [], [Fault(folder, None, problem)]
    documents = [Document(file) for file in files if file.suffix == ".yaml"]
    personas, faults = _judged(documents)
    faults += [Fault(file, None, "ends in .yml; .yaml is right") for file in files if file.suffix == ".yml"]
    return personas, [*faults, *_default_faults(folder, documents)]


def _judged(documents: Sequence[Document]) -> tuple[list[Persona], list[Fault]]:
    """The personas of the files without a fault, and the faults of the others."""
    personas = [persona for document in documents if (persona := _persona(document)) is not None]
    faults = [*(fault for document in documents for fault in document.faults), *_number_faults(documents)]
    return personas, faults


def _place(fault: Fault) -> tuple[Path, int]:
    return fault.path, fault.line or 0


def _persona(document: Document) -> Persona | None:
    if document.data is None:
        return None
    persona = None
    try:
        persona = Persona.model_validate(document.data)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            _add(document, details)
    _judge_name(document, document.data)
    _judge_voice(document, document.data)
    _judge_placeholders(document, document.data)
    _judge_required(document, document.data)
    return None if document.faults else persona


def _judge_name(document: Document, data: Mapping[str, Any]) -> None:
    name = data.get("name")
    if isinstance(name, str) and name != document.path.stem:
        document.add(("name",), f"found {found(name)}; {document.path.stem!r}, the file's own name, is right")


def _judge_voice(document: Document, data: Mapping[str, Any]) -> None:
    voice = data.get("voice")
    if isinstance(voice, str) and re.fullmatch(_WAV, voice) and not (document.path.parent / voice).is_file():
        document.add(("voice",), f"found {found(voice)}; there is no such file in {document.path.parent}")


def _judge_placeholders(document: Document, data: Mapping[str, Any]) -> None:
    declared = data.get("variables", {})
    if not isinstance(declared, dict):
        return
    used: set[str] = set()
    for field in _TEMPLATES:
        text = data.get(field)
        for braces in dict.fromkeys(_BRACES.findall(text) if isinstance(text, str) else ()):
            used |= _placeholder(document, field, braces, declared)
    for name in declared:
        if name not in used:
            right = f"{{{{{name}}}}} in one of them is right"
            document.add(("variables", name), f"used by none of {', '.join(_TEMPLATES)}; {right}")


def _placeholder(document: Document, field: str, braces: str, declared: Mapping[str, Any]) -> set[str]:
    line = document.line_with(braces, (field,))
    match = _PLACEHOLDER.fullmatch(braces)
    if match is None:
        document.add((field,), f"found {found(braces)}; a placeholder such as {{{{name}}}} is right", line)
        return set()
    if match[1] not in declared:
        known = ", ".join(map(word, declared)) or "there are none"
        document.add((field,), f"{{{{{match[1]}}}}} is not among the variables: {known}", line)
    return {match[1]}


def _judge_required(document: Document, data: Mapping[str, Any]) -> None:
    """An incoming call brings no variables, so one without a default could never be answered."""
    declared = data.get("variables")
    if isinstance(declared, dict) and (data.get("numbers") or data.get("default") is True):
        for name in (name for name, default in declared.items() if default is None):
            problem = "found nothing, and an incoming call brings no value; a default is right where calls come in"
            document.add(("variables", name), problem)


def _number_faults(documents: Sequence[Document]) -> Iterator[Fault]:
    first: dict[str, str] = {}
    for document in documents:
        numbers = (document.data or {}).get("numbers")
        for index, number in enumerate(numbers if isinstance(numbers, tuple) else ()):
            line = document.line(("numbers", index))
            if not isinstance(number, str):
                continue
            if number in first:
                yield Fault(document.path, line, f"numbers[{index}]: {number} is answered at {first[number]} already")
            first.setdefault(number, f"{document.path}:{line}")


def _default_faults(folder: Path, documents: Sequence[Document]) -> Iterator[Fault]:
    if not documents:
        yield Fault(folder, None, "holds no persona; at least one .yaml file is right")
    readable = [document for document in documents if document.data is not None]
    marked = [document for document in readable if document.data and document.data.get("default") is True]
    for document in marked[1:]:
        first = f"{marked[0].path}:{marked[0].line(('default',))}"
        problem = f"default: true stands at {first} already; one default persona is right"
        yield Fault(document.path, document.line(("default",)), problem)
    if not marked and len(documents) > 1 and readable == documents:
        files = ", ".join(document.path.name for document in documents)
        yield Fault(folder, None, f"no persona is the default; `default: true` in one of {files} is right")


# The words of a fault come from the schema that editors use.


def _add(document: Document, details: ErrorDetails) -> None:
    loc: Loc = details["loc"]
    if loc == ("name",) and isinstance(details["input"], str) and details["input"] != document.path.stem:
        return  # one fault is enough: _judge_name gives the only name that is right
    if details["type"] == "extra_forbidden":
        document.add(loc, _unknown_key(loc))
    elif details["type"] == "missing":
        document.add(loc, f"missing; {_right(loc)} is right")
    else:
        place = loc[:-1] if loc[-1] == "[key]" else loc
        document.add(place, f"found {found(details['input'])}; {_right(loc, details['input'])} is right")


_schema = cache(json_schema)


def _schema_at(loc: Loc) -> dict[str, Any]:
    root: dict[str, Any] = _schema()
    node = root
    for part in loc:
        if part == "[key]":
            node = root["properties"]["variables"]["propertyNames"]
        elif isinstance(part, int):
            node = node["items"]
        elif "properties" in node:
            node = node["properties"][part]
        elif "patternProperties" in node:
            node = next(iter(node["patternProperties"].values()))
        if "$ref" in node:
            node = root["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _right(loc: Loc, wrong: object = "") -> str:
    node = _schema_at(loc)
    if "patternErrorMessage" in node:
        return str(node["patternErrorMessage"])
    if "enum" in node:
        return "one of " * (len(node["enum"]) > 1) + ", ".join(node["enum"])
    plain = {"boolean": "true or false", "array": "a list", "object": "a block of keys"}.get(node.get("type", ""))
    if plain is not None:
        return plain
    if "minimum" in node:
        noun = "a whole number" if node["type"] == "integer" else "a number"
        noun += " of seconds" if str(loc[-1]).endswith("_s") else ""
        return f"{noun} from {node['minimum']} to {node['maximum']}"
    quoted = "in quotes" if isinstance(wrong, int | float) else ""
    if "anyOf" in node:
        return f"text of at most {VALUE_LIMIT} characters" + (f" {quoted}" if quoted else " or null")
    return f"text of {node.get('minLength', 0)} to {node['maxLength']} characters" + f" {quoted}" * bool(quoted)


def _unknown_key(loc: Loc) -> str:
    keys = list(_schema_at(loc[:-1])["properties"])
    close = get_close_matches(str(loc[-1]), keys, 1)
    hint = f"{close[0]} is closest of" if close else "the keys here are"
    return f"no such key; {hint} {', '.join(keys)}"

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from app.personas import (
    VOICES,
    Persona,
    PersonaFaults,
    PersonaFolder,
    Personas,
    WrongVariables,
    check,
    json_schema,
    load_personas,
)

SHIPPED = Path(__file__).parent.parent / "personas"
FOLDER = Path("personas")
KEYS = ", ".join(Persona.model_fields)
ONE_OF_THE_VOICES = "one of " + ", ".join(VOICES) + ", or a wav file beside this one such as my-voice.wav, is right"
A_NUMBER = 'a number with + and country code such as "+15550100123" is right'


@pytest.fixture(autouse=True)
def _in_an_empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FOLDER).mkdir()
    monkeypatch.chdir(tmp_path)


def write(**texts: str) -> None:
    for name, text in texts.items():
        (FOLDER / f"{name}.yaml").write_text(text, encoding="utf-8")


def persona(name: str, *more: str) -> str:
    return "\n".join([f"name: {name}", "prompt: You work for Dune Radio.", *more, ""])


def load(**texts: str) -> Personas:
    write(**texts)
    return load_personas(FOLDER)


def faults(**texts: str) -> list[str]:
    with pytest.raises(PersonaFaults) as caught:
        load(**texts)
    return str(caught.value).split("\n")


# What a good file becomes


def test_a_persona_of_two_lines_has_the_documented_defaults() -> None:
    host = load(host=persona("host")).default

    assert host.model_dump() == {
        "name": "host",
        "summary": "",
        "voice": "NATF2",
        "language": "en",
        "prompt": "You work for Dune Radio.",
        "variables": {},
        "greeting": "",
        "busy": "",
        "numbers": (),
        "default": False,
        "sampling": {"text_temperature": 0.7, "text_top_k": 25, "audio_temperature": 0.8, "audio_top_k": 250},
        "limits": {"duration_s": 1800, "silence_s": 60},
        "record": False,
        "transcribe": True,
    }


def test_words_that_older_yaml_turns_into_numbers_and_truths_stay_words() -> None:
    host = load(host=persona("host", "summary: 9:30", "greeting: no", "numbers: [+15550100123]")).default

    assert (host.summary, host.greeting, host.numbers) == ("9:30", "no", ("+15550100123",))


def test_sampling_and_limits_take_whole_and_broken_numbers() -> None:
    host = load(host=persona("host", "sampling: {text_temperature: 0, audio_top_k: 40}", "limits: {silence_s: 7.5}"))

    assert host.default.sampling.text_temperature == 0
    assert host.default.sampling.audio_top_k == 40
    assert host.default.limits.silence_s == 7.5


def test_personas_come_in_the_order_of_their_names() -> None:
    personas = load(zoo=persona("zoo", "default: true"), ark=persona("ark"), host=persona("host"))

    assert [one.name for one in personas] == list(personas.by_name) == ["ark", "host", "zoo"]
    assert len(personas) == 3


def test_a_persona_cannot_be_changed() -> None:
    host = load(host=persona("host")).default

    with pytest.raises(ValueError, match="frozen"):
        host.voice = "NATM0"  # type: ignore[misc]


def test_a_voice_may_be_a_wav_file_beside_the_persona() -> None:
    (FOLDER / "my-voice.wav").write_bytes(b"sound")

    assert load(host=persona("host", "voice: my-voice.wav")).default.voice == "my-voice.wav"


def test_files_that_are_no_personas_are_left_alone() -> None:
    (FOLDER / "persona.schema.json").write_text("{}")
    (FOLDER / ".#host.yaml").symlink_to("nowhere")

    assert len(load(host=persona("host"))) == 1


# Who answers a number


def test_a_number_reaches_the_persona_that_names_it_and_any_other_the_default() -> None:
    host = persona("host", 'numbers: ["+15550100123", "+15550100124"]')
    personas = load(host=host, zoo=persona("zoo", "default: true"))

    reached = [personas.for_number(number).name for number in ("+15550100124", "+15550100199", "")]

    assert reached == ["host", "zoo", "zoo"]


def test_an_only_persona_is_the_default() -> None:
    assert load(host=persona("host")).default.name == "host"


# Placeholders

GREETER = persona(
    "host",
    "greeting: Hello {{ guest }}, welcome to {{show}}.",
    "variables:",
    "  guest: null",
    "  show: the morning show",
)


def test_given_values_win_over_defaults_and_the_other_defaults_stay() -> None:
    host = load(host=GREETER).default

    assert host.required == ("guest",)
    assert host.fill({"guest": "Ada"}).greeting == "Hello Ada, welcome to the morning show."
    assert host.fill({"guest": "Ada", "show": "Dune"}).greeting == "Hello Ada, welcome to Dune."
    assert host.fill({"guest": "Ada"}).prompt == "You work for Dune Radio."


def test_busy_words_are_filled_like_a_greeting() -> None:
    host = load(host=persona("host", "busy: '{{show}} has no free line.'", "variables: {show: Dune}")).default

    assert host.fill().busy == "Dune has no free line."


def test_what_a_value_holds_is_not_expanded_again() -> None:
    greeting = load(host=GREETER).default.fill({"guest": "{{show}}", "show": "{{guest}}"}).greeting

    assert greeting == "Hello {{show}}, welcome to {{guest}}."


def test_a_filled_text_is_one_line_without_control_characters() -> None:
    greeting = load(host=GREETER).default.fill({"guest": " A\x00da\r\nof\u202eX ", "show": ""}).greeting

    assert greeting == "Hello A da of X , welcome to ."


def test_variables_that_do_not_fit_are_all_named() -> None:
    host = load(host=GREETER).default

    with pytest.raises(WrongVariables) as caught:
        host.fill({"show": "x" * 501, "gest": "Ada"})

    assert str(caught.value) == (
        "variables of persona host: missing: guest; unknown: gest; longer than 500 characters: show"
    )
    assert (caught.value.missing, caught.value.unknown, caught.value.too_long) == (("guest",), ("gest",), ("show",))


# Faults, each with its line

BAD_LINES = {
    "a word for a number": (
        "limits:\n  duration_s: ten",
        ":4: limits.duration_s: found 'ten'; a number of seconds from 10 to 86400 is right",
    ),
    "seconds out of range": (
        "limits: {silence_s: 1}",
        ":3: limits.silence_s: found 1; a number of seconds from 5 to 3600 is right",
    ),
    "half a token": (
        "sampling:\n\n  text_top_k: 2.5",
        ":5: sampling.text_top_k: found 2.5; a whole number from 1 to 1000 is right",
    ),
    "more tokens than a tick ranks": (
        "sampling: {text_top_k: 1001}",
        ":3: sampling.text_top_k: found 1001; a whole number from 1 to 1000 is right",
    ),
    "too hot": (
        "sampling: {audio_temperature: 3}",
        ":3: sampling.audio_temperature: found 3; a number from 0 to 2 is right",
    ),
    "a value for a block": ("limits: 60", ":3: limits: found 60; a block of keys is right"),
    "yes for true": ("record: yes", ":3: record: found 'yes'; true or false is right"),
    "nothing at all": ("transcribe:", ":3: transcribe: found nothing; true or false is right"),
    "a list for a text": ("summary: [a]", ":3: summary: found a list; text of 0 to 200 characters is right"),
    "a number for a text": ("summary: 7", ":3: summary: found 7; text of 0 to 200 characters in quotes is right"),
    "a long text": (
        f"summary: {'x' * 201}",
        ":3: summary: found text of 201 characters; text of 0 to 200 characters is right",
    ),
    "no such voice": ("voice: NATF9", f":3: voice: found 'NATF9'; {ONE_OF_THE_VOICES}"),
    "a voice elsewhere": ("voice: ../mine.wav", f":3: voice: found '../mine.wav'; {ONE_OF_THE_VOICES}"),
    "a voice in no wav file": ("voice: mine.mp3", f":3: voice: found 'mine.mp3'; {ONE_OF_THE_VOICES}"),
    "a voice that is a number": ("voice: 3", f":3: voice: found 3; {ONE_OF_THE_VOICES}"),
    "a voice whose file is missing": (
        "summary: x\nvoice: my-voice.wav",
        ":4: voice: found 'my-voice.wav'; there is no such file in personas",
    ),
    "no such language": ("language: fr", ":3: language: found 'fr'; en is right"),
    "a key misspelt": ("greating: Hi", f":3: greating: no such key; greeting is closest of {KEYS}"),
    "a key made up": ("x: 1", f":3: x: no such key; the keys here are {KEYS}"),
    "a key inside misspelt": (
        "limits:\n  silense_s: 9",
        ":4: limits.silense_s: no such key; silence_s is closest of duration_s, silence_s",
    ),
    "a number without a list": ("numbers: +15550100123", ":3: numbers: found '+15550100123'; a list is right"),
    "a number without its plus": (
        "numbers:\n- +15550100123\n- 15550100124",
        f":5: numbers[1]: found 15550100124; {A_NUMBER}",
    ),
    "a number with spaces": (
        'numbers: ["+1 555 0100123"]',
        f":3: numbers[0]: found '+1 555 0100123'; {A_NUMBER}",
    ),
    "a variable that is a number": (
        "greeting: Hi {{room}}\nvariables: {room: 5}",
        ":4: variables.room: found 5; text of at most 500 characters in quotes is right",
    ),
    "a variable that is a block": (
        "greeting: Hi {{room}}\nvariables: {room: {a: b}}",
        ":4: variables.room: found a block of keys; text of at most 500 characters or null is right",
    ),
    "an unused variable": (
        "variables:\n  room: A",
        ":4: variables.room: used by none of prompt, greeting, busy; {{room}} in one of them is right",
    ),
    "an undeclared placeholder": (
        "greeting: >\n  Hello there,\n\n  {{ guest }}, in {{room}}\nvariables: {room: A}",
        ":6: greeting: {{guest}} is not among the variables: room",
    ),
    "an undeclared placeholder and no variables": (
        "greeting: Hello {{guest}}",
        ":3: greeting: {{guest}} is not among the variables: there are none",
    ),
    "a malformed placeholder": (
        "greeting: |\n  Hello\n  {{Your Name}}",
        ":5: greeting: found '{{Your Name}}'; a placeholder such as {{name}} is right",
    ),
    "an open placeholder": ('greeting: "{{guest"', ":3: greeting: found '{{'; a placeholder such as {{name}} is right"),
    "a required variable where calls come in": (
        "numbers: [+15550100123]\ngreeting: Hi {{guest}}\nvariables:\n  guest:",
        ":6: variables.guest: found nothing, and an incoming call brings no value; "
        "a default is right where calls come in",
    ),
}


@pytest.mark.parametrize(("lines", "fault"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_fault_is_one_line_with_file_line_and_what_is_right(lines: str, fault: str) -> None:
    assert faults(host=persona("host", lines)) == [f"personas/host.yaml{fault}"]


BAD_FILES = {
    "no prompt": ("name: host", ":1: prompt: missing; text of 1 to 6000 characters is right"),
    "a blank prompt": (
        "name: host\nprompt: ' '",
        ":2: prompt: found ' '; text of 1 to 6000 characters is right",
    ),
    "no name": (
        "prompt: Hi",
        ":1: name: missing; the file's own name: a-z, then up to 39 of a-z 0-9 _ - is right",
    ),
    "another name": (
        "# remark\nprompt: Hi\nname: Hots",
        ":3: name: found 'Hots'; 'host', the file's own name, is right",
    ),
}


@pytest.mark.parametrize(("text", "fault"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_is_no_persona_says_why(text: str, fault: str) -> None:
    assert faults(host=text) == [f"personas/host.yaml{fault}"]


def test_a_file_name_that_can_be_no_name_is_a_fault() -> None:
    (FOLDER / "My Host.yaml").write_text(persona("My Host"))

    assert faults() == [
        "personas/My Host.yaml:1: name: found 'My Host'; "
        "the file's own name: a-z, then up to 39 of a-z 0-9 _ - is right"
    ]


def test_a_variable_name_is_checked_like_every_other_value() -> None:
    lines = faults(host=persona("host", "variables:", "  Guest: Ada"))

    right = "a variable name: a-z, then up to 39 of a-z 0-9 _ is right"
    assert lines[0] == f"personas/host.yaml:4: variables.Guest: found 'Guest'; {right}"


def test_the_other_ending_is_named_rather_than_passed_over() -> None:
    (FOLDER / "zoo.yml").write_text(persona("zoo"))

    assert faults(host=persona("host")) == ["personas/zoo.yml: ends in .yml; .yaml is right"]


def test_a_folder_without_personas_or_no_folder_at_all_is_one_line() -> None:
    assert faults() == ["personas: holds no persona; at least one .yaml file is right"]

    FOLDER.rmdir()

    assert check(FOLDER).lines() == [
        "personas: cannot be read: No such file or directory; a folder of persona files is right"
    ]


def test_two_personas_on_one_number_name_both_places() -> None:
    host = persona("host", "default: true", "numbers:", "- +15550100124", "- +15550100123")

    assert faults(host=host, zoo=persona("zoo", "numbers: [+15550100123]")) == [
        "personas/zoo.yaml:3: numbers[0]: +15550100123 is answered at personas/host.yaml:6 already"
    ]


def test_two_defaults_are_a_fault() -> None:
    assert faults(host=persona("host", "default: true"), zoo=persona("zoo", "default: true")) == [
        "personas/zoo.yaml:3: default: true stands at personas/host.yaml:3 already; one default persona is right"
    ]


def test_several_personas_and_no_default_are_a_fault() -> None:
    assert faults(host=persona("host"), zoo=persona("zoo")) == [
        "personas: no persona is the default; `default: true` in one of host.yaml, zoo.yaml is right"
    ]


def test_every_fault_of_every_file_is_in_one_report() -> None:
    host = "name: host\nvoice: X\ngreeting: '{{who}}'\nlimits: {silence_s: x}\nnumbers: [+15550100123]\ndefault: true\n"
    zoo = persona("zoo", "summry: a", "\n" * 5, "numbers: [+15550100123]", "default: true")

    assert [line.split(" ")[:2] for line in faults(host=host, zoo=zoo, ark="[")] == [
        ["personas/ark.yaml:1:", "not"],
        ["personas/host.yaml:1:", "prompt:"],
        ["personas/host.yaml:2:", "voice:"],
        ["personas/host.yaml:3:", "greeting:"],
        ["personas/host.yaml:4:", "limits.silence_s:"],
        ["personas/zoo.yaml:3:", "summry:"],
        ["personas/zoo.yaml:10:", "numbers[0]:"],
        ["personas/zoo.yaml:11:", "default:"],
    ]


# personaline check


def test_check_lists_sound_personas_and_every_fault() -> None:
    write(
        host=persona("host", "default: true", "numbers: [+15550100123]"),
        caller=persona("caller", "greeting: Hi {{guest}}", "variables: {guest: }"),
        zoo=persona("zoo", "record: yes"),
    )

    assert check(FOLDER).lines() == [
        "caller: OK, 5 words of prompt, every call must give guest",
        "host: OK, 5 words of prompt, answers +15550100123, default",
        "personas/zoo.yaml:3: record: found 'yes'; true or false is right",
    ]


def test_check_takes_one_file_by_itself() -> None:
    write(host=persona("host"), zoo=persona("zoo", "record: yes"))

    assert check(FOLDER / "host.yaml").lines() == ["host: OK, 5 words of prompt"]
    assert check(FOLDER / "zoo.yaml").lines() == ["personas/zoo.yaml:3: record: found 'yes'; true or false is right"]


# Reloading


def test_a_reload_takes_what_changed_and_a_running_call_keeps_what_it_had(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "personaline.personas")
    write(host=persona("host", "default: true"), zoo=persona("zoo"))
    folder = PersonaFolder(FOLDER)
    in_a_call = folder.current.default

    write(host=persona("host", "default: true", "voice: NATM3"), ark=persona("ark"))
    (FOLDER / "zoo.yaml").unlink()
    folder.reload()
    folder.reload()

    assert (in_a_call.voice, folder.current.default.voice) == ("NATF2", "NATM3")
    assert caplog.messages == ["personas reloaded: added ark; removed zoo; changed host"]


def test_a_faulty_reload_keeps_the_last_good_personas_until_it_is_mended(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "personaline.personas")
    write(host=persona("host"))
    folder = PersonaFolder(FOLDER)
    before = folder.current

    write(host=persona("host", "record: yes"))
    folder.reload()
    folder.reload()

    assert folder.current is before
    assert [str(fault) for fault in folder.faults] == [
        "personas/host.yaml:3: record: found 'yes'; true or false is right"
    ]

    write(host=persona("host"))
    folder.reload()

    assert folder.faults == ()
    assert caplog.messages == [
        "personas not reloaded, the last good ones stay:\n"
        "personas/host.yaml:3: record: found 'yes'; true or false is right",
        "personas reloaded: as before",
    ]


def test_a_service_does_not_start_on_faulty_personas() -> None:
    with pytest.raises(PersonaFaults):
        PersonaFolder(FOLDER)


async def _until(condition: Callable[[], bool], again: Callable[[], None]) -> None:
    """Do `again` until the condition holds: the watch may not have begun at the first time."""
    async with asyncio.timeout(20):
        while not condition():
            again()
            await asyncio.sleep(0.1)


async def test_a_watched_folder_follows_its_files_and_stops_when_told() -> None:
    write(host=persona("host"))
    folder = PersonaFolder(FOLDER)
    stop = asyncio.Event()
    watching = asyncio.create_task(folder.watch(stop))

    await _until(lambda: folder.current.default.record, lambda: write(host=persona("host", "record: true")))
    await _until(lambda: bool(folder.faults), lambda: write(host="name: host"))
    stop.set()
    await asyncio.wait_for(watching, 20)

    assert folder.current.default.record


async def test_a_watch_ends_when_its_task_is_cancelled() -> None:
    write(host=persona("host"))
    folder = PersonaFolder(FOLDER)
    watching = asyncio.create_task(folder.watch(asyncio.Event()))
    await _until(lambda: folder.current.default.record, lambda: write(host=persona("host", "record: true")))

    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(watching, 20)


# What is shipped


def test_the_shipped_personas_are_sound_and_the_operator_is_the_default() -> None:
    personas = load_personas(SHIPPED)

    assert list(personas.by_name) == ["guide", "operator", "tutor"]
    assert personas.default.name == "operator"
    assert len({one.voice for one in personas}) == 3
    for one in personas:
        filled = one.fill()
        assert filled.prompt.startswith("You work for ")
        assert "{" not in filled.prompt + filled.greeting


def test_the_operator_greets_with_its_shop_and_knows_its_prices() -> None:
    filled = load_personas(SHIPPED).by_name["operator"].fill()

    assert filled.greeting == "Alder Street Bikes, this is Nora. How can I help you?"
    assert filled.prompt.startswith(
        "You work for Alder Street Bikes which is a bicycle rental and repair shop and your name is Nora Lindqvist. "
        "Information: "
    )
    for fact in ("9 am to 6 pm", "$18 a day", "$35 a day", "Helmets are free", "$5 a day", "$60", "2 days", "$12"):
        assert fact in filled.prompt


def test_the_shipped_schema_is_the_one_the_models_give() -> None:
    shipped = json.loads((SHIPPED / "persona.schema.json").read_text())

    assert shipped == json_schema(), "write json_schema() to personas/persona.schema.json again"


def test_every_shipped_persona_points_editors_at_the_schema() -> None:
    first_lines = {file.read_text().splitlines()[0] for file in SHIPPED.glob("*.yaml")}

    assert first_lines == {"# yaml-language-server: $schema=persona.schema.json"}


def test_the_schema_knows_the_choices_that_the_loader_knows() -> None:
    schema = json_schema()

    assert schema["properties"]["voice"]["anyOf"][0]["enum"] == list(VOICES)
    assert schema["properties"]["language"]["enum"] == ["en"]
    assert schema["properties"]["numbers"]["items"]["pattern"] == r"^\+[1-9][0-9]{6,14}$"
    assert schema["additionalProperties"] is schema["properties"]["variables"]["additionalProperties"] is False
    assert all("description" in field for field in schema["properties"].values())

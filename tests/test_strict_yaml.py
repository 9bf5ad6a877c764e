import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.personas import Persona, PersonaFaults, load_personas
from app.strict_yaml import Document


@pytest.fixture(autouse=True)
def _in_an_empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(content: str | bytes) -> Document:
    path = Path("host.yaml")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Document(path)


def faults(content: str | bytes) -> list[str]:
    return [str(fault) for fault in read(content).faults]


BAD_TEXTS = {
    "empty": ("", ":1: found nothing; a block of keys is right"),
    "only a remark": ("# later\n", ":1: found nothing; a block of keys is right"),
    "a text": ("hello", ":1: found 'hello'; a block of keys is right"),
    "a list": ("- a", ":1: found a list; a block of keys is right"),
    "a key twice": ("record: true\nrecord: false", ":2: record: given twice, first on line 1; once is right"),
    "a key that is a block": (
        "? [a]\n: b",
        ":1: found a block as a key; a word is right, and text that begins with {{ goes in quotes",
    ),
    "a tag": (
        "summary: !!python/name:os.system x",
        ":1: summary: found the tag 'tag:yaml.org,2002:python/name:os.system'; a value without a tag is right",
    ),
    "a tag that does not fit": (
        "summary: !!int x",
        ":1: summary: found the tag 'tag:yaml.org,2002:int'; a value without a tag is right",
    ),
    "an alias": (
        "summary: &a x\ngreeting: *a",
        ":2: not YAML: found an alias; the value itself is right",
    ),
    "a tab": (
        "limits:\n\tsilence_s: 9",
        ":2: not YAML: found character '\\t' that cannot start any token; spaces, not tabs, indent",
    ),
    "a colon in a text": (
        "summary: open: daily",
        ":1: not YAML: mapping values are not allowed here; text with a colon goes in quotes, "
        "or on its own lines after >",
    ),
    "an open quote": (
        'summary: "x\n\n',
        ":3: not YAML: found unexpected end of stream while scanning a quoted scalar begun on line 1",
    ),
    "an unquoted placeholder at the start": (
        "greeting: {{room}} here",
        ":1: not YAML: expected <block end>, but found '<scalar>'; "
        "text that begins with a quote or with {{ goes in quotes as a whole",
    ),
    "a second document": (
        "a: b\n---\nname: b",
        ":2: not YAML: but found another document; one document a file is right",
    ),
    "deep nesting": ("summary: " + "[" * 9, ":1: not YAML: found more than 8 levels of nesting"),
    "a control character": ("summary: a\x07", ":1: not YAML: the character '\\x07' is not allowed"),
    "an escape beyond Unicode": (
        'summary: "\\UFFFFFFFF"',
        ":1: not YAML: an escape or a version is too large a number",
    ),
    "half a surrogate pair": (
        'summary: "\\ud800"',
        ":1: summary: found half of a surrogate pair; the character itself is right",
    ),
}


@pytest.mark.parametrize(("text", "fault"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_a_fault_is_one_line_with_file_line_and_what_is_right(text: str, fault: str) -> None:
    assert faults(text) == [f"host.yaml{fault}"]


def test_another_encoding_is_a_fault_with_its_line() -> None:
    assert faults(b"name: host\nprompt: caf\xe9\n") == ["host.yaml:2: found byte 0xe9; a file saved as UTF-8 is right"]


def test_a_file_over_64_kib_is_not_read() -> None:
    assert faults("#" * 65_536) == ["host.yaml:1: found nothing; a block of keys is right"]
    assert faults("#" * 65_537) == ["host.yaml: larger than 64 KiB; a smaller file is right"]


def test_a_file_that_cannot_be_read_says_why() -> None:
    Path("host.yaml").mkdir()

    assert [str(fault) for fault in Document(Path("host.yaml")).faults] == ["host.yaml: cannot be read: Is a directory"]


def test_values_are_plain_and_keep_their_lines() -> None:
    document = read("a: [+15550100123, no, 9:30, 07]\r\nb:\r\n  c: -2.5\r\n  d: ~\r\n  e: true\r\n")

    assert document.data == {"a": ("+15550100123", "no", "9:30", "07"), "b": {"c": -2.5, "d": None, "e": True}}
    assert [document.line(loc) for loc in ((), ("a", 3), ("b",), ("b", "d"), ("b", "x", "y"))] == [1, 1, 2, 4, 2]


def test_a_key_can_neither_break_nor_flood_its_fault() -> None:
    document = read("a: 1")
    document.add(("a\nb", 0, "x" * 61), "wrong")

    assert str(document.faults[0]) == "host.yaml:1: 'a\\nb'[0].text of 61 characters: wrong"


PIECES = (
    *Persona.model_fields,
    *"\n ,:-[]{}'\"|>&*!?#%@\\",
    *(": ", "\n  ", "\n- ", "{{", "}}", "\t", "\r\n", "5", ".5", "true", "null", "<<", "&a", "*a", "---"),
    *("!!set", "!!binary", "!!timestamp", "%YAML 9.9\n", "\\ud8", "\\n", "\ufeff", "\u2028"),
)


@settings(deadline=None)
@given(st.one_of(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.text(), st.binary()))
def test_no_file_however_strange_raises_anything_but_faults_of_one_line(content: str | bytes) -> None:
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "host.yaml").write_bytes(raw)
        with pytest.raises(PersonaFaults) as caught:
            load_personas(Path(place))

    last = len(raw.decode("utf-8", "replace").splitlines()) + 1
    assert all(str(fault).isprintable() and 1 <= (fault.line or 1) <= last for fault in caught.value.faults)

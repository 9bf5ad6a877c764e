"""YAML files read strictly: plain values, the lines they stand on, and every fault with its file, line and field."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE_LIMIT_BYTES = 64 * 1024
DEEPEST = 8  # levels of nesting

Loc = tuple[str | int, ...]  # the keys and indices that lead to a value

_TAG = "tag:yaml.org,2002:"
# Fewer plain scalars than YAML 1.1 has: there +15550100123 is an integer, `no` is false and 9:30 is 570.
_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], object]]] = {
    _TAG + "null": (re.compile(r"(?:|~|null)\Z"), lambda text: None),
    _TAG + "bool": (re.compile(r"(?:true|false)\Z"), lambda text: text == "true"),
    _TAG + "int": (re.compile(r"-?(?:0|[1-9][0-9]{0,17})\Z"), int),
    _TAG + "float": (re.compile(r"-?[0-9]{0,18}\.[0-9]{1,18}\Z"), float),
}
_HINTS = {
    "mapping values are not allowed here": "text with a colon goes in quotes, or on its own lines after >",
    "expected <block end>, but found '<scalar>'": "text that begins with a quote or with {{ goes in quotes as a whole",
    "but found another document": "one document a file is right",
    "found character '\\t' that cannot start any token": "spaces, not tabs, indent",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong, with where it is. `line` counts from 1; None where it is about the whole file or folder."""

    path: Path
    line: int | None
    problem: str

    def __str__(self) -> str:
        return f"{self.path}{'' if self.line is None else f':{self.line}'}: {self.problem}"


class Document:
    """One file with a block of keys at its top: what it says, on which lines, and what is wrong with it.

    Lists are tuples. `data` is None where the file could not be read as such a block; `faults` then says why.
    """

    def __init__(self, path: Path) -> None:
        """Blocks on the disk; raises nothing."""
        self.path = path
        self.faults: list[Fault] = []
        self.data: dict[str, Any] | None = None
        self._spans: dict[Loc, tuple[int, int]] = {(): (1, 1)}
        self._lines: list[str] = []
        try:
            text = _decoded(path)
            root = _composed(path, text)
        except _Unreadable as unreadable:
            self.faults.append(unreadable.fault)
            return
        self._lines = text.splitlines()
        if isinstance(root, yaml.MappingNode):
            self._refuse_tag(root, (), "map")
            self.data = self._mapping(root, ())
        else:
            kind = "nothing" if root is None else found(self._plain(root, ()))
            self.add((), f"found {kind}; a block of keys is right")

    def add(self, loc: Loc, problem: str, line: int | None = None) -> None:
        """Note a fault at a value, or at the nearest block around it where there is none."""
        where = f"{field(loc)}: " if loc else ""
        self.faults.append(Fault(self.path, line or self.line(loc), where + problem))

    def line(self, loc: Loc) -> int:
        while loc not in self._spans:
            loc = loc[:-1]
        return self._spans[loc][0]

    def line_with(self, text: str, loc: Loc) -> int:
        """The first line of a value that holds this text; the value's own line if an escape hides it."""
        first, last = self._spans[loc]
        lines = range(first, min(last, len(self._lines)) + 1)
        return next((line for line in lines if text in self._lines[line - 1]), first)

    def _plain(self, node: yaml.Node, loc: Loc) -> object:
        if isinstance(node, yaml.MappingNode):
            self._refuse_tag(node, loc, "map")
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            self._refuse_tag(node, loc, "seq")
            return tuple(self._item(item, (*loc, index)) for index, item in enumerate(node.value))
        return self._scalar(node, loc)

    def _refuse_tag(self, node: yaml.Node, loc: Loc, expected: str) -> None:
        if node.tag != _TAG + expected:
            self.add(loc, f"found the tag {node.tag!r}; a value without a tag is right", node.start_mark.line + 1)

    def _item(self, node: yaml.Node, loc: Loc) -> object:
        self._spans[loc] = (node.start_mark.line + 1, node.end_mark.line + 1)
        return self._plain(node, loc)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.add(
                    loc, "found a block as a key; a word is right, and text that begins with {{ goes in quotes", line
                )
                continue
            here = (*loc, self._whole(key.value, loc, line))
            if here in self._spans:
                self.add(here, f"given twice, first on line {self.line(here)}; once is right", line)
                continue
            self._spans[here] = (line, value.end_mark.line + 1)
            data[str(here[-1])] = self._plain(value, here)
        return data

    def _scalar(self, node: yaml.Node, loc: Loc) -> object:
        pattern, convert = _SCALARS.get(node.tag, (None, None))
        if pattern is not None and convert is not None and pattern.match(node.value):
            return convert(node.value)
        self._refuse_tag(node, loc, "str")
        return self._whole(node.value, loc, node.start_mark.line + 1)

    def _whole(self, text: str, loc: Loc, line: int) -> str:
        """Half of a surrogate pair, which an escape can write, is no character: it could not be stored or sent."""
        whole = text.encode("utf-8", "replace").decode("utf-8")
        if whole != text:
            self.add(loc, "found half of a surrogate pair; the character itself is right", line)
        return whole


def field(loc: Loc) -> str:
    """A place as people write it: limits.duration_s, numbers[1]."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{word(part)}" for part in loc)
    return "".join(parts).removeprefix(".")


def word(key: str) -> str:
    """A key as it is, unless it would break or flood the line."""
    return key if key.isprintable() and 0 < len(key) <= 60 else found(key)


def found(value: object) -> str:
    """A value as a fault shows it, in YAML's words and short."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str() if len(value) > 60:
            return f"text of {len(value)} characters"
        case tuple():
            return "a list"
        case dict():
            return "a block of keys"
    return repr(value)


class _Unreadable(Exception):
    def __init__(self, path: Path, line: int | None, problem: str) -> None:
        self.fault = Fault(path, line, problem)
        super().__init__(str(self.fault))


def _decoded(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise _Unreadable(path, None, f"cannot be read: {error.strerror}") from error
    if len(raw) > FILE_LIMIT_BYTES:
        raise _Unreadable(path, None, f"larger than {FILE_LIMIT_BYTES // 1024} KiB; a smaller file is right")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problem = f"found byte 0x{raw[error.start]:02x}; a file saved as UTF-8 is right"
        raise _Unreadable(path, line, problem) from error


class _Loader(yaml.SafeLoader):
    """Composes nodes; nothing is ever constructed by tag. No alias, so that no small file grows large."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML reads it from the class
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self._refuse("found an alias; the value itself is right")
        if self.depth == DEEPEST:
            self._refuse(f"found more than {DEEPEST} levels of nesting")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refuse(self, problem: str) -> None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        raise yaml.composer.ComposerError(None, None, problem, event.start_mark)


for _tag, (_pattern, _) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, None)


def _composed(path: Path, text: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"not YAML: the character {text[error.position]!r} is not allowed"
        raise _Unreadable(path, line, problem) from error
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise _Unreadable(path, loader.line + 1 if mark is None else mark.line + 1, _not_yaml(error)) from error
    except (ValueError, OverflowError) as error:  # PyYAML lets these through from \U escapes and %YAML versions
        raise _Unreadable(path, loader.line + 1, "not YAML: an escape or a version is too large a number") from error
    finally:
        loader.dispose()


def _not_yaml(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error.context)
    if problem in _HINTS:
        return f"not YAML: {problem}; {_HINTS[problem]}"
    began = f" {error.context} begun on line {error.context_mark.line + 1}" if error.context_mark else ""
    return f"not YAML: {problem}{began}"

"""The YAML 1.2 core schema, bounded, with the line of every key and without duplicate keys.

PyYAML reads YAML 1.1, where `1e-3` is a text, `no` is false and `1:30` is ninety. Here `1e-3` is a number, and only
true and false are truth values. A key that occurs twice in a mapping is an error; PyYAML takes the last one. Tags,
depth and size are limited, so that a hostile file ends in an error and not in a full memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.composer import Composer

from qatlaw.errors import cut
from qatlaw.files import read_small
from qatscale.config.section import KeyPath
from qatscale.errors import UserError

MAX_DEPTH = 50
MAX_VALUES = 100_000
"""Values of a document, each alias counted with all that it stands for."""

_CORE = "tag:yaml.org,2002:"
_SCALARS = (  # tag, pattern, first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


@dataclass(frozen=True)
class Document:
    """A value, and where its parts were written."""

    value: Any
    lines: Mapping[KeyPath, int]
    """Line of each key and list item, from 1."""


class _Loader(Composer, yaml.CSafeLoader):
    """libyaml reads the events, some ten times as fast; PyYAML composes them, whose nesting can be limited."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's way to say: none of YAML 1.1's
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_CORE) in ("null", "bool", "int", "float", "str", "seq", "map")
    }
    depth = count = 0

    def __init__(self, text: str) -> None:
        yaml.CSafeLoader.__init__(self, text)
        Composer.__init__(self)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > MAX_DEPTH:
            raise _error(f"nested more than {MAX_DEPTH} levels deep", self.peek_event())
        self.depth += 1
        self.count += 1
        if self.count > MAX_VALUES:
            raise _error(f"more than {MAX_VALUES:,} values", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError):  # `!!bool maybe`; an integer of more digits than Python reads
            raise _error(f"not a valid {node.tag.removeprefix(_CORE)}", node) from None

    def construct_undefined(self, node: yaml.Node) -> NoReturn:
        raise _error(f"the tag {cut(node.tag).replace(_CORE, '!!')} is not supported; write a plain value", node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = str(self.construct_scalar(node)).replace("_", "")
        base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
        return int(digits.removeprefix("0x").removeprefix("0o"), base)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_at: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key in first_at:
                raise _error(f"the key {cut(repr(key))} is here and on line {first_at[key]}; keep one", key_node)
            first_at[str(key)] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `_Loader` would take for something else."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


for _tag, _pattern, _first in _SCALARS:
    for _either in (_Loader, _Dumper):
        _either.add_implicit_resolver(f"{_CORE}{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{_CORE}int", _Loader.construct_yaml_int)
_Loader.add_constructor(None, _Loader.construct_undefined)
for _class in (list, tuple):
    _Dumper.add_representer(
        _class, lambda dumper, data: dumper.represent_sequence(f"{_CORE}seq", data, flow_style=True)
    )


def parse_document(text: str, source: str) -> Document:
    """Parse a text, which errors call `source`. Raises UserError with the line."""
    with _located(text, source):
        loader = _Loader(text)
        node = _composed(loader)
        return Document(None, {}) if node is None else Document(loader.construct_document(node), dict(_lines(node, ())))


def compose(path: Path, key: str) -> yaml.Node:
    """The nodes of a file with their tags, for a reader who wants to see it before another library reads it."""
    text = _read(path, key)
    with _located(text, str(path)):
        return _composed(_Loader(text)) or yaml.ScalarNode("", "")


def read_document(path: Path, key: str) -> Document:
    """The mapping in a file, {} where it is empty. `key` names the file in an error."""
    document = parse_document(_read(path, key), str(path))
    if document.value is not None and not isinstance(document.value, dict):
        raise UserError(key, str(path), f"holds a {type(document.value).__name__}, not `key: value` lines.")
    return document if document.value is not None else Document({}, {})


def _read(path: Path, key: str) -> str:
    try:
        return read_small(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(key, str(path), f"cannot be read: {reason}.") from error


def _composed(loader: _Loader) -> yaml.Node | None:
    node = loader.get_single_node()
    if node is not None and _count(node, {}) > MAX_VALUES:
        raise _error(f"more than {MAX_VALUES:,} values, each alias counted with all that it stands for", node)
    return node


@contextmanager
def _located(text: str, source: str) -> Iterator[None]:
    """UserError with the line for what PyYAML does not accept."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, {_place(mark, text.splitlines())}" if mark else source
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(where, None, f"{reason}.") from error
    except (yaml.YAMLError, UnicodeError) as error:  # an unprintable character; one that UTF-8 does not have
        raise UserError(source, None, f"not valid YAML: {error}.") from error


def _place(mark: yaml.Mark, lines: list[str]) -> str:
    """libyaml puts the end of a text in a line of its own."""
    line, column = mark.line, mark.column
    if line >= len(lines) > 0:
        line, column = len(lines) - 1, len(lines[-1])
    return f"line {line + 1}, column {column + 1}"


def parse_yaml(text: str, source: str) -> Any:
    return parse_document(text, source).value


def to_yaml(value: Any) -> str:
    """Plain YAML in the order of the keys; `parse_yaml` gives the equal value back. Lists stay on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


def value_text(value: Any) -> str:
    """A value as an override writes it."""
    return value if isinstance(value, str) else to_yaml(value).removesuffix("\n...\n").strip()


def children(node: yaml.Node) -> list[tuple[str | int, yaml.Node, yaml.Node]]:
    """(key or position, the node that has its line, the value) of each part."""
    if isinstance(node, yaml.MappingNode):
        return [(key.value, key, value) for key, value in node.value]
    return [(i, item, item) for i, item in enumerate(node.value)] if isinstance(node, yaml.SequenceNode) else []


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The values of a node with its aliases expanded; each node is visited once. One that holds itself has no end."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1
        known[id(node)] = 1 + sum(_count(child, known) for _, _, child in children(node))
    return known[id(node)]


def _lines(node: yaml.Node, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    for name, written, child in children(node):
        yield (*path, name), written.start_mark.line + 1
        yield from _lines(child, (*path, name))


def _error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """`at`: a node or an event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)

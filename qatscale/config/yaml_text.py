"""YAML as people mean it: the YAML 1.2 core schema, without duplicate keys, with errors that say where.

PyYAML reads YAML 1.1, where `1e-3` is a text, `no` is false and `1:30` is ninety. Here `1e-3` is a number, only true
and false are truth values, and a key that occurs twice in a mapping is an error instead of the last one winning.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from qatscale.errors import UserError

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


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's way to say: none of YAML 1.1's

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = str(self.construct_scalar(node)).replace("_", "")
        base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
        return int(digits.removeprefix("0x").removeprefix("0o"), base)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_at: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key in first_at:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is here and on line {first_at[key]}; keep one", key_node.start_mark
                )
            first_at[str(key)] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `_Loader` would take for something else."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


_LIST = "tag:yaml.org,2002:seq"
for _tag, _pattern, _first in _SCALARS:
    for _either in (_Loader, _Dumper):
        _either.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _class in (list, tuple):
    _Dumper.add_representer(_class, lambda dumper, data: dumper.represent_sequence(_LIST, data, flow_style=True))


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` stands for. `source` is what an error calls it; raises UserError with the line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(where, None, f"{reason}.") from error
    except (yaml.YAMLError, ValueError) as error:  # an unprintable character; an integer with a stray underscore
        raise UserError(source, None, f"is no YAML: {error}.") from error


def to_yaml(value: Any) -> str:
    """Plain YAML in the order of the keys; `parse_yaml` gives the equal value back. Lists stay on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)

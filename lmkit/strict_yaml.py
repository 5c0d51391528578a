"""YAML as people mean it: 1.2 scalars, no aliases, no key given twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lmkit.errors import BadInput


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-4 is a number, on/off/yes/no and 12:30 are text. No aliases, no duplicate keys."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - the library's own class attribute

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in {k for k in keys if keys.count(k) > 1}:
            raise yaml.MarkedYAMLError(problem=f"the key {key} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str, source: str) -> Any:
    """Value of a YAML text; BadInput with `source` and the line when it is malformed.

    >>> parse_yaml("{learning_rate: 1e-4, mode: on}", "example")
    {'learning_rate': 0.0001, 'mode': 'on'}
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: it builds plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise BadInput(f"{where}  is not valid YAML: {getattr(error, 'problem', None) or error}.") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; BadInput when the file is missing, unreadable or not a mapping."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist. Pass --config an existing YAML file.") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise BadInput(f"{path} cannot be read as a UTF-8 text file ({error}).") from None
    if not isinstance(value, dict | None):
        raise BadInput(f"{path} holds a {type(value).__name__}; wanted a mapping such as `seed: 0`.")
    return value or {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` would read as something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)

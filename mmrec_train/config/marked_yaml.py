"""YAML and JSON text read into values that remember where each of them was written.

Plain scalars are read more strictly than by YAML 1.1, whose rules surprise: `1e-3` is a number, and `no`, `on`, `010`,
`0x1F`, `1:30` and dates are text. Merge keys (`<<`) are ordinary keys.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import yaml

from mmrec_train.errors import UserError

KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Mark:
    """Where a value was written: a line of a file, or a `--set` argument."""

    source: str
    line: int | None  # 0: the file as a whole; None: the source has no lines
    folder: Path  # what relative paths written here are looked up from

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One thing the user has to mend, and where."""

    mark: Mark
    message: str

    def __str__(self) -> str:
        return f"{self.mark}: {self.message}"


def raise_problems(problems: list[Problem]) -> None:
    """Raises one UserError that lists every problem, a line each; returns if there is none."""
    if problems:
        raise UserError("\n".join(dict.fromkeys(map(str, problems))))


@dataclass(frozen=True)
class Marked:
    """A value with its mark. The values of mappings and lists are `Marked` themselves."""

    value: Any
    mark: Mark

    def plain(self) -> Any:
        """The value without marks."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def get(self, path: KeyPath) -> "Marked | None":
        """The value at `path`, or None where there is none."""
        node = self
        for key in path:
            children: Any = dict(enumerate(node.value)) if isinstance(node.value, list) else node.value
            if not isinstance(children, dict) or key not in children:
                return None
            node = children[key]
        return node

    def mark_of(self, path: KeyPath) -> Mark:
        """Where the value at `path` was written, or the innermost one around it where there is none."""
        node = self.get(path)
        return node.mark if node else self.mark_of(path[:-1])


def merge(below: Marked, above: Marked) -> Marked:
    """`above` laid over `below`: mappings are merged key by key, anything else is replaced."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, child in above.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    # What a mapping lacks is to be added to the upper file, but not to a `--set` argument.
    return Marked(merged, below.mark if above.mark.line is None else above.mark)


class _Resolvers:
    """What plain scalars mean. The dumper shares it, so that text that looks like a number is quoted."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


_DIGITS, _EXPONENT = r"[0-9][0-9_]*", r"[eE][-+]?[0-9]+"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", rf"[-+]?(?:{_DIGITS}\.[0-9_]*|\.[0-9]+|{_DIGITS}(?={_EXPONENT}))(?:{_EXPONENT})?", list("-+.0123456789")),
):
    for _letter in _first:
        _Resolvers.yaml_implicit_resolvers.setdefault(_letter, []).append(
            (f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"))
        )


class _Loader(_Resolvers, yaml.SafeLoader):
    pass


class _Dumper(_Resolvers, yaml.SafeDumper):
    pass


def dump_yaml(value: Any) -> str:
    """ASCII YAML that `parse_yaml` reads back as an equal value (PyYAML folds U+0085 where it may stay as it is)."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)


def parse_yaml(text: str, mark: Mark, problems: list[Problem]) -> Marked:
    """Reads YAML; an empty text is an empty mapping. Appends duplicate and non-text keys to `problems`.

    `mark` is the text as a whole. Raises UserError on text that is not YAML.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Marked({}, mark)
            return replace(_build(node, loader, mark, problems, ()), mark=mark)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        place = _at(mark, error.problem_mark)
        raise UserError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{mark}: not valid YAML: {error}") from error


def parse_json(text: str, mark: Mark, problems: list[Problem]) -> Marked:
    """Reads JSON, otherwise like `parse_yaml`."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{replace(mark, line=error.lineno)}: not valid JSON: {error.msg}") from error
    # JSON is YAML, except that YAML allows no tabs between tokens; inside its strings JSON allows none either.
    return parse_yaml(text.replace("\t", " "), mark, problems)


def _at(mark: Mark, place: yaml.Mark | None) -> Mark:
    """`mark` moved to the line of a YAML mark, if its source has lines."""
    return mark if mark.line is None or place is None else replace(mark, line=place.line + 1)


def _build(
    node: yaml.Node, loader: _Loader, mark: Mark, problems: list[Problem], parents: tuple[yaml.Node, ...]
) -> Marked:
    if any(node is parent for parent in parents):
        raise yaml.MarkedYAMLError(problem="an alias that contains itself", problem_mark=node.start_mark)
    inside = (*parents, node)
    here = _at(mark, node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return Marked([_build(child, loader, mark, problems, inside) for child in node.value], here)
    if isinstance(node, yaml.MappingNode):
        children: dict[str, Marked] = {}
        for key_node, value_node in node.value:
            place = _at(mark, key_node.start_mark)
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problems.append(Problem(place, f"key {key!r} is not text"))
            elif key in children:
                problems.append(Problem(place, f"duplicate key '{key}' (first at {children[key].mark})"))
            else:
                # A value is found by its key, which is also where a block mapping's reader looks first.
                children[key] = replace(_build(value_node, loader, mark, problems, inside), mark=place)
        return Marked(children, here)
    return Marked(loader.construct_object(node), here)

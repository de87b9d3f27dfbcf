"""From YAML files and `--set` arguments to a `RunConfig`, and back to one YAML file."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmrec_train.config import deepspeed_file
from mmrec_train.config.checks import combination_problems
from mmrec_train.config.marked_yaml import (
    KeyPath,
    Mark,
    Marked,
    Problem,
    dump_yaml,
    merge,
    parse_yaml,
    raise_problems,
)
from mmrec_train.config.schema import ModelSection, Origin, RunConfig
from mmrec_train.config.suggest import did_you_mean, nearest
from mmrec_train.config.yaml_file import message_of
from mmrec_train.errors import UserError

ANY_NAME = "NAME"  # in a dotted key, for a name that the user gives


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The run configuration of a YAML file, its `base` files below it and `a.b.c=VALUE` overrides above it.

    Raises one UserError that lists every mistake found, a line each, with file and line or `--set` argument.
    """
    problems: list[Problem] = []
    document = _read_with_bases(Path(path), None, problems, ())
    for override in overrides:
        document = merge(document, _read_override(override, problems))
    try:
        config = RunConfig.model_validate(document.plain())
    except ValidationError as error:
        problems += [_describe(details, document) for details in error.errors()]
    raise_problems(problems)

    config = _resolve_deepspeed_file(config, document)
    raise_problems([*combination_problems(config), *deepspeed_file.problems(config)])
    _check_shape(config, document)
    return config


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Writes the whole configuration as YAML that `load_config` reads back equal; never leaves half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(config_yaml(config))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def config_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML."""
    return dump_yaml(config.model_dump(mode="json", by_alias=True))


def _read_with_bases(path: Path, named_at: Mark | None, problems: list[Problem], below: tuple[Path, ...]) -> Marked:
    """The file laid over its `base`, and that over its own; `below` are the files that led here."""
    place = f"{named_at}: base: " if named_at else ""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        others = path.parent.glob(f"*{path.suffix or '.yaml'}")
        match = nearest(path.name, (other.name for other in others))
        hint = f"; did you mean {path.with_name(match)}?" if match else ""
        raise UserError(f"{place}no such file: {path}{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place}cannot read {path}: {error}") from error

    document = parse_yaml(text, Mark(str(path), 0, path.parent), problems)
    if not isinstance(document.value, dict):
        raise UserError(f"{path}: must hold sections (lines like `run_dir: runs/mine`), got {_show(document.plain())}")
    base = document.value.pop("base", None)
    if base is None:
        return document
    if not isinstance(base.value, str):
        raise UserError(f"{base.mark}: base must be the path of another file, got {_show(base.plain())}")
    target = Path(os.path.normpath(path.parent / base.value))
    chain = (*below, path)
    if target.resolve() in (file.resolve() for file in chain):
        raise UserError(f"{base.mark}: base files form a circle: {' → '.join(map(str, (*chain, target)))}")
    return merge(_read_with_bases(target, base.mark, problems, chain), document)


def _read_override(argument: str, problems: list[Problem]) -> Marked:
    mark = Mark(f"--set {argument}", None, Path())
    key, equals, text = argument.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"{mark}: must look like section.key=value")
    if key == "base":
        raise UserError(f"{mark}: base is read from files only; name the file with --config")
    value = parse_yaml(text, mark, problems) if text.strip() else Marked(None, mark)
    for part in reversed(parts):
        value = Marked({part: value}, mark)
    return value


def _resolve_deepspeed_file(config: RunConfig, document: Marked) -> RunConfig:
    """The configuration with its origin, and with the DeepSpeed file's path independent of where it was named."""
    written = config.deepspeed.config
    mark = document.mark_of(("deepspeed", "config"))
    file = deepspeed_file.resolve(written, mark.folder)
    if file is None:
        meant = did_you_mean(Path(written).name, (path.name for path in deepspeed_file.shipped()))
        raise_problems([Problem(mark, f"deepspeed.config: no such file: {written}; in ds_configs, {meant}")])
    deepspeed = config.deepspeed.model_copy(update={"config": file})
    config = config.model_copy(update={"deepspeed": deepspeed})
    config._origin = Origin(document)
    return config


def _check_shape(config: RunConfig, document: Marked) -> None:
    """Builds the model's configuration once, so that an impossible shape is reported with its line."""
    try:
        config.model.to_model_config(None)
    except UserError as error:
        written = document.get(("model",))
        keys = written.value if written else {}
        named = [name for name in ModelSection.model_fields if name in str(error) and name in keys]
        mark = document.mark_of(("model", *named[:1]))
        raise UserError(f"{mark}: {error}") from error


def _describe(details: ErrorDetails, document: Marked) -> Problem:
    """One pydantic error in the words of someone who writes YAML."""
    path: KeyPath = details["loc"]
    key = ".".join(map(str, path))
    mark = document.mark_of(path)
    if details["type"] == "extra_forbidden":
        return Problem(mark, f"unknown key '{key}'; {_nearest_key(path)}")
    if details["type"] == "missing":
        return Problem(mark, f"missing key '{key}': {descriptions()[key]}")
    message = "must be a section of keys" if details["type"] == "model_type" else message_of(details)
    return Problem(mark, f"{key}: {message}, got {_show(details['input'])}")


def _nearest_key(path: KeyPath) -> str:
    """What may have been meant by an unknown key: its name elsewhere, a similar one here, a similar one elsewhere."""
    *section, word = map(str, path)
    by_name: dict[str, list[str]] = {}
    for key in descriptions():
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    siblings = {name: key for name, keys in by_name.items() for key in keys if _is_in(key.split(".")[:-1], section)}
    match: str | None
    if word in by_name:
        meant = by_name[word]
    elif match := nearest(word, siblings):
        meant = [siblings[match]]
    elif match := nearest(word, by_name):
        meant = by_name[match]
    else:
        return f"valid: {', '.join(siblings)}"
    return f"did you mean {' or '.join(repr(key) for key in meant)}?"


def _is_in(pattern: list[str], section: list[str]) -> bool:
    return len(pattern) == len(section) and all(p in (ANY_NAME, s) for p, s in zip(pattern, section, strict=True))


def descriptions() -> dict[str, str]:
    """Every dotted key with its meaning, sections included."""
    return dict(_fields(RunConfig, ""))


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        yield key, field.description or ""
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{key}.")
        for named in _named_sections(field.annotation):
            yield from _fields(named, f"{key}.{ANY_NAME}.")


def _named_sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section that a dictionary from names to sections holds, anywhere in a field's type."""
    for argument in get_args(annotation):
        if get_origin(annotation) is dict and isinstance(argument, type) and issubclass(argument, BaseModel):
            yield argument
        yield from _named_sections(argument)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

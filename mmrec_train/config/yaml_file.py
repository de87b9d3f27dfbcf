"""YAML files of one pydantic model each: recipes and sweeps. A run's configuration also has bases: `loading`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmrec_train.config.marked_yaml import Mark, Marked, Problem, parse_yaml, raise_problems
from mmrec_train.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(
    path: Path, model: type[Model], describe: Callable[[ErrorDetails, Marked], Problem], *, example: str
) -> tuple[Model, Marked]:
    """A file's content as `model`, and with its marks. UserError lists every mistake with file and line.

    Args:
        describe: One of pydantic's errors in the words of someone who writes the file.
        example: A line that such a file holds.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    problems: list[Problem] = []
    document = parse_yaml(text, Mark(str(path), 0, path.parent), problems)
    if not isinstance(document.value, dict):
        raise UserError(f"{path}: must hold keys (lines like `{example}`)")
    try:
        content = model.model_validate(document.plain())
    except ValidationError as error:
        raise_problems(problems + [describe(details, document) for details in error.errors()])
        raise AssertionError("an error without a problem") from error
    raise_problems(problems)
    return content, document


def message_of(details: ErrorDetails) -> str:
    """What pydantic finds wrong with a value, without its own idiom."""
    return details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def by_dotted_key(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by dotted key."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        values |= by_dotted_key(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values

"""From a sweep's YAML file to its trials. docs/tools.md describes the file."""

import itertools
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

import xxhash
from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import ErrorDetails

from mmrec_train.config import RunConfig, load_config
from mmrec_train.config.marked_yaml import KeyPath, Marked, Problem
from mmrec_train.config.schema import Count, Index, PathText, Section
from mmrec_train.config.suggest import did_you_mean
from mmrec_train.config.yaml_file import by_dotted_key, message_of, read_yaml
from mmrec_train.errors import UserError

Overrides = dict[str, Any]  # dotted key of the run configuration -> value
Values = Annotated[list[Any], Field(min_length=1)]

TRIALS_FOLDER = "trials"
LONGEST_NAME = 150  # bytes of a trial's name; file systems allow 255


class Range(Section):
    """Values that a random search draws from an interval: whole numbers if both ends are whole and the scale linear."""

    low: int | float = Field(description="smallest value")
    high: int | float = Field(description="largest value")
    scale: Literal["linear", "log"] = Field("linear", description="log: every factor of ten is equally likely")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError("low must be less than high")
        if self.scale == "log" and self.low <= 0:
            raise ValueError("low must be above 0 on a log scale")
        return self

    def draw(self, generator: random.Random) -> int | float:
        """A value, rounded to four significant digits."""
        if self.scale == "log":
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        elif isinstance(self.low, int) and isinstance(self.high, int):
            return generator.randint(self.low, self.high)
        else:
            value = generator.uniform(self.low, self.high)
        return min(max(float(f"{value:.4g}"), self.low), self.high)


def _distribution_kind(value: Any) -> str:
    return "values" if isinstance(value, list) else "range"


Distribution = Annotated[
    Annotated[Values, Tag("values")] | Annotated[Range, Tag("range")], Discriminator(_distribution_kind)
]


class RandomSearch(Section):
    """Independent draws. A trial's values depend on the seed and its number alone: more trials keep earlier ones."""

    trials: Count = Field(description="number of trials")
    seed: Index = Field(0, description="seed of the draws")
    parameters: dict[str, Distribution] = Field(min_length=1, description="of each key, a list or {low, high, scale}")


class Specification(Section):
    """A sweep's file."""

    config: PathText = Field(description="run configuration to start from; relative to the sweep's file")
    sweep_dir: PathText = Field(description="folder of the sweep: trials/NAME, results.csv, plot.png")
    overrides: Overrides = Field({}, description="values for every trial, by dotted key")
    grid: Annotated[dict[str, Values], Field(min_length=1)] | None = Field(
        None, description="a list of values for each dotted key; every combination is a trial"
    )
    random: RandomSearch | None = Field(None, description="draws of values")
    list_: Annotated[list[Overrides], Field(min_length=1)] | None = Field(
        None, alias="list", description="the overrides of each trial"
    )

    def choices(self) -> Iterator[Overrides]:
        """What each trial sets beyond `overrides`."""
        if self.grid is not None:
            for values in itertools.product(*self.grid.values()):
                yield dict(zip(self.grid, values, strict=True))
        elif self.random is not None:
            for number in range(self.random.trials):
                generator = random.Random(f"{self.random.seed}:{number}")
                yield {
                    key: source.draw(generator) if isinstance(source, Range) else generator.choice(source)
                    for key, source in self.random.parameters.items()
                }
        else:
            yield from self.list_ or []


@dataclass(frozen=True)
class Trial:
    """One run. `choice` is what it sets beyond the sweep's overrides, `arguments` all that follows `--set`."""

    name: str
    choice: Overrides
    arguments: tuple[str, ...]
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)


@dataclass(frozen=True)
class Sweep:
    """`labels`: the short name of each key that trials differ in."""

    config_path: Path
    folder: Path
    labels: Mapping[str, str]
    trials: tuple[Trial, ...]


def load_sweep(path: Path) -> Sweep:
    """Reads a sweep's file and checks every trial's configuration.

    Raises UserError for a bad file, a trial that is no valid configuration, and a trial whose run folder was made with
    another configuration.
    """
    specification = _read(path)
    config_path = Path(os.path.normpath(path.parent / specification.config))
    folder = Path(specification.sweep_dir)
    choices = list(specification.choices())
    labels = _labels(key for choice in choices for key in choice)
    trials: dict[str, Trial] = {}
    for choice in choices:
        name = _name(choice, labels)
        if name in trials:  # a random search may draw the same twice
            continue
        run_dir = folder / TRIALS_FOLDER / name
        values = {**specification.overrides, **choice, "run_dir": str(run_dir)}
        arguments = tuple(f"{key}={json.dumps(value)}" for key, value in values.items())
        try:
            config = load_config(config_path, arguments)
        except UserError as error:
            raise UserError(f"{path}, trial {name}: {error}") from error
        trials[name] = Trial(name, choice, arguments, config)
        _check_run_folder(trials[name])
    return Sweep(config_path, folder, labels, tuple(trials.values()))


def _read(path: Path) -> Specification:
    specification, document = read_yaml(path, Specification, _describe, example="config: ../configs/tiny.yaml")
    kinds = [kind for kind in ("grid", "random", "list") if kind in document.value]
    if len(kinds) != 1:
        raise UserError(f"{path}: needs one of grid, random and list, has {' and '.join(kinds) or 'none'}")
    if any("run_dir" in values for values in (specification.overrides, *specification.choices())):
        raise UserError(f"{path}: run_dir is each trial's own, below sweep_dir; leave it out")
    return specification


def _describe(details: ErrorDetails, document: Marked) -> Problem:
    """One pydantic error in the words of someone who writes YAML."""
    path: KeyPath = ()
    for part in details["loc"]:  # the parts that name no key are pydantic's names of alternatives
        if document.get((*path, part)) is not None:
            path = (*path, part)
    key, mark = ".".join(map(str, path)), document.mark_of(path)
    if details["type"] == "extra_forbidden":
        sections: dict[int, type[Section]] = {1: Specification, 2: RandomSearch}
        section = sections.get(len(path), Range)
        valid = [field.alias or name for name, field in section.model_fields.items()]
        return Problem(mark, f"unknown key '{key}'; {did_you_mean(str(path[-1]), valid)}")
    if details["type"] == "missing":
        return Problem(
            mark, f"{key}: missing key '{details['loc'][-1]}'" if key else f"missing key '{details['loc'][-1]}'"
        )
    return Problem(mark, f"{key}: {message_of(details)}, got {json.dumps(details['input'], default=str)}")


def _labels(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key; the whole key where another one ends alike."""
    unique = dict.fromkeys(keys)
    ends = [key.rpartition(".")[2] for key in unique]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(unique, ends, strict=True)}


def _name(choice: Overrides, labels: Mapping[str, str]) -> str:
    """A folder name that says what the trial sets, and differs where that does."""
    parts = (f"{labels[key]}={quote(json.dumps(value).strip(chr(34)), safe='+')}" for key, value in choice.items())
    name = ",".join(parts) or "unchanged"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{xxhash.xxh3_64_hexdigest(name.encode())}"


def _check_run_folder(trial: Trial) -> None:
    saved = trial.run_dir / "config.yaml"
    if not saved.exists():
        return
    there, here = (by_dotted_key(config.model_dump(by_alias=True)) for config in (load_config(saved), trial.config))
    differences = [f"{key} was {there[key]} and is {here[key]} now" for key in here if there[key] != here[key]]
    if differences:
        raise UserError(
            f"{trial.run_dir} was begun with another configuration: {'; '.join(differences)}. "
            "Choose another sweep_dir, or remove that folder."
        )

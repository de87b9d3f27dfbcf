"""What is to be prepared: the sources, how text is taken from each, and what is left out. docs/data_preparation.md."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from mmrec_train.config.marked_yaml import KeyPath, Marked, Problem
from mmrec_train.config.suggest import did_you_mean
from mmrec_train.config.yaml_file import message_of, read_yaml
from mmrec_train.data.manifest import SourceName, Weight
from mmrec_train.errors import UserError
from mmrec_train.preparation.filters import Filters
from mmrec_train.preparation.records import Extraction, Template
from mmrec_train.preparation.sources import Source, open_source
from mmrec_train.preparation.workers import Treatment


def _check_template(template: str) -> str:
    Template.parse(template)
    return template


Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LanguageFilter(_Section):
    field: Name = Field(description="field of the record that names the language")
    keep: Annotated[list[str], Field(min_length=1)] = Field(description="values that are kept")


class FilterChoice(_Section):
    min_characters: Annotated[int, Field(ge=0)] = Field(0, description="shorter documents are left out")
    max_characters: Count | None = Field(None, description="longer documents are left out")
    language: LanguageFilter | None = Field(None, description="documents in other languages are left out")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError("max_characters must not be less than min_characters")
        return self


class SourceChoice(_Section):
    """One source of text."""

    source: Name = Field(description="stdlib, a file, a folder, or the name of a data set on the Hugging Face hub")
    weight: Weight | None = Field(
        None, description="relative share of the tokens trained on; for all sources or none (then each its own tokens)"
    )
    text_field: Name | None = Field(None, description="field or column of the text; text where there is no template")
    template: Annotated[str, AfterValidator(_check_template)] | None = Field(
        None, description="text with fields in braces, in place of text_field"
    )
    name: Name | None = Field(None, description="configuration of a hub data set")
    split: Name | None = Field(None, description="split of a hub data set; train by default")
    pattern: Name | None = Field(None, description="files of a folder to read, such as '*.py'")
    max_tokens: Count | None = Field(None, description="stop with the document that reaches this many tokens")
    filters: FilterChoice = Field(FilterChoice(), description="what is left out")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.text_field is not None and self.template is not None:
            raise ValueError("give text_field or template, not both")
        return self

    @property
    def extraction(self) -> Extraction:
        template = Template.parse(self.template) if self.template else Template.of_field(self.text_field or "text")
        return Extraction(template, self.filters.language.field if self.filters.language else None)

    def treatment(self, validation_fraction: float) -> Treatment:
        language = self.filters.language
        filters = Filters(
            self.filters.min_characters, self.filters.max_characters, frozenset(language.keep) if language else None
        )
        return Treatment(self.extraction, filters, validation_fraction)

    def open(self) -> Source:
        source = open_source(
            self.source, fields=self.extraction.fields, pattern=self.pattern, name=self.name, split=self.split
        )
        options = {"--template": self.template, "--text-field": self.text_field, "--language": self.filters.language}
        given = [option for option, value in options.items() if value is not None]
        if given and not source.has_fields:
            raise UserError(f"{given[0]} names fields of records, but --source {self.source} has text files only")
        return source


class Recipe(_Section):
    """Everything that the documents of a data set depend on but the tokenizer."""

    sources: dict[SourceName, SourceChoice] = Field(min_length=1, description="by name, in the order they are read")
    deduplicate: bool = Field(False, description="leave out documents whose text has occurred, over all sources")
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.02, description="documents held out, chosen by a hash of their text"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        without = [name for name, source in self.sources.items() if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"give every source a weight, or none; {', '.join(without)} has none")
        return self


def load_recipe(path: Path) -> Recipe:
    """Reads a YAML file. Paths in it are relative to it. UserError lists every mistake with file and line."""
    recipe, _ = read_yaml(path, Recipe, _describe, example="sources:")
    return _located(recipe, path.parent)


def recipe_of_one(source: str, options: dict[str, Any]) -> Recipe:
    """A recipe of one source, "main"; `options` are keys of all sections, and `language` is text like "FIELD=en,de".

    UserError where an option is not possible.
    """
    models: dict[str, type[BaseModel]] = {"recipe": Recipe, "filters": FilterChoice, "source": SourceChoice}
    sections: dict[str, dict[str, Any]] = {name: {} for name in models}
    for key, value in options.items():
        if key == "language":
            field, equals, keep = value.partition("=")
            if not (field and equals and keep):
                raise UserError(f"--language {value}: must look like FIELD=en,de")
            value = {"field": field, "keep": keep.split(",")}
        owner = next(name for name, model in models.items() if key in model.model_fields)
        sections[owner][key] = value
    main = {"source": source, "filters": sections["filters"], **sections["source"]}
    try:
        return Recipe.model_validate({"sources": {"main": main}, **sections["recipe"]})
    except ValidationError as error:
        details = error.errors()[0]
        named = [f"--{part.replace('_', '-')} {options[part]}" for part in map(str, details["loc"]) if part in options]
        raise UserError(f"{named[0] if named else '--source ' + source}: {message_of(details)}") from None


def _located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with paths that do not depend on the working directory where they are those of files."""
    sources = {}
    for name, choice in recipe.sources.items():
        beside = folder / os.path.expanduser(choice.source)
        is_path = choice.source != "stdlib" and os.path.exists(beside)  # False, too, for what cannot be a path
        sources[name] = choice.model_copy(update={"source": str(beside)}) if is_path else choice
    return recipe.model_copy(update={"sources": sources})


_SECTIONS: dict[str, type[BaseModel]] = {"filters": FilterChoice, "language": LanguageFilter}


def _describe(details: ErrorDetails, document: Marked) -> Problem:
    """One pydantic error in the words of someone who writes YAML."""
    path: KeyPath = tuple(part for part in details["loc"] if part != "[key]")
    key, mark = ".".join(map(str, path)), document.mark_of(path)
    if details["type"] == "extra_forbidden":
        *section, word = map(str, path)
        model = Recipe if not section else _SECTIONS.get(section[-1], SourceChoice)
        return Problem(mark, f"unknown key '{key}'; {did_you_mean(word, model.model_fields)}")
    if details["type"] == "missing":
        return Problem(mark, f"missing key '{key}'")
    prefix = f"{key}: " if key else ""
    if details["type"] == "value_error":  # of several keys
        return Problem(mark, f"{prefix}{message_of(details)}")
    return Problem(mark, f"{prefix}{message_of(details)}, got {json.dumps(details['input'], default=str)}")

from pathlib import Path

import pytest

from mmrec_train.errors import UserError
from mmrec_train.preparation.recipe import (
    FilterChoice,
    LanguageFilter,
    Recipe,
    SourceChoice,
    load_recipe,
    recipe_of_one,
)

ROOT = Path(__file__).parents[2]


def load(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text, "utf-8")
    return load_recipe(folder / "recipe.yaml")


def test_every_key(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    recipe = load(
        tmp_path,
        """
sources:
  books: {source: books, weight: 2, pattern: "*.txt", filters: {min_characters: 100}}
  web:
    source: acme/web
    weight: 0.5
    template: "{title}\\n\\n{meta.body}"
    name: sample
    split: test
    max_tokens: 1000000
    filters:
      max_characters: 5000
      language: {field: meta.language, keep: [en, "no"]}
  code: {source: stdlib, weight: 1, text_field: content}
deduplicate: true
validation_fraction: 0.1
""",
    )
    language = LanguageFilter(field="meta.language", keep=["en", "no"])
    assert recipe == Recipe(
        sources={
            "books": SourceChoice(
                source=str(tmp_path / "books"), weight=2, pattern="*.txt", filters=FilterChoice(min_characters=100)
            ),
            "web": SourceChoice(
                source="acme/web",
                weight=0.5,
                template="{title}\n\n{meta.body}",
                name="sample",
                split="test",
                max_tokens=1_000_000,
                filters=FilterChoice(max_characters=5000, language=language),
            ),
            "code": SourceChoice(source="stdlib", weight=1, text_field="content"),
        },
        deduplicate=True,
        validation_fraction=0.1,
    )
    assert list(recipe.sources) == ["books", "web", "code"]


def test_the_example_is_valid() -> None:
    [path] = (ROOT / "launch/data").glob("*.yaml")
    assert len(load_recipe(path).sources) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deduplicate: true", "recipe.yaml: missing key 'sources'"),
        ("[a]", "recipe.yaml: must hold keys"),
        ("sources: {}", "recipe.yaml:1: sources: Dictionary should have at least 1 item"),
        ("sources:\n  a:\n    weight: 1", "recipe.yaml:2: missing key 'sources.a.source'"),
        (
            "sources:\n  a:\n    source: b\n    wieght: 1",
            "recipe.yaml:4: unknown key 'sources.a.wieght'; did you mean 'weight'?",
        ),
        ("sources:\n  a: {source: b}\ndedup: true", "recipe.yaml:3: unknown key 'dedup'; did you mean 'deduplicate'?"),
        (
            "sources:\n  a:\n    source: b\n    filters:\n      min_chars: 3",
            "recipe.yaml:5: unknown key 'sources.a.filters.min_chars'; did you mean 'min_characters'?",
        ),
        (
            "sources:\n  a:\n    source: b\n    filters:\n      language: {feld: x, keep: [y]}",
            "recipe.yaml:5: missing key 'sources.a.filters.language.field'",
        ),
        (
            "sources:\n  a: {source: b, weight: 0}",
            "recipe.yaml:2: sources.a.weight: must be greater than or equal to 0.000000001, got 0",
        ),
        ("sources:\n  a: {source: b, weight: .inf}", "recipe.yaml:2: sources.a.weight: "),
        ("sources:\n  a: {source: b, weight: 1e308}", "recipe.yaml:2: sources.a.weight: "),
        ("sources:\n  a: {source: b, max_tokens: yes}", "recipe.yaml:2: sources.a.max_tokens: must be a valid integer"),
        (
            "sources:\n  a: {source: b, template: plain}",
            "recipe.yaml:2: sources.a.template: the template names no field",
        ),
        (
            "sources:\n  a: {source: b, template: '{x}', text_field: x}",
            "recipe.yaml:2: sources.a: give text_field or template, not both",
        ),
        (
            "sources:\n  a: {source: b, filters: {min_characters: 3, max_characters: 2}}",
            "recipe.yaml:2: sources.a.filters: max_characters must not be less than min_characters",
        ),
        (
            "sources:\n  a: {source: b, weight: 1}\n  c: {source: d}",
            "recipe.yaml: give every source a weight, or none; c has none",
        ),
        ("sources:\n  a/b: {source: c}", "recipe.yaml:2: sources.a/b: "),
        (
            "sources:\n  a: {source: b}\nvalidation_fraction: 1.0",
            "recipe.yaml:3: validation_fraction: must be less than 1",
        ),
        ("sources:\n  a: {source: b}\n  a: {source: c}", "recipe.yaml:3: duplicate key 'a'"),
        ("sources: [", "not valid YAML"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_every_mistake_is_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, "sources:\n  a: {weight: x}\nvalidation_fraction: -1")
    assert len(str(caught.value).splitlines()) == 3


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")


def test_options_of_one_source() -> None:
    options = {"language": "lang=en,de", "min_characters": 3, "text_field": "body", "deduplicate": True}
    recipe = recipe_of_one("somewhere", options)
    filters = FilterChoice(min_characters=3, language=LanguageFilter(field="lang", keep=["en", "de"]))
    main = SourceChoice(source="somewhere", text_field="body", filters=filters)
    assert recipe == Recipe(sources={"main": main}, deduplicate=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "--max-tokens 0: must be greater than or equal to 1"),
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0: must be less than 1"),
        ({"validation_fraction": float("nan")}, "--validation-fraction nan: "),
        ({"language": "en"}, "--language en: must look like FIELD=en,de"),
        ({"template": "{"}, "--template {: "),
        ({"min_characters": 5, "max_characters": 2}, "max_characters must not be less than min_characters"),
    ],
)
def test_options_that_are_not_possible(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_of_one("somewhere", options)
    assert message in str(caught.value)


@pytest.mark.parametrize("source", ["~nobody-has-this-name/x", "x" * 300])
def test_a_source_that_cannot_be_a_path_is_left_as_it_is(tmp_path: Path, source: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"sources:\n  a: {{source: {source}}}")
    assert load_recipe(tmp_path / "recipe.yaml").sources["a"].source == source


def test_a_language_field_is_none_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    choice = recipe_of_one(str(tmp_path), {"language": "lang=en"}).sources["main"]
    with pytest.raises(UserError, match=r"--language names fields of records, but --source .* has text files only"):
        choice.open()

"""Texts in files, recipes of them, and what a data set made of them holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrec_train.data.dataset import open_dataset
from mmrec_train.data.manifest import Manifest, Split
from mmrec_train.data.tokenizer import load_tokenizer
from mmrec_train.preparation.ingest import Settings, prepare
from mmrec_train.preparation.recipe import Recipe

TEXTS = [f"document {number}: " + "some words and more words " * (number % 7 + 1) for number in range(200)]


def write_lines(path: Path, records: Sequence[str | dict[str, Any]]) -> Path:
    """A JSON lines file; a record that is text gets the field "text"."""
    lines = (json.dumps({"text": record} if isinstance(record, str) else record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def recipe_of(source: Path | str | dict[str, dict[str, Any]], **options: Any) -> Recipe:
    """A recipe of one source, "main", or of several; no document is held out unless `options` say so."""
    sources = source if isinstance(source, dict) else {"main": {"source": str(source)}}
    return Recipe.model_validate({"sources": sources, "validation_fraction": 0.0, **options})


def prepare_texts(out: Path, texts: Sequence[str], *, tokenizer: str | int = 300, **options: Any) -> Manifest:
    """A data set of these documents, prepared in this process."""
    source = write_lines(out.with_name(f"{out.name}.jsonl"), texts)
    return prepare(recipe_of(source, **options), out, tokenizer=tokenizer, settings=Settings(1, shard_bytes=1000))


def stored_texts(folder: Path, split: Split = "train", source: str = "main") -> list[str]:
    """The documents of a source's split, in their order, decoded."""
    documents = open_dataset(folder, split, verify=True).sources[source]
    tokenizer = load_tokenizer(folder)
    stored = [documents.read(number).tolist() for number in range(documents.num_documents)]
    assert all(tokens[0] == tokenizer.bos_token_id for tokens in stored)
    return [tokenizer.decode(tokens[1:]) for tokens in stored]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

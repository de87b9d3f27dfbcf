import errno
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_train.data.dataset import open_dataset
from mmrec_train.data.manifest import read_manifest
from mmrec_train.data.tokenizer import Encoder, pretrained_tokenizer, train_tokenizer
from mmrec_train.errors import UserError
from mmrec_train.preparation import ingest, long_texts
from mmrec_train.preparation.ingest import Progress, Settings, prepare
from mmrec_train.preparation.shards import SplitWriter
from tests.preparation.texts import TEXTS, contents, prepare_texts, recipe_of, stored_texts, write_lines

ALONE = Settings(1, batch_bytes=2000, commit_seconds=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 320).save_pretrained(folder)
    return str(folder)


def test_every_document_is_in_one_split_whole_and_in_order(tmp_path: Path) -> None:
    manifest = prepare_texts(tmp_path / "out", TEXTS, tokenizer=400, validation_fraction=0.2)
    train, validation = stored_texts(tmp_path / "out"), stored_texts(tmp_path / "out", "validation")
    held_out = set(validation)
    assert train == [text for text in TEXTS if text not in held_out]
    assert validation == [text for text in TEXTS if text in held_out]
    assert 20 <= len(validation) <= 60
    assert len(manifest.sources["main"].splits["train"].shards) > 1
    assert read_manifest(tmp_path / "out") == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.jsonl"]


def test_the_same_text_is_on_the_same_side_in_another_data_set(tmp_path: Path) -> None:
    prepare_texts(tmp_path / "a", TEXTS, validation_fraction=0.2)
    prepare_texts(tmp_path / "b", TEXTS[::-3] + ["new"] * 9, validation_fraction=0.2)
    first, second = (set(stored_texts(tmp_path / name, "validation")) for name in ("a", "b"))
    assert second - {"new"} == first & set(TEXTS[::-3])


def test_neither_processes_nor_batches_change_a_byte(tmp_path: Path) -> None:
    sources: dict[str, dict[str, Any]] = {
        name: {"source": str(write_lines(tmp_path / f"{name}.jsonl", texts)), "max_tokens": limit}
        for name, texts, limit in (("a", TEXTS, 3000), ("b", [*TEXTS[::2], *"", *TEXTS[::-1]], 5000))
    }
    recipe = recipe_of(sources, validation_fraction=0.2, deduplicate=True)
    for name, how in (("1", Settings(1)), ("2", Settings(2, batch_bytes=700)), ("3", Settings(3, batch_bytes=1))):
        prepare(recipe, tmp_path / name, tokenizer=300, settings=how)
    assert len(contents(tmp_path / "1")) == 3 + 2 * 4
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_a_given_tokenizer_is_kept(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 350).save_pretrained(tmp_path / "given")
    manifest = prepare_texts(tmp_path / "out", TEXTS, tokenizer=str(tmp_path / "given"))
    again = prepare_texts(tmp_path / "more", TEXTS[:50], tokenizer=str(tmp_path / "out/tokenizer"))
    assert manifest.vocab_size == 350
    assert manifest.dtype == "uint16"
    assert again.tokenizer_fingerprint == manifest.tokenizer_fingerprint


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the tokenizer is trained on."""
    seen: list[str] = []

    def spy(texts: Iterator[str], vocab_size: int) -> object:
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(ingest, "train_tokenizer", spy)
    return seen


def test_the_tokenizer_never_sees_validation_text(
    tmp_path: Path, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "TOKENIZER_SAMPLE_BYTES", 3000)
    prepare_texts(tmp_path / "out", TEXTS, validation_fraction=0.2)
    assert seen == stored_texts(tmp_path / "out")[: len(seen)]
    assert 3000 <= sum(map(len, seen)) < 3200


def test_the_tokenizer_is_trained_on_sources_by_weight(
    tmp_path: Path, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "TOKENIZER_SAMPLE_BYTES", 4000)
    sources = {}
    for name, weight in (("a", 3.0), ("b", 1.0)):
        path = write_lines(tmp_path / f"{name}.jsonl", [name * 100] * 100)
        sources[name] = {"source": str(path), "weight": weight}
    prepare(recipe_of(sources), tmp_path / "out", tokenizer=300, settings=ALONE)
    assert seen == ["a" * 100] * 30 + ["b" * 100] * 10


def test_wide_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<e>": 0, "low": 65_535, "high": 70_000}, unk_token="<e>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>").save_pretrained(tmp_path / "wide")
    manifest = prepare_texts(tmp_path / "out", ["low high high", "high"], tokenizer=str(tmp_path / "wide"))
    documents = open_dataset(tmp_path / "out", "train", verify=True).sources["main"]
    assert manifest.dtype == "uint32"
    assert documents.read(0).tolist() == [0, 65_535, 70_000, 70_000]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_max_tokens_stops_with_the_document_that_reaches_it(tmp_path: Path, tokenizer: str, deduplicate: bool) -> None:
    lines = write_lines(
        tmp_path / "a.jsonl", ["", *TEXTS[:100], *([TEXTS[0]] if deduplicate else []), *TEXTS[100:], ""]
    )
    prepare(recipe_of(lines), tmp_path / "whole", tokenizer=tokenizer, settings=ALONE)
    documents = open_dataset(tmp_path / "whole", "train", verify=True).sources["main"]
    kept = [number for number in range(documents.num_documents) if not (deduplicate and number == 100)]
    lengths = documents.locate(np.array(kept)).length
    upto = {count: int(lengths[:count].sum()) for count in (10, 100, 101)}
    for limit, expected in (
        (upto[10], 10),
        (upto[10] + 1, 11),
        (1, 1),
        (upto[100], 100),
        (upto[101], 101),
        (10**9, 200),
    ):
        out = tmp_path / str(limit)
        recipe = recipe_of({"main": {"source": str(lines), "max_tokens": limit}}, deduplicate=deduplicate)
        info = prepare(recipe, out, tokenizer=tokenizer, settings=ALONE).sources["main"]
        assert stored_texts(out) == TEXTS[:expected]
        assert info.splits["train"].tokens == lengths[:expected].sum()
        assert info.provenance["max_tokens"] == limit
        duplicates = {"duplicate": 1} if deduplicate and expected > 100 else {}
        assert info.left_out == {"empty": 2 if expected == 200 else 1, **duplicates}


def test_the_first_of_equal_documents_is_kept_over_all_sources(tmp_path: Path, tokenizer: str) -> None:
    first = write_lines(tmp_path / "first.jsonl", ["a", "b", "a", "c"])
    second = write_lines(tmp_path / "second.jsonl", ["d", "c", "e", "d", "A"])
    sources = {"x": {"source": str(first)}, "y": {"source": str(second)}}
    manifest = prepare(recipe_of(sources, deduplicate=True), tmp_path / "out", tokenizer=tokenizer, settings=ALONE)
    assert stored_texts(tmp_path / "out", source="x") == ["a", "b", "c"]
    assert stored_texts(tmp_path / "out", source="y") == ["d", "e", "A"]
    assert manifest.sources["x"].left_out == {"duplicate": 1}
    assert manifest.sources["y"].left_out == {"duplicate": 2}


def test_a_document_beyond_max_tokens_is_no_duplicate_s_first(tmp_path: Path, tokenizer: str) -> None:
    lines = [str(write_lines(tmp_path / f"{name}.jsonl", texts)) for name, texts in (("x", ["a", "b"]), ("y", ["b"]))]
    sources: dict[str, dict[str, Any]] = {"x": {"source": lines[0], "max_tokens": 1}, "y": {"source": lines[1]}}
    prepare(recipe_of(sources, deduplicate=True), tmp_path / "out", tokenizer=tokenizer, settings=Settings(1))
    assert stored_texts(tmp_path / "out", source="y") == ["b"]


def test_filters_and_their_counts(tmp_path: Path, tokenizer: str) -> None:
    records: list[str | dict[str, Any]] = [
        {"text": "xx", "meta": {"language": "en"}},
        {"text": "xxx", "meta": {"language": "en"}},
        {"text": "äöüäö", "meta": {"language": "de"}},
        {"text": "xxxxx ", "meta": {"language": "en"}},
        {"text": "xxxx", "meta": {"language": "fr"}},
        {"text": "xxxx", "meta": {"language": None}},
        {"text": "xxxx", "meta": None},
        {"text": "", "meta": {"language": "fr"}},
    ]
    source: dict[str, Any] = {
        "source": str(write_lines(tmp_path / "a.jsonl", records)),
        "filters": {
            "min_characters": 3,
            "max_characters": 5,
            "language": {"field": "meta.language", "keep": ["en", "de"]},
        },
    }
    info = prepare(recipe_of({"main": source}), tmp_path / "out", tokenizer=tokenizer, settings=ALONE).sources["main"]
    assert stored_texts(tmp_path / "out") == ["xxx", "äöüäö"]
    assert info.left_out == {"too_short": 1, "too_long": 1, "language": 3, "empty": 1}
    assert info.provenance["filters"] == source["filters"]


def test_repaired_documents_are_counted_when_they_are_kept(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "a\xff\xff"}\n{"text": "b\xff"}\n{"text": "\\ud800a"}\n{"text": "ok"}'
    )
    manifest = prepare(recipe_of(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=tokenizer, settings=ALONE)
    info = manifest.sources["main"]
    assert (info.invalid_utf8_documents, info.invalid_utf8_replaced) == (3, 4)


def test_progress_is_reported_for_both_passes(tmp_path: Path) -> None:
    reports: list[Progress] = []
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    manifest = prepare(recipe_of(source), tmp_path / "out", tokenizer=300, settings=ALONE, on_progress=reports.append)
    assert {report.stage for report in reports} == {"training the tokenizer", "tokenizing"}
    assert reports[-1].documents == 200
    assert reports[-1].text_bytes == sum(map(len, TEXTS))
    assert reports[-1].tokens == manifest.sources["main"].splits["train"].tokens
    done = [report.done or 0 for report in reports if report.stage == "tokenizing"]
    assert done == sorted(done) and done[0] < 0.4 and done[-1] == 1


def test_progress_counts_tokens_where_they_are_limited_and_sources_by_size(tmp_path: Path, tokenizer: str) -> None:
    reports: list[Progress] = []
    paths = [str(write_lines(tmp_path / f"{number}.jsonl", TEXTS)) for number in range(2)]
    sources: dict[str, dict[str, Any]] = {"a": {"source": paths[0]}, "b": {"source": paths[1], "max_tokens": 1}}
    prepare(recipe_of(sources), tmp_path / "out", tokenizer=tokenizer, settings=ALONE, on_progress=reports.append)
    assert reports[-2].done == 0.5
    assert reports[-1].done == 1


@pytest.mark.parametrize("texts", [[], [""], ["", "a"]])
def test_an_empty_source_is_named(tmp_path: Path, texts: list[str]) -> None:
    source = {"source": str(write_lines(tmp_path / "a.jsonl", texts)), "filters": {"min_characters": 2}}
    with pytest.raises(
        UserError, match=r"the source hollow \(.*a\.jsonl\) holds no text to keep.* Nothing was written"
    ):
        prepare(recipe_of({"hollow": source}), tmp_path / "out", tokenizer=300, settings=Settings(1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_empty_source_is_named_before_others_are_tokenized(tmp_path: Path, tokenizer: str) -> None:
    sources = {
        name: {"source": str(write_lines(tmp_path / f"{name}.jsonl", texts)), "filters": {"min_characters": 2}}
        for name, texts in (("full", ["ab"]), ("hollow", ["", "a", "b"]))
    }
    message = r"the source hollow .* left out: 1 empty, 2 too_short\. Nothing was written"
    with pytest.raises(UserError, match=message):
        prepare(recipe_of(sources), tmp_path / "out", tokenizer=tokenizer, settings=ALONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.jsonl", "hollow.jsonl"]


def test_a_source_of_duplicates_only_stays_empty(tmp_path: Path, tokenizer: str) -> None:
    sources = {
        name: {"source": str(write_lines(tmp_path / f"{name}.jsonl", texts))}
        for name, texts in (("full", ["a", "b"]), ("copy", ["", "a"]), ("more", ["b", "c"]))
    }
    manifest = prepare(recipe_of(sources, deduplicate=True), tmp_path / "out", tokenizer=tokenizer, settings=ALONE)
    assert manifest.sources["copy"].left_out == {"empty": 1, "duplicate": 1}
    assert manifest.sources["copy"].splits == {}
    assert list(open_dataset(tmp_path / "out", "train", verify=True).sources) == ["full", "more"]
    assert stored_texts(tmp_path / "out", source="more") == ["c"]


def test_empty_validation_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 1 documents falls into the (train|validation) split"):
        prepare_texts(tmp_path / "out", ["alone"], validation_fraction=0.5)
    assert not (tmp_path / "out").exists()


def test_too_small_a_vocabulary_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--train-tokenizer 3 is too small.*Nothing was written"):
        prepare_texts(tmp_path / "out", TEXTS, tokenizer=3)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare_texts(tmp_path / "out", TEXTS)  # an empty folder is fine
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        prepare_texts(tmp_path / "out", TEXTS)
    assert contents(tmp_path / "out") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        prepare_texts(tmp_path / "file", ["other"])
    recipe = recipe_of(tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="cannot write there: Not a directory"):
        prepare(recipe, tmp_path / "file/below", tokenizer=300, settings=ALONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.jsonl", "out", "out.jsonl"]


def test_no_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By hand: to root, every folder is writable.
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"--out .*/out: cannot write there: Permission denied"):
        prepare_texts(tmp_path / "out", TEXTS)


def test_manifest_is_plain_json_without_dates(tmp_path: Path) -> None:
    source = {"source": str(write_lines(tmp_path / "a.jsonl", TEXTS)), "text_field": "text", "weight": 2.0}
    prepare(recipe_of({"a": source}, validation_fraction=0.1), tmp_path / "out", tokenizer=300, settings=ALONE)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["format"] == 2
    assert manifest["preparation"] == {"tokenizer": 300, "validation_fraction": 0.1, "deduplicate": False}
    assert manifest["sources"]["a"]["weight"] == 2.0
    assert manifest["sources"]["a"]["provenance"] == {
        "kind": "files",
        "path": str(tmp_path / "a.jsonl"),
        "files": 1,
        "text_field": "text",
    }
    assert set(manifest["sources"]["a"]["splits"]) == {"train", "validation"}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_long_document_among_short_ones_has_the_tokens_of_the_whole(
    tmp_path: Path, tokenizer: str, processes: int
) -> None:
    long_text = "".join(f"line {number}, {number * number % 97}\n" for number in range(150_000))
    assert len(long_text) > 2 * long_texts.PIECE
    source = write_lines(tmp_path / "in.jsonl", [TEXTS[0], long_text, TEXTS[1], long_text[::-1], TEXTS[2]])
    prepare(recipe_of(source), tmp_path / "out", tokenizer=tokenizer, settings=Settings(processes))
    stored = open_dataset(tmp_path / "out", "train", verify=True).sources["main"]
    encode = Encoder(pretrained_tokenizer(tokenizer))
    for number, text in enumerate([TEXTS[0], long_text, TEXTS[1], long_text[::-1], TEXTS[2]]):
        np.testing.assert_array_equal(stored.read(number), encode([text])[0])


def test_many_documents_of_one_token(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"a"}\n' * 100_000)
    prepare(recipe_of(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=tokenizer, settings=Settings(1, 1 << 17))
    documents = open_dataset(tmp_path / "out", "train", verify=True).sources["main"]
    assert (documents.num_documents, documents.num_tokens, len(documents.shards)) == (100_000, 200_000, 4)
    assert all((np.diff(documents.starts(shard)) == 2).all() for shard in range(4))


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30)),
    shard_tokens=st.integers(1, 20),
)
def test_shards_do_not_depend_on_how_documents_arrive(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], cuts: list[int], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(sum(lengths))
    bounds = np.cumsum([0, *lengths])
    one, many, resumed = (folder / name for name in ("one", "many", "resumed"))
    writer = SplitWriter(one, "uint16", shard_bytes=2 * shard_tokens)
    for begin, end in itertools.pairwise(bounds):
        writer.add(tokens[begin:end])
    expected = writer.close()
    edges = sorted({0, len(lengths), *(cut for cut in cuts if cut < len(lengths))})
    writer = SplitWriter(many, "uint16", shard_bytes=2 * shard_tokens)
    killed = SplitWriter(resumed, "uint16", shard_bytes=2 * shard_tokens)
    for first, last in itertools.pairwise(edges):
        part = tokens[bounds[first] : bounds[last]], np.array(lengths[first:last])
        writer.extend(*part)
        shards, unfinished = list(killed.shards), killed.sync()
        killed.extend(*part)  # lost
        killed = SplitWriter(resumed, "uint16", shard_bytes=2 * shard_tokens, shards=shards, unfinished=unfinished)
        killed.extend(*part)
    assert writer.close() == killed.close() == expected
    assert contents(one) == contents(many) == contents(resumed)


def test_a_shard_that_lost_bytes_is_not_gone_on_with(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path / "s", "uint16")
    writer.add(np.arange(10))
    unfinished = writer.sync()
    os.truncate(tmp_path / "s/shard_00000.bin", 19)
    with pytest.raises(UserError, match=r"shard_00000\.bin has 19 bytes, but 20 had been written"):
        SplitWriter(tmp_path / "s", "uint16", unfinished=unfinished)


def test_parquet_with_metadata_columns_gzipped_lines_and_text_folders(tmp_path: Path, tokenizer: str) -> None:
    """The three forms side by side, in two processes, against what they hold."""
    import gzip

    table = {
        "url": [f"https://example.org/{number}" for number in range(100)],
        "meta": [{"language": "en" if number % 2 else "de", "score": number / 7} for number in range(100)],
        "title": [f"title {number}" for number in range(100)],
        "body": [f"body {number} " * 20 for number in range(100)],
    }
    pq.write_table(pa.table(table), tmp_path / "web.parquet", row_group_size=30)
    with gzip.open(tmp_path / "code.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"content": f"def f{number}(): pass\n" * 9}) + "\n" for number in range(80))
    for number in range(60):
        path = tmp_path / "books" / f"{number % 3}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"chapter {number} " * 30)
    sources: dict[str, dict[str, Any]] = {
        "web": {
            "source": str(tmp_path / "web.parquet"),
            "template": "{title} ({meta.score})\n\n{body}",
            "filters": {"language": {"field": "meta.language", "keep": ["en"]}},
            "weight": 0.5,
        },
        "code": {"source": str(tmp_path / "code.jsonl.gz"), "text_field": "content", "weight": 0.25},
        "books": {"source": str(tmp_path / "books"), "weight": 0.25},
    }
    how = Settings(2, batch_bytes=3000, commit_seconds=0)
    manifest = prepare(recipe_of(sources), tmp_path / "out", tokenizer=tokenizer, settings=how)
    assert stored_texts(tmp_path / "out", source="web") == [
        f"title {number} ({number / 7})\n\n" + f"body {number} " * 20 for number in range(1, 100, 2)
    ]
    assert stored_texts(tmp_path / "out", source="code") == [f"def f{number}(): pass\n" * 9 for number in range(80)]
    order = sorted(range(60), key=lambda number: (number % 3, number))
    assert stored_texts(tmp_path / "out", source="books") == [f"chapter {number} " * 30 for number in order]
    assert [info.weight for info in manifest.sources.values()] == [0.5, 0.25, 0.25]

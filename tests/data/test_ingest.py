import errno
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmrec_train.data import ingest
from mmrec_train.data.dataset import TokenDataset, open_dataset
from mmrec_train.data.ingest import Progress, prepare
from mmrec_train.data.manifest import read_manifest
from mmrec_train.data.shards import SplitWriter
from mmrec_train.data.tokenizer import load_tokenizer, train_tokenizer
from mmrec_train.errors import UserError
from tests.data.documents import Texts

TEXTS = [f"document {number}: " + "some words and more words " * (number % 7 + 1) for number in range(200)]


def stored_texts(dataset: TokenDataset, folder: Path) -> list[str]:
    tokenizer = load_tokenizer(folder)
    documents = [dataset.read(i, 0, dataset.document_length(i)) for i in range(dataset.num_documents)]
    assert all(document[0] == dataset.manifest.bos_id for document in documents)
    return [tokenizer.decode(document[1:]) for document in documents]


def test_every_document_is_in_one_split_whole_and_in_order(tmp_path: Path) -> None:
    manifest = prepare(Texts(TEXTS), tmp_path / "out", tokenizer=400, validation_fraction=0.2, shard_tokens=300)
    train = stored_texts(open_dataset(tmp_path / "out", "train", verify=True), tmp_path / "out")
    validation = stored_texts(open_dataset(tmp_path / "out", "validation", verify=True), tmp_path / "out")
    held_out = set(validation)
    assert train == [text for text in TEXTS if text not in held_out]
    assert validation == [text for text in TEXTS if text in held_out]
    assert 20 <= len(validation) <= 60
    assert len(manifest.splits["train"].shards) > 1
    assert read_manifest(tmp_path / "out") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_text_is_on_the_same_side_in_another_data_set(tmp_path: Path) -> None:
    prepare(Texts(TEXTS), tmp_path / "a", tokenizer=300, validation_fraction=0.2)
    prepare(Texts(TEXTS[::-3] + ["new"] * 9), tmp_path / "b", tokenizer=300, validation_fraction=0.2)
    first = set(stored_texts(open_dataset(tmp_path / "a", "validation", verify=True), tmp_path / "a"))
    second = set(stored_texts(open_dataset(tmp_path / "b", "validation", verify=True), tmp_path / "b"))
    assert second - {"new"} == first & set(TEXTS[::-3])


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare(Texts(TEXTS), tmp_path / name, tokenizer=300, validation_fraction=0.2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 7
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_a_given_tokenizer_is_kept(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 350).save_pretrained(tmp_path / "given")
    manifest = prepare(Texts(TEXTS), tmp_path / "out", tokenizer=str(tmp_path / "given"), validation_fraction=0.2)
    again = prepare(
        Texts(TEXTS[:50]),
        tmp_path / "more",
        tokenizer=str(tmp_path / "out/tokenizer"),
        validation_fraction=0.2,
    )
    assert manifest.vocab_size == 350
    assert manifest.dtype == "uint16"
    assert again.tokenizer_fingerprint == manifest.tokenizer_fingerprint


def test_the_tokenizer_never_sees_validation_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spy(texts: Iterator[str], vocab_size: int) -> object:
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(ingest, "train_tokenizer", spy)
    monkeypatch.setattr(ingest, "TOKENIZER_SAMPLE_BYTES", 3000)
    prepare(Texts(TEXTS), tmp_path / "out", tokenizer=300, validation_fraction=0.2)
    train = stored_texts(open_dataset(tmp_path / "out", "train", verify=True), tmp_path / "out")
    assert seen == train[: len(seen)]
    assert 3000 <= sum(map(len, seen)) < 3200


def test_wide_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<e>": 0, "low": 65_535, "high": 70_000}, unk_token="<e>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>").save_pretrained(tmp_path / "wide")
    texts = Texts(["low high high", "high"])
    manifest = prepare(texts, tmp_path / "out", tokenizer=str(tmp_path / "wide"), validation_fraction=0)
    dataset = open_dataset(tmp_path / "out", "train", verify=True)
    assert manifest.dtype == "uint32"
    assert dataset.read(0, 0, 4).tolist() == [0, 65_535, 70_000, 70_000]


def test_max_tokens_stops_with_the_document_that_reaches_it(tmp_path: Path) -> None:
    whole = prepare(Texts(TEXTS), tmp_path / "whole", tokenizer=300, validation_fraction=0)
    tokenizer = str(tmp_path / "whole/tokenizer")
    lengths = open_dataset(tmp_path / "whole", "train", verify=True).document_lengths(np.arange(200))
    limit = int(lengths[:10].sum())
    for max_tokens, documents in ((limit, 10), (limit + 1, 11), (1, 1), (10**9, 200)):
        out = tmp_path / str(max_tokens)
        cut = prepare(Texts(TEXTS), out, tokenizer=tokenizer, validation_fraction=0, max_tokens=max_tokens)
        assert cut.splits["train"].documents == documents
        assert cut.splits["train"].tokens == lengths[:documents].sum()
        assert cut.source["max_tokens"] == max_tokens
    assert whole.source["max_tokens"] is None


def test_empty_and_repaired_documents_are_counted(tmp_path: Path) -> None:
    manifest = prepare(Texts(["a", "", "b", ""], replaced=2), tmp_path / "out", tokenizer=257, validation_fraction=0)
    assert manifest.empty_documents == 2
    assert manifest.invalid_utf8_documents == 2
    assert manifest.invalid_utf8_replaced == 4
    assert manifest.splits["train"].documents == 2


def test_progress_is_reported_for_both_passes(tmp_path: Path) -> None:
    reports: list[Progress] = []
    manifest = prepare(
        Texts(TEXTS),
        tmp_path / "out",
        tokenizer=300,
        validation_fraction=0,
        on_progress=lambda progress: reports.append(Progress(**vars(progress))),
    )
    assert {report.stage for report in reports} == {"training the tokenizer", "tokenizing"}
    assert reports[-1].documents == 200
    assert reports[-1].text_bytes == sum(map(len, TEXTS))
    assert reports[-1].tokens == manifest.splits["train"].tokens


@pytest.mark.parametrize("texts", [[], [""]])
def test_empty_source(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match="the source holds no text"):
        prepare(Texts(texts), tmp_path / "out", tokenizer=300, validation_fraction=0.1)
    assert list(tmp_path.iterdir()) == []


def test_empty_validation_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 1 documents falls into the (train|validation) split"):
        prepare(Texts(["alone"]), tmp_path / "out", tokenizer=300, validation_fraction=0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0"),
        ({"validation_fraction": float("nan")}, "--validation-fraction nan"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"tokenizer": 3}, "--train-tokenizer 3"),
    ],
)
def test_impossible_choices(tmp_path: Path, choice: dict[str, float], named: str) -> None:
    usual = {"tokenizer": 300, "validation_fraction": 0.1}
    with pytest.raises(UserError, match=named):
        prepare(Texts(TEXTS), tmp_path / "out", **{**usual, **choice})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare(Texts(TEXTS), tmp_path / "out", tokenizer=300, validation_fraction=0.1)  # an empty folder is fine
    before = (tmp_path / "out/manifest.json").read_bytes()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        prepare(Texts(["other"]), tmp_path / "out", tokenizer=300, validation_fraction=0)
    assert (tmp_path / "out/manifest.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        prepare(Texts(["other"]), tmp_path / "file", tokenizer=300, validation_fraction=0)
    with pytest.raises(UserError, match="cannot write there: File exists"):
        prepare(Texts(["other"]), tmp_path / "file/below", tokenizer=300, validation_fraction=0)


def test_no_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By hand: to root, every folder is writable.
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"--out .*/out: cannot write there: Permission denied"):
        prepare(Texts(TEXTS), tmp_path / "out", tokenizer=300, validation_fraction=0.1)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SplitWriter, document: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SplitWriter, "add", fail)
    with pytest.raises(UserError, match="writing failed: No space left on device"):
        prepare(Texts(TEXTS), tmp_path / "out", tokenizer=300, validation_fraction=0.1)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Texts(TEXTS), tmp_path / "out", tokenizer=300, validation_fraction=0.1, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_manifest_is_plain_json_without_dates(tmp_path: Path) -> None:
    prepare(Texts(TEXTS), tmp_path / "out", tokenizer=300, validation_fraction=0.1)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["source"] == {"kind": "test", "validation_fraction": 0.1, "max_tokens": None}
    assert set(manifest["splits"]) == {"train", "validation"}

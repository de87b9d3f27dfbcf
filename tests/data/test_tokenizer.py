import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmrec_train.data.tokenizer import (
    END_OF_TEXT,
    Encoder,
    fingerprint,
    load_tokenizer,
    pretrained_tokenizer,
    special_ids,
    train_tokenizer,
    vocab_size,
)
from mmrec_train.errors import UserError
from tests.preparation.texts import prepare_texts

SAMPLE = ["the quick brown fox jumps over the lazy dog " * 20, "def f(x):\n    return x + 1\n" * 20]


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerBase:
    return train_tokenizer(SAMPLE, 300)


def test_one_special_token_is_bos_and_eos(trained: PreTrainedTokenizerBase) -> None:
    assert vocab_size(trained) == len(trained) == 300
    assert special_ids(trained) == (0, 0)
    assert trained.convert_ids_to_tokens(0) == END_OF_TEXT


@settings(deadline=None)
@given(st.text())
def test_any_text_is_stored_and_comes_back(trained: PreTrainedTokenizerBase, text: str) -> None:
    [tokens] = Encoder(trained)([text])
    assert tokens[0] == 0
    assert 0 not in tokens[1:]
    assert trained.decode(tokens[1:], clean_up_tokenization_spaces=False) == text


def test_text_that_spells_a_special_token_is_only_text(trained: PreTrainedTokenizerBase) -> None:
    [tokens] = Encoder(trained)([f"a{END_OF_TEXT}b"])
    assert tokens.tolist().count(0) == 1
    assert trained.decode(tokens[1:]) == f"a{END_OF_TEXT}b"


def test_training_is_deterministic(tmp_path: Path) -> None:
    train_tokenizer(SAMPLE, 280).save_pretrained(tmp_path / "a")
    train_tokenizer(SAMPLE, 280).save_pretrained(tmp_path / "b")
    train_tokenizer(SAMPLE, 281).save_pretrained(tmp_path / "c")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "c")


def test_fingerprint_ignores_the_layout_of_the_file(tmp_path: Path, trained: PreTrainedTokenizerBase) -> None:
    trained.save_pretrained(tmp_path)
    before = fingerprint(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    assert fingerprint(tmp_path) == before


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer(SAMPLE, 256)
    assert vocab_size(train_tokenizer(SAMPLE, 257)) == 257


def without_eos(folder: Path) -> None:
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(folder)


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    without_eos(tmp_path / "no_eos")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        pretrained_tokenizer(str(tmp_path / "no_eos"))
    (tmp_path / "no_eos/tokenizer.json").write_text("{}")
    for bad in (tmp_path / "no_eos", tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=f"cannot load the tokenizer {bad}: "):
            pretrained_tokenizer(str(bad))


def test_bos_falls_back_to_eos_and_gaps_in_the_ids_count(tmp_path: Path) -> None:
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="b")
    assert special_ids(tokenizer) == (7, 7)
    assert vocab_size(tokenizer) == 8


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    texts = [f"{text} {number}" for number in range(10) for text in SAMPLE]
    prepare_texts(tmp_path / "data", texts, validation_fraction=0.3)
    return tmp_path / "data"


def test_a_data_set_loads_its_own_tokenizer(data_set: Path) -> None:
    tokenizer = load_tokenizer(data_set)
    assert vocab_size(tokenizer) == 300
    assert tokenizer.decode(tokenizer("quick brown")["input_ids"]) == "quick brown"


def test_another_tokenizer_is_refused(data_set: Path) -> None:
    train_tokenizer(["something else entirely " * 50], 300).save_pretrained(data_set / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer is not the tokenizer that made this data set: its fingerprint is"):
        load_tokenizer(data_set)


def test_other_special_tokens_are_refused(data_set: Path) -> None:
    path = data_set / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "a"}))
    with pytest.raises(UserError, match=r"its bos and eos ids are \(0, \d+\), the manifest says \(0, 0\)"):
        load_tokenizer(data_set)


def test_missing_and_damaged_tokenizer(data_set: Path) -> None:
    path = data_set / "tokenizer/tokenizer.json"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match=r"tokenizer\.json: it is damaged"):
        load_tokenizer(data_set)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"tokenizer\.json: it is damaged"):
        load_tokenizer(data_set)
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: No such file"):
        load_tokenizer(data_set)

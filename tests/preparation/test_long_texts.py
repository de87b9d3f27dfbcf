"""A long text encoded in pieces has the tokens of the text encoded at once, whatever the tokenizer does."""

import random
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from mmrec_train.preparation import long_texts

SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]


def source(characters):
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert len(text) > characters
    return text[:characters]


def trained(model, trainer, normalizer=None, pre_tokenizer=None):
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(source(200_000).splitlines(keepends=True), trainer)
    return tokenizer


def byte_level():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    return trained(models.BPE(), trainer, None, pre_tokenizers.ByteLevel(add_prefix_space=False))


def words_without_accents():
    trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=["[UNK]"], show_progress=False)
    normalizer = normalizers.BertNormalizer(lowercase=True)
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, normalizer, pre_tokenizers.BertPreTokenizer())


def sentence_pieces():
    """One word to the tokenizer, with a mark where the text begins."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<unk>"], show_progress=False)
    return trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainer, normalizer)


def unigrams():
    trainer = trainers.UnigramTrainer(vocab_size=2000, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return trained(models.Unigram(), trainer, None, pre_tokenizers.Metaspace())


TOKENIZERS = {f.__name__: f for f in (byte_level, words_without_accents, sentence_pieces, unigrams)}


@pytest.fixture(scope="module", params=TOKENIZERS.values(), ids=list(TOKENIZERS))
def tokenizer(request):
    return request.param()


def whole(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def in_pieces(tokenizer, text, piece=5000, overlap=2000):
    return np.concatenate(long_texts.encode(tokenizer, text, piece, overlap)).tolist()


@pytest.mark.parametrize("characters", [1, 6_999, 7_000, 7_001, 60_000])
def test_source_code(tokenizer, characters):
    text = source(characters)
    assert in_pieces(tokenizer, text) == whole(tokenizer, text)


def test_pieces_are_what_is_encoded(tokenizer):
    """Not the whole text after all."""
    parts = long_texts.encode(tokenizer, source(60_000), 5000, 2000)
    assert len(parts) == 12


@settings(max_examples=40, deadline=None)
@example(seed=432, alphabet="x1 .,'s")  # unigrams: long words that can be divided in equally good ways
@given(
    seed=st.integers(0, 2**32), alphabet=st.sampled_from(["ab", "a", "é\u0301 e", "日本語🙂 ", "a b\n\t\r", "x1 .,'s"])
)
def test_what_is_not_like_text(tokenizer, seed, alphabet):
    """Runs without an end, accents that belong to the letter before, characters of several tokens."""
    pick = random.Random(seed)
    text = "".join(pick.choice(alphabet) * pick.choice([1, 1, 2, 7, 900]) for _ in range(150))
    assert in_pieces(tokenizer, text, 1000, 800) == whole(tokenizer, text)


class Threes:
    """Three characters are a token, counted from where the text begins: pieces that begin elsewhere disagree."""

    def __init__(self):
        self.lengths = []
        self.model = models.BPE()

    def encode(self, text, add_special_tokens):
        self.lengths.append(len(text))
        offsets = [(i, i + 3) for i in range(0, len(text), 3)]
        return SimpleNamespace(
            ids=[ord(text[first]) for first, _ in offsets], offsets=offsets, word_ids=[0] * len(offsets)
        )


def test_pieces_that_disagree_are_given_up_for_the_whole():
    tokenizer, text = Threes(), "abcdefghijk" * 2000
    ids = in_pieces(tokenizer, text)
    assert tokenizer.lengths[-1] == len(text)
    assert ids == whole(tokenizer, text)
    assert len(long_texts.encode(tokenizer, text, 6000, 2000)) == 4

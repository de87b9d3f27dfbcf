"""What a prepared data set says about itself: `manifest.json`. docs/data_format.md is for those who write their own.

    DATA/manifest.json
    DATA/tokenizer/                         the Hugging Face tokenizer
    DATA/train/SOURCE/shard_00000.bin       token ids, little-endian uint16 or uint32, document after document
    DATA/train/SOURCE/shard_00000.idx       int64 start of each document, then the number of tokens
    DATA/validation/SOURCE/...              the same; absent where no document was held out

Each document is stored as [bos] + its tokens.
"""

from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from mmrec_train.errors import UserError

FORMAT: Final = 2
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer"
COPY_REMEDY = "Copy the data set again from where it was whole, or prepare it again."

Split = Literal["train", "validation"]
Dtype = Literal["uint16", "uint32"]
MIN_WEIGHT, MAX_WEIGHT = 1e-9, 1e9  # sums, products and shares of them are numbers, too, and not 0
Weight = Annotated[float, Field(ge=MIN_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]  # it is a folder's name, too


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredFile(NamedTuple):
    """A file of a data set, as a reader needs it: path in the data set, bytes, xxh3_128, NumPy dtype of its entries."""

    path: str
    size: int
    checksum: str
    dtype: str


class FileInfo(_Record):
    """Size in bytes and checksum of one file."""

    size: int = Field(ge=1)
    xxh3_128: str = Field(pattern=r"^[0-9a-f]{32}$")  # it names the file in a cache, too


class ShardInfo(_Record):
    """One pair of files, `NAME.bin` and `NAME.idx`; a shard holds whole documents and at least one."""

    name: str = Field(pattern=r"^shard_\d{5}$")
    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    bin: FileInfo
    idx: FileInfo

    @model_validator(mode="after")
    def _index_has_all_documents(self) -> Self:
        _require(self.documents <= self.tokens, f"{self.documents} documents of {self.tokens} tokens")
        _require(
            self.idx.size == (self.documents + 1) * 8,
            f"an idx of {self.idx.size} bytes, where {self.documents} documents need {(self.documents + 1) * 8}",
        )
        return self


class SplitInfo(_Record):
    """One source's part of a split: the sums over its shards, and the shards in the order of their documents."""

    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    shards: tuple[ShardInfo, ...] = Field(strict=False, min_length=1)

    @model_validator(mode="after")
    def _sums_are_right(self) -> Self:
        _require(len({shard.name for shard in self.shards}) == len(self.shards), "two shards of one name")
        for key in ("documents", "tokens"):
            total = sum(getattr(shard, key) for shard in self.shards)
            _require(getattr(self, key) == total, f"{getattr(self, key)} {key}, but its shards hold {total}")
        return self


class SourceInfo(_Record):
    """One source of text: where it came from, what was left out or repaired, and what there is of it."""

    weight: Weight | None = Field(description="relative share of the tokens trained on; null: its own tokens")
    provenance: dict[str, JsonValue] = Field(description="where the text came from and how it was chosen")
    left_out: dict[str, Count] = Field(description="documents left out, by reason")
    invalid_utf8_documents: Count = Field(description="documents in which invalid text was replaced by U+FFFD")
    invalid_utf8_replaced: Count = Field(description="replacements in all of them")
    splits: dict[Split, SplitInfo] = Field(description="only those that hold documents")


class Manifest(_Record):
    """All a reader needs to check the data set and interpret its tokens. No dates: same input, same file."""

    format: Literal[2] = FORMAT
    dtype: Dtype
    bos_id: int
    eos_id: int
    vocab_size: int = Field(description="one more than the largest token id the tokenizer can produce")
    tokenizer_fingerprint: str = Field(description="xxh3_128 of the canonical tokenizer.json")
    preparation: dict[str, JsonValue] = Field(description="what was asked for all sources together")
    sources: dict[SourceName, SourceInfo] = Field(min_length=1)

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        width = 2 if self.dtype == "uint16" else 4
        _require(1 <= self.vocab_size <= 1 << (8 * width), f"a vocabulary of {self.vocab_size} in {self.dtype}")
        for name, token in (("bos_id", self.bos_id), ("eos_id", self.eos_id)):
            _require(0 <= token < self.vocab_size, f"{name} {token} in a vocabulary of {self.vocab_size}")
        for name, source in self.sources.items():
            for split, info in source.splits.items():
                for shard in info.shards:
                    _require(
                        shard.bin.size == shard.tokens * width,
                        f"{split}/{name}/{shard.name}.bin of {shard.bin.size} bytes, "
                        f"where {shard.tokens} tokens of {self.dtype} need {shard.tokens * width}",
                    )
        return self

    @model_validator(mode="after")
    def _all_have_weights_or_none(self) -> Self:
        given = [name for name, source in self.sources.items() if source.weight is not None]
        missing = ", ".join(name for name in self.sources if name not in given)
        _require(not (given and missing), f"a weight for {', '.join(given)}, but none for {missing}")
        return self


def _require(holds: bool, contradiction: str) -> None:
    if not holds:
        raise ValueError(f"it contradicts itself: {contradiction}")


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    path = folder / MANIFEST_NAME
    path.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`'s manifest; UserError where there is none, or one this version cannot read."""
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise not_prepared(str(folder)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}. Prepare the data set again.") from error
    return parse_manifest(text, str(path))


def not_prepared(folder: str) -> UserError:
    out = "FOLDER" if "://" in folder else folder
    return UserError(
        f"{folder} is not a prepared data set: it has no {MANIFEST_NAME}. "
        f"Make one with: python launch/prepare_data.py --source ... --out {out}"
    )


def parse_manifest(text: str, path: str) -> Manifest:
    """The manifest in `text`; `path` is for the message of the UserError where it is damaged or of another version."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        problem = first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{path}: {key}: {problem}. The manifest is damaged or of another version "
            f"(this one reads format {FORMAT}). Remove the data set and prepare it again."
        ) from None

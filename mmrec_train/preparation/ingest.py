"""From text to a prepared data set: read, tokenize in parallel, filter, split, write. Killed, it goes on from there."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from mmrec_train.config.yaml_file import by_dotted_key
from mmrec_train.data.checksums import file_checksum
from mmrec_train.data.manifest import TOKENIZER_NAME, Dtype, Manifest, SourceInfo, Split, read_manifest, write_manifest
from mmrec_train.data.tokenizer import fingerprint, pretrained_tokenizer, special_ids, train_tokenizer, vocab_size
from mmrec_train.disk import sync
from mmrec_train.errors import UserError
from mmrec_train.preparation.filters import DUPLICATE, OUTCOMES, is_held_out
from mmrec_train.preparation.journal import Journal, SourceState, open_journal
from mmrec_train.preparation.partial import Partial, Refusal, holds_something, occupied
from mmrec_train.preparation.recipe import Recipe
from mmrec_train.preparation.records import Document
from mmrec_train.preparation.shards import SHARD_BYTES, SplitWriter, split_info
from mmrec_train.preparation.sources import Position, Source, SourceUnavailable
from mmrec_train.preparation.workers import Encoded, Vocabulary, WorkerDied, Workers, is_kept

TOKENIZER_SAMPLE_BYTES = 64 << 20  # enough for a vocabulary of 32000, trained in under a minute
BATCH_BYTES = 1 << 20  # of records, encoded at once by a process
COMMIT_SECONDS = 5.0  # of work that a kill may cost
_COMMIT_BYTES = 64 << 20  # the same in bytes of tokens: what waits for the disk stays little
_BYTES_PER_TOKEN = 4  # a guess, for the progress only
_TOKENIZER_FILES = ("*token*.json", "*.model", "vocab.*", "merges.txt")
_SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass
class Progress:
    """What was done so far, in earlier calls, too."""

    stage: str
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0  # of the UTF-8 text that was used
    done: float | None = None  # part of the stage's work, in [0, 1] where known


@dataclass(frozen=True)
class Settings:
    """What the data set does not depend on, but for `shard_bytes`."""

    processes: int
    shard_bytes: int = SHARD_BYTES
    batch_bytes: int = BATCH_BYTES
    commit_seconds: float = COMMIT_SECONDS


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def prepare(
    recipe: Recipe,
    out: Path,
    *,
    tokenizer: str | int,
    settings: Settings | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Write the sources of `recipe` as a data set into the folder `out`, which appears only when it is complete.

    `tokenizer` is a name or folder, or the vocabulary size of one to train on TOKENIZER_SAMPLE_BYTES of training
    documents, from each source's beginning. Where an earlier call with the same arguments did not come to its end,
    this one goes on from what that one had committed. The result is the same, bit by bit, also for another number of
    processes.

    Raises UserError for sources, tokenizers, records and folders that cannot be used, a full disk and an unreachable
    hub; its message says what to do.
    """
    settings = settings or Settings(usable_cores())
    sources = _open_sources(recipe)
    partial = Partial(out)
    request = {
        "recipe": recipe.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "files of the tokenizer": _tokenizer_files(tokenizer),
        "shard_bytes": settings.shard_bytes,
    }
    with partial.locked(), _explained(partial):
        with open_journal(partial.journal) as journal:
            _check_request(journal, request, partial)
            if not journal.fact("complete"):
                if holds_something(partial.out):
                    raise occupied(partial.out)
                _Preparation(recipe, sources, tokenizer, partial, journal, settings, on_progress).run()
                journal.set_fact("complete", True)
        if partial.data.exists():
            partial.publish()
        manifest = read_manifest(partial.out)
        partial.discard()
    return manifest


def _tokenizer_files(tokenizer: str | int) -> dict[str, str]:
    """Checksums of a local tokenizer's files: other ones would not be those that the first documents got."""
    folder = Path(os.path.expanduser(str(tokenizer)))
    files = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)} if folder.is_dir() else set()
    return {path.name: file_checksum(path) for path in sorted(files)}


def _check_request(journal: Journal, request: dict[str, Any], partial: Partial) -> None:
    """Refuse to go on with something else; UserError with the differences."""
    before = journal.fact("request")
    if before is None:
        journal.set_fact("request", request)
        return
    then, now = (by_dotted_key(json.loads(json.dumps(value))) for value in (before, request))
    differences = [
        f"{key.removeprefix('recipe.')} was {json.dumps(then.get(key))} and is {json.dumps(now.get(key))} now"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
    if differences:
        raise Refusal(
            f"{partial.folder} is unfinished, and was begun with other options: {'; '.join(differences)}. Give the "
            "same options to go on, or remove that folder to start anew."
        )


def _open_sources(recipe: Recipe) -> dict[str, Source]:
    sources = {}
    for name, choice in recipe.sources.items():
        try:
            sources[name] = choice.open()
        except UserError as error:
            if len(recipe.sources) == 1:
                raise
            raise UserError(f"sources.{name}: {error}") from error
    return sources


@contextmanager
def _explained(partial: Partial) -> Iterator[None]:
    """Failures say what becomes of the unfinished folder: it is removed where no document has been written."""
    try:
        yield
    except Refusal:
        raise
    except (OSError, UserError) as error:
        message = str(error)
        if isinstance(error, OSError):
            message = f"--out {partial.out}: writing failed: {error.strerror or error}."
        if not partial.holds_documents:
            partial.discard()
            message += " Nothing was written."
        elif isinstance(error, OSError | SourceUnavailable | WorkerDied):
            message += f" What was prepared so far is kept in {partial.folder}: run the same command to go on."
        else:
            message += f" What was prepared so far, of the input as it was, is in {partial.folder}: remove it first."
        raise UserError(message) from error
    except BaseException:  # an interrupt
        if not partial.holds_documents:
            partial.discard()
        raise


class _Preparation:
    def __init__(
        self,
        recipe: Recipe,
        sources: dict[str, Source],
        tokenizer: str | int,
        partial: Partial,
        journal: Journal,
        settings: Settings,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._recipe, self._sources, self._tokenizer = recipe, sources, tokenizer
        self._partial, self._journal, self._settings = partial, journal, settings
        self._on_progress = on_progress
        self._states = {name: journal.state(name) for name in sources}

    def run(self) -> None:
        """Leave the whole data set in the partial folder."""
        self._partial.data.mkdir(exist_ok=True)
        for name, source in self._sources.items():
            recorded = self._journal.stock(name)
            stock = source.take_stock(recorded)
            if recorded is None:
                self._journal.set_stock(name, stock)
        for name, state in self._states.items():
            if state.position is None:
                self._check_holds_text(name)
        tokenizer = self._stored_tokenizer()
        bos_id, eos_id = special_ids(tokenizer)
        size = vocab_size(tokenizer)
        dtype: Dtype = "uint16" if size <= 1 << 16 else "uint32"
        vocabulary = Vocabulary(tokenizer.backend_tokenizer.to_str(), bos_id, dtype)
        with Workers[tuple[Position, float | None]](self._settings.processes, vocabulary) as workers:
            for name in self._sources:
                if not self._states[name].finished:
                    self._write_source(name, workers, dtype)
        manifest = Manifest(
            dtype=dtype,
            bos_id=bos_id,
            eos_id=eos_id,
            vocab_size=size,
            tokenizer_fingerprint=fingerprint(self._partial.data / TOKENIZER_NAME),
            preparation={
                "tokenizer": self._tokenizer,
                "validation_fraction": self._recipe.validation_fraction,
                "deduplicate": self._recipe.deduplicate,
            },
            sources={name: self._source_info(name) for name in self._sources},
        )
        self._check_splits(manifest)
        sync(write_manifest(self._partial.data, manifest))
        sync(self._partial.data)

    def _stored_tokenizer(self) -> PreTrainedTokenizerBase:
        """Put the tokenizer into the data set, and load it from there: what tokenizes is what readers get."""
        stored = self._partial.data / TOKENIZER_NAME
        if not stored.exists():
            if isinstance(self._tokenizer, int):
                tokenizer = train_tokenizer(self._sample(), self._tokenizer)
            else:
                tokenizer = pretrained_tokenizer(self._tokenizer)
            staged = self._partial.folder / TOKENIZER_NAME
            shutil.rmtree(staged, ignore_errors=True)
            tokenizer.save_pretrained(staged)
            for file in staged.iterdir():
                sync(file)
            staged.rename(stored)
            sync(self._partial.data)
        return pretrained_tokenizer(str(stored))

    def _filtered(self, name: str) -> Iterator[list[tuple[Document, str | None]]]:
        """The documents of a source, by batch, each with the reason why it is left out."""
        treatment = self._recipe.sources[name].treatment(self._recipe.validation_fraction)
        for piece in self._sources[name].read(None, self._settings.batch_bytes):
            documents = piece.batch.documents(treatment.extraction)
            yield [(document, treatment.filters.reason(document)) for document in documents]

    def _check_holds_text(self, name: str) -> None:
        """Better known now than after days of work on the sources before it."""
        left_out: Counter[str | None] = Counter()
        for documents in self._filtered(name):
            left_out.update(reason for _, reason in documents)
            if left_out[None]:
                return
        counts = ", ".join(f"{left_out[reason]} {reason}" for reason in OUTCOMES if left_out[reason])
        raise UserError(
            f"the source {name} ({self._recipe.sources[name].source}) holds no text to keep"
            + (f"; of its documents were left out: {counts}." if counts else ".")
        )

    def _sample(self) -> Iterator[str]:
        """Training documents of every source, in proportion to the weights."""
        progress = Progress("training the tokenizer")
        weights = {name: choice.weight or 1.0 for name, choice in self._recipe.sources.items()}
        for name in self._sources:
            room = TOKENIZER_SAMPLE_BYTES * weights[name] / sum(weights.values())
            for documents in self._filtered(name):
                for document, reason in documents:
                    data = document.text.encode()
                    held_out = is_held_out(xxhash.xxh3_64_intdigest(data), self._recipe.validation_fraction)
                    if reason is not None or held_out:
                        continue
                    yield document.text
                    room -= len(data)
                    progress.text_bytes += len(data)
                    progress.documents += 1
                    if room <= 0:
                        break
                self._on_progress(progress)
                if room <= 0:
                    break

    def _write_source(self, name: str, workers: Workers[tuple[Position, float | None]], dtype: Dtype) -> None:
        state, choice = self._states[name], self._recipe.sources[name]
        writers = {split: self._writer(name, split, dtype) for split in _SPLITS}
        treatment = choice.treatment(self._recipe.validation_fraction)
        jobs = (
            ((piece.position, piece.done), treatment, piece.batch)
            for piece in self._sources[name].read(state.position, self._settings.batch_bytes)
        )
        committed_at, committed_tokens = time.monotonic(), state.tokens
        with closing(workers.encode(jobs)) as batches:
            for (position, done), encoded in batches:
                is_full = self._add(encoded, state, writers, choice.max_tokens)
                state.position = position
                self._on_progress(self._progress(name, done))
                if is_full:
                    break
                unsafe_bytes = (state.tokens - committed_tokens) * encoded.tokens.itemsize
                if time.monotonic() - committed_at >= self._settings.commit_seconds or unsafe_bytes >= _COMMIT_BYTES:
                    self._journal.commit(name, state, writers)
                    committed_at, committed_tokens = time.monotonic(), state.tokens
        for writer in writers.values():
            writer.finish()
        state.finished = True
        self._journal.commit(name, state, writers)

    def _writer(self, name: str, split: Split, dtype: Dtype) -> SplitWriter:
        shards, unfinished = self._journal.shards(name, split)
        return SplitWriter(
            self._partial.data / split / name,
            dtype,
            shard_bytes=self._settings.shard_bytes,
            shards=shards,
            unfinished=unfinished,
        )

    def _add(
        self, encoded: Encoded, state: SourceState, writers: dict[Split, SplitWriter], max_tokens: int | None
    ) -> bool:
        """Write a batch's documents, and count them. Returns whether that brought the source to `max_tokens`."""
        room = None if max_tokens is None else max_tokens - state.tokens
        outcomes, count, is_full = self._chosen(encoded.documents, room)
        for reason, number in zip(OUTCOMES, np.bincount(outcomes[:count], minlength=len(OUTCOMES)), strict=True):
            if number and reason not in _SPLITS:
                state.left_out[reason] = state.left_out.get(reason, 0) + int(number)
        lengths = encoded.documents["tokens"]
        for split in _SPLITS:
            chosen = outcomes == OUTCOMES.index(split)
            chosen[count:] = False
            if not chosen.any():
                continue
            documents = encoded.documents[chosen]
            writers[split].extend(encoded.tokens[np.repeat(chosen, lengths)], documents["tokens"])
            state.documents += len(documents)
            state.tokens += int(documents["tokens"].sum())
            state.text_bytes += int(documents["text_bytes"].sum())
            state.invalid_documents += int(np.count_nonzero(documents["replaced"]))
            state.replaced += int(documents["replaced"].sum())
        return is_full

    def _chosen(self, documents: np.ndarray, room: int | None) -> tuple[np.ndarray, int, bool]:
        """What becomes of each document ([n], indices into OUTCOMES), how many are taken, whether they fill `room`."""
        outcomes = documents["outcome"].copy()
        if not self._recipe.deduplicate:
            if room is None:
                return outcomes, len(documents), False
            last = int(np.searchsorted(np.cumsum(documents["tokens"]), room))
            return outcomes, min(last + 1, len(documents)), last < len(documents)
        for number in np.flatnonzero(is_kept(documents)):
            if not self._journal.is_new(documents["hash"][number].tobytes()):
                outcomes[number] = OUTCOMES.index(DUPLICATE)
            elif room is not None:
                room -= int(documents["tokens"][number])
                if room <= 0:
                    return outcomes, int(number) + 1, True
        return outcomes, len(documents), False

    def _progress(self, current: str, done: float | None) -> Progress:
        states = self._states.values()
        parts, total = 0.0, 0.0
        for name, state in self._states.items():
            limit = self._recipe.sources[name].max_tokens
            if state.finished:
                part: float | None = 1.0
            elif name != current:
                part = 0.0
            else:
                part = max(done or 0.0, state.tokens / limit) if limit else done
            if part is None:
                parts = float("nan")
                break
            size = self._sources[name].size or (limit or 1 << 30) * _BYTES_PER_TOKEN
            parts, total = parts + size * part, total + size
        return Progress(
            "tokenizing",
            sum(state.documents for state in states),
            sum(state.tokens for state in states),
            sum(state.text_bytes for state in states),
            None if np.isnan(parts) else min(1.0, parts / total),
        )

    def _source_info(self, name: str) -> SourceInfo:
        choice, state = self._recipe.sources[name], self._states[name]
        chosen = choice.model_dump(mode="json", exclude={"source", "weight"}, exclude_defaults=True)
        shards = {split: self._journal.shards(name, split)[0] for split in _SPLITS}
        return SourceInfo(
            weight=choice.weight,
            provenance={**self._sources[name].provenance(), **chosen},
            left_out={reason: state.left_out[reason] for reason in OUTCOMES if reason in state.left_out},
            invalid_utf8_documents=state.invalid_documents,
            invalid_utf8_replaced=state.replaced,
            splits={split: split_info(found) for split, found in shards.items() if found},
        )

    def _check_splits(self, manifest: Manifest) -> None:
        fraction = self._recipe.validation_fraction
        documents = {
            split: sum(info.splits[split].documents for info in manifest.sources.values() if split in info.splits)
            for split in _SPLITS
        }
        if documents["train"] == 0 or (fraction > 0 and documents["validation"] == 0):
            empty = "train" if documents["train"] == 0 else "validation"
            raise UserError(
                f"with --validation-fraction {fraction} none of the {sum(documents.values())} documents falls into "
                f"the {empty} split. Give more documents, or change the fraction (0 makes no validation split)."
            )

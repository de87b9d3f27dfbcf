"""Worker processes that turn batches of records into token ids."""

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import xxhash
from tokenizers import Tokenizer

from mmrec_train.errors import UserError
from mmrec_train.plain_text import only_text
from mmrec_train.preparation import long_texts
from mmrec_train.preparation.filters import OUTCOMES, Filters, is_held_out
from mmrec_train.preparation.records import Batch, Extraction

Label = TypeVar("Label")

# One document: what becomes of it (an index into OUTCOMES), its tokens (bos included), its bytes of UTF-8, its U+FFFD,
# and the xxh3_128 of its text.
DOCUMENT = np.dtype([("outcome", "u1"), ("tokens", "<i8"), ("text_bytes", "<i8"), ("replaced", "<i8"), ("hash", "V16")])
_PARALLELISM = "TOKENIZERS_PARALLELISM"  # the tokenizer's own threads, which would only get in each other's way


@dataclass(frozen=True)
class Vocabulary:
    """What encodes: a tokenizer as JSON, the id that documents begin with, and the type that ids are stored in."""

    tokenizer: str
    bos_id: int
    dtype: str


@dataclass(frozen=True)
class Treatment:
    """What is done to the records of one source."""

    extraction: Extraction
    filters: Filters
    validation_fraction: float


class Encoded(NamedTuple):
    """A batch's documents in their order.

    Attributes:
        documents: [n] of DOCUMENT.
        tokens: The ids of those that are not left out, document after document; dtype of the vocabulary.
    """

    documents: np.ndarray
    tokens: np.ndarray


class BatchEncoder:
    """Encodes batches in this process."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._backend = only_text(Tokenizer.from_str(vocabulary.tokenizer))
        self._bos = vocabulary.bos_id
        self._dtype = np.dtype(vocabulary.dtype).newbyteorder("<")

    def __call__(self, treatment: Treatment, batch: Batch) -> Encoded:
        """Raises UserError for a record that is not what the treatment expects."""
        rows, texts = [], []
        for document in batch.documents(treatment.extraction):
            outcome = treatment.filters.reason(document)
            if outcome is not None:
                rows.append((OUTCOMES.index(outcome), 0, 0, 0, bytes(16)))
                continue
            data = document.text.encode()
            held_out = is_held_out(xxhash.xxh3_64_intdigest(data), treatment.validation_fraction)
            rows.append((int(held_out), 0, len(data), document.replaced, xxhash.xxh3_128_digest(data)))
            texts.append(document.text)
        parts = self._encode(texts)
        documents = np.array(rows, dtype=DOCUMENT)
        documents["tokens"][is_kept(documents)] = [len(part) for part in parts]
        return Encoded(documents, np.concatenate([np.empty(0, self._dtype), *parts]))

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        short = [text for text in texts if len(text) <= long_texts.PIECE]
        encodings = iter(self._backend.encode_batch_fast(short, False, False))
        parts = []
        for text in texts:
            if len(text) <= long_texts.PIECE:
                ids = [np.array(next(encodings).ids, dtype=self._dtype)]
            else:
                ids = [part.astype(self._dtype) for part in long_texts.encode(self._backend, text)]
            parts.append(np.concatenate([np.array([self._bos], dtype=self._dtype), *ids]))
        return parts


def is_kept(documents: np.ndarray) -> np.ndarray:
    """[n] bool: which of DOCUMENT go into a split."""
    return documents["outcome"] < OUTCOMES.index("validation") + 1


class WorkerDied(UserError):
    """A worker process ended by itself, or was killed."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process died, most likely for want of memory: give fewer --processes, or look for documents that "
            "are far too long."
        )


class Workers(Generic[Label]):
    """Encodes batches in `processes` processes (1: in this one), in order, with a bounded number of them under way.

    `most_under_way` is the most batches that are read before the first of them is given back. The processes end with
    this one, also where it is killed.
    """

    def __init__(self, processes: int, vocabulary: Vocabulary) -> None:
        assert processes >= 1
        self._vocabulary = vocabulary
        self._processes = processes
        self.most_under_way = 1 if processes == 1 else 2 * processes + 1
        self._parallelism = os.environ.get(_PARALLELISM)
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Workers[Label]":
        os.environ[_PARALLELISM] = "false"
        if self._processes == 1:
            self._encoder = BatchEncoder(self._vocabulary)
        else:
            self._workers = [_Worker(self._vocabulary) for _ in range(self._processes)]
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.end()
        if self._parallelism is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = self._parallelism

    def encode(self, batches: Iterable[tuple[Label, Treatment, Batch]]) -> Generator[tuple[Label, Encoded], None, None]:
        """Raises what reading or encoding a batch raises, after the batches before it; UserError for a dead worker.

        What is under way when it is closed is dropped.
        """
        if not self._workers:
            for label, treatment, batch in batches:
                yield label, self._encoder(treatment, batch)
            return
        reader = iter(batches)
        under_way: deque[tuple[Label, _Job]] = deque()
        ended: Exception | None = None
        while ended is None or under_way:
            if ended is None and len(under_way) < self.most_under_way:
                try:
                    label, treatment, batch = next(reader)
                except Exception as error:  # StopIteration, too; what was read before comes first
                    ended = error
                else:
                    least_busy = min(self._workers, key=lambda worker: len(worker.jobs))
                    under_way.append((label, least_busy.begin(treatment, batch)))
            else:
                label, job = under_way[0]
                while job.result is None:
                    answered = wait([worker.pipe for worker in self._workers if worker.jobs])
                    for worker in self._workers:
                        if worker.pipe in answered:
                            worker.receive()
                under_way.popleft()
                if isinstance(job.result, Exception):
                    raise job.result
                yield label, job.result
        if not isinstance(ended, StopIteration):
            raise ended


@dataclass
class _Job:
    result: Encoded | Exception | None = None


class _Worker:
    """A process, and the jobs that it has not answered yet. A pipe of its own tells when it has died."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        context = get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.jobs: deque[_Job] = deque()
        self._process = context.Process(target=_work, args=(other_end, vocabulary), daemon=True)
        self._process.start()
        other_end.close()

    def begin(self, treatment: Treatment, batch: Batch) -> _Job:
        try:
            self.pipe.send((treatment, batch))
        except OSError:
            raise WorkerDied from None
        self.jobs.append(_Job())
        return self.jobs[-1]

    def receive(self) -> None:
        """Wait for the answer to the first job."""
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            raise WorkerDied from None
        self.jobs.popleft().result = result

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _work(pipe: Connection, vocabulary: Vocabulary) -> None:
    """A worker process: answers each job with its Encoded, or with the exception it raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends its workers
    jobs: SimpleQueue[tuple[Treatment, Batch]] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, jobs), daemon=True).start()
    encoder = BatchEncoder(vocabulary)
    while True:
        try:
            result: Encoded | Exception = encoder(*jobs.get())
        except Exception as error:
            result = error
        pipe.send(result)


def _receive(pipe: Connection, jobs: "SimpleQueue[tuple[Treatment, Batch]]") -> None:
    """Take jobs from the pipe as they come, so that the parent need not wait until the one before is done."""
    try:
        while True:
            jobs.put(pipe.recv())
    except (EOFError, OSError):  # the parent has ended, or was killed
        os._exit(1)

"""Measures how fast launch/prepare_data.py makes tokens of text, against what the tokenizer alone does.

    python benchmarks/ingest.py --megabytes 100 --processes 1 2

The text is the Python standard library's source files, repeated as JSON lines. The tokenizer alone is `encode_batch`
over the same documents in batches of the same size, on one core, from text in memory. A run's time is all of it, from
the first look at the input to the data set in its place. `--repeat` takes turns several times and keeps the fastest.

The last column compares tokens per second of CPU time, of all processes together: what the rate would be relative to
`encode_batch` on all cores if these processes had the machine for themselves. Where others use it, only that counts.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Every worker process imports this file anew: what it does not need is imported where it is used.


@dataclass
class Corpus:
    """A JSON lines file of `tokens` tokens, bos not counted."""

    path: Path
    texts: list[str]
    repetitions: int
    size: int


@dataclass
class Rate:
    """Tokens per second, and per second of CPU time."""

    wall: float = 0.0
    cpu: float = 0.0

    def best(self, other: "Rate") -> "Rate":
        return Rate(max(self.wall, other.wall), max(self.cpu, other.cpu))


class Clock:
    """Times what is done since it was made: by the wall, and on CPUs by this process and those it has waited for."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._used()

    def rate(self, tokens: int) -> Rate:
        return Rate(tokens / (time.perf_counter() - self._wall), tokens / (self._used() - self._cpu))

    @staticmethod
    def _used() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def standard_texts() -> list[str]:
    from mmrec_train.preparation.ingest import BATCH_BYTES
    from mmrec_train.preparation.records import Extraction, Template
    from mmrec_train.preparation.sources import standard_library

    source = standard_library()
    source.take_stock(None)
    extraction = Extraction(Template.of_field("text"))
    documents = (doc for piece in source.read(None, BATCH_BYTES) for doc in piece.batch.documents(extraction))
    return [document.text for document in documents if document.text]


def write_corpus(folder: Path, texts: Sequence[str], megabytes: float) -> Corpus:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    repetitions = max(1, round(megabytes * 1e6 / len(lines)))
    path = folder / "corpus.jsonl"
    with path.open("wb") as file:
        for _ in range(repetitions):
            file.write(lines)
    return Corpus(path, list(texts), repetitions, repetitions * len(lines))


def rate_alone(tokenizer: Path, texts: Sequence[str]) -> tuple[Rate, int]:
    """The rate of `encode_batch` on one core, and the number of tokens."""
    from mmrec_train.data.tokenizer import pretrained_tokenizer
    from mmrec_train.preparation.ingest import BATCH_BYTES

    backend = pretrained_tokenizer(str(tokenizer)).backend_tokenizer
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        batches[-1].append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    clock = Clock()
    tokens = sum(len(found) for batch in batches for found in backend.encode_batch(batch, add_special_tokens=False))
    rate = clock.rate(tokens)
    del os.environ["TOKENIZERS_PARALLELISM"]
    return rate, tokens


def rate_of_ingest(corpus: Corpus, tokenizer: Path, out: Path, processes: int, tokens: int) -> Rate:
    from mmrec_train.preparation.ingest import Settings, prepare
    from mmrec_train.preparation.recipe import recipe_of_one

    recipe = recipe_of_one(str(corpus.path), {"validation_fraction": 0.0})
    clock = Clock()
    manifest = prepare(recipe, out, tokenizer=str(tokenizer), settings=Settings(processes))
    rate = clock.rate(tokens)
    splits = manifest.sources["main"].splits.values()
    assert sum(split.tokens - split.documents for split in splits) == tokens, "tokens were lost"
    return rate


def main(arguments: Sequence[str] | None = None) -> None:
    import tokenizers

    from mmrec_train.data.tokenizer import train_tokenizer
    from mmrec_train.preparation.ingest import usable_cores

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--processes", type=int, nargs="+", default=sorted({1, usable_cores()}))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name), standard_texts(), options.megabytes)
        tokenizer = Path(name, "tokenizer")
        train_tokenizer(corpus.texts, options.vocab_size).save_pretrained(tokenizer)
        alone, tokens = rate_alone(tokenizer, corpus.texts)
        tokens *= corpus.repetitions
        rates = {processes: Rate() for processes in options.processes}
        for repetition in range(options.repeat):
            for processes in options.processes:
                out = Path(name, f"out_{processes}_{repetition}")
                print(f"{processes} processes, run {repetition + 1} of {options.repeat}", file=sys.stderr)
                rates[processes] = rates[processes].best(rate_of_ingest(corpus, tokenizer, out, processes, tokens))
                alone = alone.best(rate_alone(tokenizer, corpus.texts)[0])
    print(
        f"{usable_cores()} cores, Python {platform.python_version()}, tokenizers {tokenizers.__version__}; "
        f"{corpus.size / 1e6:.0f} MB of JSON lines, {tokens / 1e6:.1f} M tokens, vocabulary {options.vocab_size:,}\n"
        f"encode_batch alone, one core: {alone.wall / 1e6:.3f} M tokens/s\n\n"
        "| processes | M tokens/s | MB/s | of encode_batch × processes | of encode_batch by CPU time |\n"
        "|---|---|---|---|---|"
    )
    for processes, rate in rates.items():
        cells = [processes, f"{rate.wall / 1e6:.3f}", f"{corpus.size * rate.wall / tokens / 1e6:.1f}"]
        shares = rate.wall / (alone.wall * processes), rate.cpu / alone.cpu
        print("| " + " | ".join(map(str, [*cells, *(f"{100 * share:.0f} %" for share in shares)])) + " |")


if __name__ == "__main__":
    main()

"""Turn text into a data set that launch/pretrain.py can train on."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from mmrec_train.data.ingest import Progress, prepare
from mmrec_train.data.manifest import Manifest
from mmrec_train.data.sources import open_source
from mmrec_train.errors import EXIT_FAILURE, EXIT_OK, EXIT_USER_ERROR, UserError

_EXAMPLES = """examples:
  python launch/prepare_data.py --source stdlib --train-tokenizer 4096 --out data/stdlib
  python launch/prepare_data.py --source ~/texts --train-tokenizer 32000 --out data/mine
  python launch/prepare_data.py --source corpus.jsonl.zst --text-field body --tokenizer gpt2 --out data/corpus
  python launch/prepare_data.py --source HuggingFaceFW/fineweb-edu --name sample-10BT --tokenizer gpt2 \\
      --max-tokens 1000000000 --out data/fineweb
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with command-line `arguments` (default: the process's own); returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        source = open_source(
            options.source,
            text_field=options.text_field,
            pattern=options.pattern,
            name=options.name,
            split=options.split,
        )
        with _progress_bar(source.text_bytes, options.max_tokens) as on_progress:
            manifest = prepare(
                source,
                Path(options.out),
                tokenizer=options.tokenizer if options.train_tokenizer is None else options.train_tokenizer,
                validation_fraction=options.validation_fraction,
                max_tokens=options.max_tokens,
                on_progress=on_progress,
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return EXIT_FAILURE
    _print_summary(manifest, options.out)
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        required=True,
        help="stdlib (the Python standard library's source files); a file or folder of text, jsonl or "
        "parquet (text and jsonl also as .gz, .zst, .bz2); or the name of a data set on the Hugging Face hub",
    )
    parser.add_argument("--out", required=True, help="folder to create; must not exist, or be empty")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="PATH_OR_NAME", help="a tokenizer's folder or name on the hub")
    tokenizer.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB_SIZE",
        help="train a byte-level BPE on the beginning of the source",
    )
    parser.add_argument("--text-field", default="text", help="jsonl field or table column (default: text)")
    parser.add_argument(
        "--pattern", metavar="GLOB", help="files of a folder to read, such as '*.py'; as text by default"
    )
    parser.add_argument("--name", help="configuration of a hub data set")
    parser.add_argument("--split", help="split of a hub data set (default: train)")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.02,
        help="documents held out, chosen by a hash of their text (default: 0.02)",
    )
    parser.add_argument("--max-tokens", type=int, help="stop with the document that reaches this many tokens")
    return parser


@contextmanager
def _progress_bar(text_bytes: int | None, max_tokens: int | None) -> Iterator[Callable[[Progress], None]]:
    """Shows each stage as a bar on a terminal, with the time left where the amount is known."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    with ProgressBar(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks = {}

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, amount="")
            amount = f"{progress.documents:,} documents, {progress.text_bytes / 1e6:,.1f} MB"
            done, total = progress.text_bytes, text_bytes
            if progress.tokens:
                amount += f", {progress.tokens:,} tokens"
                if max_tokens is not None:
                    done, total = progress.tokens, max_tokens
            bar.update(tasks[progress.stage], completed=done, total=total, amount=amount)

        yield show


def _print_summary(manifest: Manifest, out: str) -> None:
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards)} shards")
    print(f"tokenizer: {manifest.vocab_size:,} tokens, fingerprint {manifest.tokenizer_fingerprint}")
    if manifest.invalid_utf8_documents:
        print(
            f"invalid UTF-8: {manifest.invalid_utf8_replaced:,} replacements by U+FFFD "
            f"in {manifest.invalid_utf8_documents:,} documents"
        )
    if manifest.empty_documents:
        print(f"left out: {manifest.empty_documents:,} documents without text")
    if manifest.source.get("files_skipped"):
        print(f"not read: {manifest.source['files_skipped']:,} files of other kinds (see --pattern)")
    print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main())

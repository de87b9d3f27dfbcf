"""Turn text into a data set that launch/pretrain.py can train on."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from mmrec_train.errors import EXIT_FAILURE, EXIT_OK, EXIT_USER_ERROR, UserError

# Every worker process imports this file anew: what it does not need is imported where it is used.
if TYPE_CHECKING:
    from mmrec_train.data.manifest import Manifest
    from mmrec_train.preparation.ingest import Progress
    from mmrec_train.preparation.recipe import Recipe

_EXAMPLES = """examples:
  python launch/prepare_data.py --source stdlib --train-tokenizer 4096 --out data/stdlib
  python launch/prepare_data.py --source ~/texts --train-tokenizer 32000 --out data/mine
  python launch/prepare_data.py --source corpus.jsonl.zst --template '{title}: {body}' --tokenizer gpt2 --out data/a
  python launch/prepare_data.py --source HuggingFaceFW/fineweb-edu --name sample-10BT --tokenizer gpt2 \\
      --max-tokens 1000000000 --out data/fineweb
  python launch/prepare_data.py --recipe launch/data/mixture.yaml --train-tokenizer 32000 --out data/mixture

Stopped in any way, the same command goes on from where it was. docs/data_preparation.md has the details.
"""
_OPTIONS = (  # those that a recipe has as keys
    *("text_field", "template", "pattern", "name", "split", "max_tokens"),
    *("min_characters", "max_characters", "language", "deduplicate", "validation_fraction"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with command-line `arguments` (default: the process's own); returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    from mmrec_train.preparation.ingest import Settings, prepare, usable_cores

    try:
        recipe = _recipe(parser, options)
        with _progress_bar() as on_progress:
            manifest = prepare(
                recipe,
                Path(options.out),
                tokenizer=options.tokenizer if options.train_tokenizer is None else options.train_tokenizer,
                settings=Settings(options.processes or usable_cores()),
                on_progress=on_progress,
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return EXIT_FAILURE
    _print_summary(manifest, options.out)
    return EXIT_OK


def _recipe(parser: argparse.ArgumentParser, options: argparse.Namespace) -> "Recipe":
    """That of --recipe, or of the options that describe one source."""
    from mmrec_train.preparation.recipe import load_recipe, recipe_of_one

    given = {key: value for key in _OPTIONS if (value := getattr(options, key)) is not None}
    if options.recipe is None:
        return recipe_of_one(options.source, given)
    if given:
        names = ", ".join(f"--{key.replace('_', '-')}" for key in given)
        parser.error(f"{names}: write that into the recipe, {options.recipe}")
    return load_recipe(Path(options.recipe))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", metavar="FILE.yaml", help="several sources, with weights")
    what.add_argument(
        "--source",
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
    one = parser.add_argument_group("of one source (in a recipe: of each)")
    text = one.add_mutually_exclusive_group()
    text.add_argument("--text-field", help="jsonl field or table column (default: text)")
    text.add_argument("--template", help="text with fields in braces, such as '{title} {meta.author}'")
    one.add_argument("--pattern", metavar="GLOB", help="files of a folder to read, such as '*.py'; as text by default")
    one.add_argument("--name", help="configuration of a hub data set")
    one.add_argument("--split", help="split of a hub data set (default: train)")
    one.add_argument("--max-tokens", type=int, help="stop with the document that reaches this many tokens")
    one.add_argument("--min-characters", type=int, help="leave out shorter documents")
    one.add_argument("--max-characters", type=int, help="leave out longer documents")
    one.add_argument("--language", metavar="FIELD=A,B", help="leave out documents whose field is none of these")
    both = parser.add_argument_group("of all sources (in a recipe: its own keys)")
    both.add_argument(
        "--deduplicate", action="store_true", default=None, help="leave out documents whose text has occurred"
    )
    both.add_argument(
        "--validation-fraction",
        type=float,
        help="documents held out, chosen by a hash of their text (default: 0.02)",
    )
    parser.add_argument("--processes", type=_positive, metavar="N", help="that tokenize (default: the cores there are)")
    return parser


_SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


@contextmanager
def _progress_bar() -> Iterator[Callable[["Progress"], None]]:
    """Shows each stage with the rate, and the time left where the amount is known: as a bar on a terminal, else as a
    line now and then."""
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
        begun: dict[str, tuple[float, int, float]] = {}  # when a stage's first report came; tokens and part done then
        written = time.monotonic()

        def show(progress: "Progress") -> None:
            nonlocal written
            now = time.monotonic()
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, amount="")
                begun[progress.stage] = now, progress.tokens, progress.done or 0.0
            since, tokens, done = begun[progress.stage]
            amount = f"{progress.documents:,} documents, {progress.text_bytes / 1e6:,.1f} MB"
            if progress.tokens:
                rate = (progress.tokens - tokens) / (now - since) if now > since else 0
                amount += f", {progress.tokens:,} tokens, {rate:,.0f} tokens/s"
            total = None if progress.done is None else 1.0
            bar.update(tasks[progress.stage], completed=progress.done or 0.0, total=total, amount=amount)
            if not console.is_terminal and now - written >= _SECONDS_BETWEEN_LINES:
                written = now
                if progress.done is not None and progress.done > done:
                    left = (now - since) * (1 - progress.done) / (progress.done - done)
                    amount += f", {progress.done:.0%}, {timedelta(seconds=round(left))} left"
                print(f"{progress.stage}: {amount}", file=sys.stderr, flush=True)

        yield show


def _print_summary(manifest: "Manifest", out: str) -> None:
    for name, source in manifest.sources.items():
        label = "" if len(manifest.sources) == 1 else f"{name}, "
        for split, info in source.splits.items():
            print(f"{label}{split}: {info.documents:,} documents, {info.tokens:,} tokens, {len(info.shards)} shards")
        if source.invalid_utf8_documents:
            print(
                f"{label}invalid UTF-8: {source.invalid_utf8_replaced:,} replacements by U+FFFD "
                f"in {source.invalid_utf8_documents:,} documents"
            )
        if source.left_out:
            reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in source.left_out.items())
            print(f"{label}left out: {reasons}")
        if skipped := source.provenance.get("files_skipped"):
            print(f"{label}not read: {skipped:,} files of other kinds (see --pattern)")
    print(f"tokenizer: {manifest.vocab_size:,} tokens, fingerprint {manifest.tokenizer_fingerprint}")
    print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main())

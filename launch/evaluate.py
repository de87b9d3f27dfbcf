"""Evaluate a checkpoint on a prepared data set: loss and perplexity, as a whole and by position in the document."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmrec_train.data import open_dataset
from mmrec_train.data.tokenizer import fingerprint
from mmrec_train.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from mmrec_train.evaluation import Evaluation, combine, evaluate, perplexity
from mmrec_train.pretrained import default_device, load_pretrained


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with command-line `arguments` (default: the process's own); returns the exit code."""
    options = _parse_arguments(arguments)
    try:
        evaluations = _evaluate(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if options.json:
        print(json.dumps(_as_json(options, evaluations), allow_nan=False))
    else:
        console = Console(highlight=False)
        console.print(f"{options.checkpoint} on {options.data} ({options.split})", soft_wrap=True, markup=False)
        for name, evaluation in evaluations.items():
            console.print(_table(evaluation, name if len(evaluations) > 1 else None))
        if len(evaluations) > 1:
            console.print(_table(combine(evaluations.values()), "all sources"))
    return EXIT_OK


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="RUN_OR_DIR",
        help="a run folder (its newest complete checkpoint), a checkpoint, or a Hugging Face folder made by export.py",
    )
    parser.add_argument("--data", required=True, help="folder made by prepare_data.py, or the URL of one")
    parser.add_argument("--split", choices=["validation", "train"], default="validation")
    parser.add_argument("--tokens", type=int, help="of each source evaluate the first so many only (default: all)")
    parser.add_argument("--chunk-len", type=int, default=1024, help="tokens processed at a time (default: 1024)")
    parser.add_argument("--batch", type=int, default=8, help="lanes processed side by side (default: 8)")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    return parser.parse_args(arguments)


def _evaluate(options: argparse.Namespace) -> dict[str, Evaluation]:
    for flag, value in (("--tokens", options.tokens), ("--chunk-len", options.chunk_len), ("--batch", options.batch)):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; it must be at least 1")
    dataset = open_dataset(options.data, options.split, verify=True)
    model, _, folder = load_pretrained(
        options.checkpoint, device=default_device(), report=lambda line: print(line, file=sys.stderr)
    )
    own = fingerprint(folder)
    if own != dataset.manifest.tokenizer_fingerprint:
        raise UserError(
            f"{options.data} was made with another tokenizer than {folder}: fingerprint "
            f"{dataset.manifest.tokenizer_fingerprint}, the model's is {own}. Prepare the text again with "
            f"--tokenizer {folder}"
        )
    try:
        counts = [source.num_tokens for source in dataset.sources.values()]
        with _progress_bar(sum(min(options.tokens or count, count) for count in counts)) as on_progress:
            return evaluate(
                model,
                dataset,
                chunk_len=options.chunk_len,
                batch=options.batch,
                tokens=options.tokens,
                on_progress=on_progress,
            )
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is too small for this; lower --batch or --chunk-len") from error


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=total)
        yield lambda tokens: bar.update(task, completed=tokens)


def _table(evaluation: Evaluation, title: str | None) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("position", "tokens", "loss", "perplexity"):
        table.add_column(column, justify="right")
    for bucket in evaluation.by_position:
        start = _thousands(bucket.start)
        position = f"{start}+" if bucket.stop is None else f"{start}–{_thousands(bucket.stop)}"
        _add_row(table, position, bucket.tokens, bucket.loss)
    table.add_section()
    _add_row(table, "all", evaluation.tokens, evaluation.loss)
    return table


def _thousands(tokens: int) -> str:
    """Of 1024 tokens each: the edges of the buckets are whole ones."""
    return f"{tokens >> 10}K" if tokens else "0"


def _add_row(table: Table, position: str, tokens: int, loss: float) -> None:
    table.add_row(position, f"{tokens:,}", f"{loss:.4f}", f"{perplexity(loss):.2f}")


def _as_json(options: argparse.Namespace, evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    everything = combine(evaluations.values())
    return {
        "checkpoint": str(options.checkpoint),
        "data": str(options.data),
        "split": options.split,
        **_result(everything),
        "sources": {name: _result(evaluation) for name, evaluation in evaluations.items()},
    }


def _result(evaluation: Evaluation) -> dict[str, Any]:
    buckets = [{"start": b.start, "stop": b.stop, **_numbers(b.tokens, b.loss)} for b in evaluation.by_position]
    return {**_numbers(evaluation.tokens, evaluation.loss), "by_position": buckets}


def _numbers(tokens: int, loss: float) -> dict[str, int | float | None]:
    """JSON has no NaN: a loss that is not finite is null."""
    finite = math.isfinite(loss)
    return {
        "tokens": tokens,
        "loss": loss if finite else None,
        "perplexity": perplexity(loss) if finite else None,
    }


if __name__ == "__main__":
    sys.exit(main())

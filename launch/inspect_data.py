"""Look into a prepared data set: what it holds, whether it is whole, how long documents are; or what one lane reads."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmrec_train.config import RunConfig, load_config
from mmrec_train.config.stream import cache_settings, stream_settings, training_data
from mmrec_train.data import load_tokenizer, open_dataset
from mmrec_train.data.dataset import SourceDocuments, TokenDataset
from mmrec_train.data.inspection import Piece, lane_pieces, length_plot, save_length_plot, short_tokens
from mmrec_train.data.lanes import StreamSettings
from mmrec_train.data.manifest import Manifest, SourceInfo, Split
from mmrec_train.data.order import Order
from mmrec_train.data.statistics import Lengths, combined, count_lengths
from mmrec_train.data.storage import DataFolder, data_folder
from mmrec_train.data.views import select_sources
from mmrec_train.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from mmrec_train.evaluation import POSITION_EDGES


class Part(NamedTuple):
    """One source's documents of one split."""

    split: Split
    source: SourceDocuments

    @property
    def name(self) -> str:
        return f"{self.split}/{self.source.name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with command-line `arguments` (default: the process's own); returns the exit code, 2 for damaged data."""
    options = _parse_arguments(arguments)
    console = Console(highlight=False)
    try:
        _check_options(options)
        config = _run_config(options)
        if options.lane is not None:
            _show_lane(options, config, console)
        else:
            _show_data(options, config, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_OK


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", metavar="DIR_OR_URL", help="the data set (default: that of --config)")
    parser.add_argument("--split", choices=get_args(Split), help="only this split (default: all; for --lane: train)")
    parser.add_argument("--source", metavar="NAME", help="only this source")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not read and check all files")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw document lengths into this .svg or .png file")
    parser.add_argument("--config", metavar="RUN.yaml", help="a run's configuration: its data set, and its lanes")
    lane = parser.add_argument_group("what a lane reads, instead of all that")
    lane.add_argument("--lane", type=int, help="which one, from 0")
    lane.add_argument("--step", type=int, default=0, help="after so many optimizer steps (default: 0)")
    lane.add_argument("--lanes", type=int, help="how many there are: the run's train.global_batch_size")
    lane.add_argument("--chunk-len", type=int, help="tokens of a lane in a step: the run's data.chunk_len")
    lane.add_argument("--seed", type=int, help="the run's data.seed (default: 0)")
    lane.add_argument("--order", choices=get_args(Order), help="the run's data.order (default: shuffled)")
    return parser.parse_args(arguments)


def _run_config(options: argparse.Namespace) -> RunConfig | None:
    """That of --config, with the data set of the command line where it has one."""
    if options.config is None:
        return None
    return load_config(options.config, [] if options.data is None else [f"data.path={options.data}"])


def _check_options(options: argparse.Namespace) -> None:
    if options.data is None and options.config is None:
        raise UserError("give the data set's folder or URL, or a run's --config")
    if options.lane is None:
        return
    lanes = {"--lanes": options.lanes, "--chunk-len": options.chunk_len}
    stream = {"--split": options.split, "--source": options.source, "--seed": options.seed, "--order": options.order}
    given = [flag for flag, value in (lanes | stream).items() if value is not None]
    if options.config is not None and given:
        raise UserError(f"{given[0]} is not for a lane of --config, which says it; change it there")
    if options.config is None and None in lanes.values():
        raise UserError("--lane needs --lanes and --chunk-len, or a run's --config")
    for flag, value in lanes.items():
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; it must be at least 1")
    if options.step < 0:
        raise UserError(f"--step is {options.step}; it must be at least 0")


# The whole data set


def _show_data(options: argparse.Namespace, config: RunConfig | None, console: Console) -> None:
    folder = data_folder(options.data) if config is None else data_folder(config.data.path, cache_settings(config))
    manifest = folder.manifest()
    parts = _parts(folder, manifest, options)
    console.print(
        f"{folder.name}: format {manifest.format}, {manifest.dtype}, vocabulary {manifest.vocab_size:,}, "
        f"tokenizer {manifest.tokenizer_fingerprint}",
        soft_wrap=True,
        markup=False,
    )
    console.print(_counts_table(parts))
    for name in dict.fromkeys(part.source.name for part in parts):
        for line in _losses(name, manifest.sources[name]):
            console.print(line, markup=False, soft_wrap=True)
    if options.verify:
        load_tokenizer(folder.name, None if config is None else cache_settings(config))
        _verify(parts)
        console.print("all files are whole", markup=False)
    lengths = _count_lengths(parts)
    console.print(_lengths_table(lengths))
    console.print(_positions_table(lengths))
    print(length_plot(combined(list(lengths.values()))))
    if options.plot is not None:
        save_length_plot({part.name: counted for part, counted in lengths.items()}, options.plot)


def _parts(folder: DataFolder, manifest: Manifest, options: argparse.Namespace) -> list[Part]:
    if options.source not in (None, *manifest.sources):
        raise UserError(f"--source {options.source}: {folder.name} has {', '.join(manifest.sources)}")
    parts = [
        Part(split, source)
        for split in get_args(Split)
        for source in TokenDataset(folder, split, manifest).sources.values()
        if options.split in (None, split) and options.source in (None, source.name)
    ]
    if not parts:
        raise UserError(f"{folder.name} has no documents of that split and source")
    return parts


def _counts_table(parts: Sequence[Part]) -> Table:
    table = _table("documents", "tokens", "share", "weight", "shards", "GB")
    tokens: Counter[Split] = Counter()
    for part in parts:
        tokens[part.split] += part.source.num_tokens
    for part in parts:
        source = part.source
        table.add_row(
            part.name,
            f"{source.num_documents:,}",
            f"{source.num_tokens:,}",
            f"{source.num_tokens / tokens[part.split]:.1%}",
            "" if source.weight is None else f"{source.weight:g}",
            f"{len(source.shards):,}",
            f"{sum(shard.bin.size + shard.idx.size for shard in source.shards) / 1e9:.3f}",
        )
    return table


def _losses(name: str, source: SourceInfo) -> Iterator[str]:
    """What the source's text lost on its way into the data set."""
    for reason, documents in source.left_out.items():
        if documents:
            yield f"left out of {name}: {documents:,} documents ({reason})"
    if source.invalid_utf8_documents:
        yield (
            f"repaired in {name}: {source.invalid_utf8_replaced:,} places that were not UTF-8, in "
            f"{source.invalid_utf8_documents:,} documents"
        )


def _verify(parts: Sequence[Part]) -> None:
    """UserError that names every damaged file."""
    damage: list[str] = []
    sizes = [shard.bin.size + shard.idx.size for part in parts for shard in part.source.shards]
    with _progress_bar("verifying bytes", sum(sizes)) as on_progress:
        for part in parts:
            for number, shard in enumerate(part.source.shards):
                found = [*part.source.damage(number, contents=True)]
                damage += map(str, found or part.source.without_bos(number))
                on_progress(shard.bin.size + shard.idx.size)
    if damage:
        raise UserError("\n".join([f"the data set is damaged in {len(damage)} places:", *damage]))


def _count_lengths(parts: Sequence[Part]) -> dict[Part, Lengths]:
    with _progress_bar("counting documents", sum(part.source.num_documents for part in parts)) as on_progress:
        return {part: count_lengths(part.source, on_progress) for part in parts}


def _lengths_table(lengths: dict[Part, Lengths]) -> Table:
    table = _table("shortest", "median", "mean", "90 %", "99 %", "longest")
    for part, counted in lengths.items():
        low, median, p90, p99, high = (f"{counted.quantile(share):,}" for share in (0.0, 0.5, 0.9, 0.99, 1.0))
        table.add_row(part.name, low, median, f"{counted.mean:,.0f}", p90, p99, high)
    return table


def _positions_table(lengths: dict[Part, Lengths]) -> Table:
    table = _table("position", "documents", "tokens", "share")
    for part, counted in lengths.items():
        for start, stop, documents, tokens in counted.by_position(POSITION_EDGES):
            position = f"{short_tokens(start)}+" if stop is None else f"{short_tokens(start)}–{short_tokens(stop)}"
            share = f"{tokens / counted.tokens:.1%}"
            table.add_row(part.name, position, f"{documents:,}", f"{tokens:,}", share)
        table.add_section()
    return table


def _table(*columns: str) -> Table:
    table = Table("source")
    for column in columns:
        table.add_column(column, justify="right")
    return table


@contextmanager
def _progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, advance=done)


# A lane


def _show_lane(options: argparse.Namespace, config: RunConfig | None, console: Console) -> None:
    if config is None:
        dataset = open_dataset(options.data, options.split or "train", verify=False)
        if options.source is not None:
            if options.source not in dataset.sources:
                raise UserError(f"--source {options.source}: {options.data} has {', '.join(dataset.sources)}")
            dataset = select_sources(dataset, [options.source])
        settings = StreamSettings(seed=options.seed or 0, order=options.order or "shuffled")
        lanes, chunk_len = options.lanes, options.chunk_len
        tokenizer = load_tokenizer(options.data)
    else:
        dataset = training_data(config, verify=False)
        settings = stream_settings(config)
        lanes, chunk_len = config.train.global_batch_size, config.data.chunk_len
        tokenizer = load_tokenizer(config.data.path, cache_settings(config))
    if not 0 <= options.lane < lanes:
        raise UserError(f"--lane {options.lane}: there are lanes 0 to {lanes - 1}")
    pieces = lane_pieces(dataset, settings, num_lanes=lanes, chunk_len=chunk_len, lane=options.lane, step=options.step)
    window = settings.window_chunks * chunk_len
    console.print(
        f"lane {options.lane} of {lanes} after {options.step} steps: its tokens {options.step * window:,} to "
        f"{(options.step + 1) * window:,}, in {len(pieces)} pieces",
        markup=False,
    )
    for piece in pieces:
        console.print(_heading(piece), style="bold", markup=False, soft_wrap=True)
        console.print(tokenizer.decode(piece.tokens), markup=False, soft_wrap=True)


def _heading(piece: Piece) -> str:
    begin = "▶ begins" if piece.start == 0 else "▶ a new sequence" if piece.reset else "goes on"
    end = ", ends" if piece.stop == piece.length else ""
    return (
        f"── {piece.source}, document {piece.document:,}: tokens {piece.start:,} to {piece.stop:,} of "
        f"{piece.length:,} ({begin}{end})"
    )


if __name__ == "__main__":
    sys.exit(main())

"""What one lane reads in one step, and plots of document lengths."""

import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from plotext import figure, terminal

from mmrec_train.data.dataset import TokenDataset
from mmrec_train.data.lanes import LaneLoader, StreamSettings
from mmrec_train.data.statistics import Lengths
from mmrec_train.errors import UserError


class Piece(NamedTuple):
    """Tokens [start, stop) of a document that has `length`, as a lane reads them on end.

    `reset`: the model forgets before the first of them. `tokens` [stop - start] int64.
    """

    source: str
    document: int
    start: int
    stop: int
    length: int
    reset: bool
    tokens: torch.Tensor


def lane_pieces(
    dataset: TokenDataset, settings: StreamSettings, *, num_lanes: int, chunk_len: int, lane: int, step: int
) -> list[Piece]:
    """What lane `lane` reads after `step` steps; padding at the end of a finite stream is left out.

    Raises UserError where the stream has ended before.
    """
    # As if each lane were a rank: only this one's tokens are read.
    loader = LaneLoader(
        dataset, settings, num_lanes=num_lanes, chunk_len=chunk_len, micro_batch_size=1, rank=lane, world_size=num_lanes
    )
    try:
        loader.skip(step)
        before = loader.state_dict()
        spans = loader.advance()[lane]
    except StopIteration:
        raise UserError(f"--step {step}: the stream ends after {loader.step} steps") from None
    loader.load_state_dict(before)
    [chunk] = loader.next_step()
    names = list(dataset.sources)
    pieces, place = [], 0  # place: in the window
    for span in spans:
        reset = chunk.reset[0, place : place + span.stop - span.start]
        # A sequence may end within the document.
        bounds = [0, *(reset[1:].nonzero().flatten() + 1).tolist(), len(reset)]
        for first, last in itertools.pairwise(bounds):
            tokens = chunk.input_ids[0, place + first : place + last]
            start, stop = span.start + first, span.start + last
            source = names[span.source]
            pieces.append(Piece(source, span.document, start, stop, span.length, bool(reset[first]), tokens))
        place += len(reset)
    return pieces


def length_plot(lengths: Lengths, *, width: int = 100, height: int = 18) -> str:
    """A histogram of document lengths on a logarithmic axis, drawn with characters; no colours or control codes."""
    bins = lengths.by_doubling()
    octaves = [bin_.start.bit_length() - 1 for bin_ in bins]
    terminal.limit(False, False)
    figure.clear()  # plotext draws on one figure of the process
    figure.theme("colorless").plot_size(width, height).label("tokens of a document")
    figure.title("documents by length")
    bars = figure.bar([octave + 0.5 for octave in octaves], [bin_.documents for bin_ in bins], width=1)
    figure.draw(bars)
    first, last = octaves[0], octaves[-1] + 1
    ticks = range(first, last + 1, 1 + (last - first) // 14)  # labels that do not fit would be left out
    figure.ruler("x").lim(first, last).ticks(list(ticks), [short_tokens(1 << octave) for octave in ticks])
    drawing: str = figure.build().string(colorless=True)
    return "\n".join(line.rstrip() for line in drawing.split("\n")).rstrip("\n")


def save_length_plot(lengths: dict[str, Lengths], path: Path) -> None:
    """Share of documents and of tokens by document length, a line for each name in `lengths`; SVG, PNG or PDF."""
    plot = Figure(figsize=(9, 4), layout="constrained")
    panels = plot.subplots(1, 2, sharex=True)
    for panel, what in zip(panels, ("documents", "tokens"), strict=True):
        for name, counted in lengths.items():
            bins = counted.by_doubling()
            total = getattr(counted, what)
            edges = [*(bin_.start for bin_ in bins), bins[-1].stop]
            panel.stairs([100 * getattr(bin_, what) / total for bin_ in bins], edges, label=name)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens of the document")
        panel.set_title(f"% of {what}")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].legend()
    try:
        plot.savefig(path)
    except (OSError, ValueError) as error:  # a suffix that matplotlib does not know is a ValueError
        raise UserError(f"--plot {path}: cannot write it: {error}. Name a file that ends in .svg or .png.") from error


def short_tokens(tokens: int) -> str:
    """Of 1024: 512, 8K, 2M; what is no whole number of them is written out."""
    for unit, suffix in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return str(tokens)

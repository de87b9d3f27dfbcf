"""How many tokens a second one loader process gives from local shards, on one core.

    python benchmarks/loader.py                 # two minutes; writes 400 MB below the temporary folder
    python benchmarks/loader.py --seconds 10 --lanes 512

Documents have exponentially distributed lengths. Every step reads all lanes (one rank, the hardest case) from shards in
the page cache into the tensors that the trainer gets: ids, labels and resets. "follow" moves the lanes on with
integers only: what a rank pays for the lanes of the others. The target is 20 million tokens a second.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mmrec_train.data.dataset import TokenDataset, open_dataset
from mmrec_train.data.lanes import LaneLoader, StreamSettings
from mmrec_train.data.manifest import Manifest, SourceInfo, write_manifest
from mmrec_train.data.order import Order
from mmrec_train.preparation.shards import SplitWriter

CHUNK_LEN = 8192
TOKENS = 50_000_000
ORDERS: tuple[Order, ...] = ("shuffled", "by_length")


def write(folder: Path, mean_length: int, sources: int) -> TokenDataset:
    """TOKENS random tokens in documents of `mean_length` on average."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 1 << 16, 1 << 21).astype(np.uint16)
    infos = {}
    for number in range(sources):
        writer = SplitWriter(folder / "train" / f"source_{number}", "uint16")
        missing = TOKENS // sources
        while missing > 0:
            length = min(1 + int(generator.exponential(mean_length)), len(tokens) // 2)
            start = int(generator.integers(0, len(tokens) // 2))
            writer.add(tokens[start : start + length])
            missing -= length
        infos[f"source_{number}"] = SourceInfo(
            weight=None,
            provenance={"kind": "random"},
            left_out={},
            invalid_utf8_documents=0,
            invalid_utf8_replaced=0,
            splits={"train": writer.close()},
        )
    manifest = Manifest(
        dtype="uint16",
        bos_id=0,
        eos_id=0,
        vocab_size=1 << 16,
        tokenizer_fingerprint="0" * 32,
        preparation={},
        sources=infos,
    )
    write_manifest(folder, manifest)
    return open_dataset(folder, "train", verify=True)  # reads every shard: they are in the page cache then


def rate(step: Callable[[], object], tokens_per_step: int, seconds: float) -> float:
    """Tokens a second of calls that give `tokens_per_step` each, after one that does not count."""
    step()
    steps, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        step()
        steps += 1
    return steps * tokens_per_step / passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=32, help="lanes of a step (default: 32)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default: 3)")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    table = Table(
        title=f"One core of {platform.processor() or platform.machine()}, numpy {np.__version__}, Python "
        f"{platform.python_version()}; {options.lanes} lanes of {CHUNK_LEN} tokens; million tokens a second",
        title_justify="left",
    )
    for column in ("mean document", "sources", "order", "read", "follow"):
        table.add_column(column, justify="right")
    for mean_length in (50, 100, 200, 1000, 5000):
        for sources in (1, 4):
            with tempfile.TemporaryDirectory() as folder:
                dataset = write(Path(folder), mean_length, sources)
                for order in ORDERS:
                    loader = LaneLoader(
                        dataset,
                        StreamSettings(order=order),
                        num_lanes=options.lanes,
                        chunk_len=CHUNK_LEN,
                        micro_batch_size=options.lanes,
                    )
                    tokens = options.lanes * CHUNK_LEN
                    rates = [rate(step, tokens, options.seconds) for step in (loader.next_step, loader.advance)]
                    table.add_row(str(mean_length), str(sources), order, *(f"{value / 1e6:.0f}" for value in rates))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

"""Trains a configuration for some steps under several DeepSpeed strategies and prints one row each for RESULTS.md.

    python benchmarks/training.py --config launch/configs/350m.yaml --strategies zero3 zero3_offload_cpu --gpus 1 \\
        --set data.path=data/… train.steps=200

Tokens/s and MFU are medians over the logged steps after the first fifth (warm-up, allocator growth); losses are those
of the first and the last logged step; memory is the largest GPU peak.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mmrec_train.monitoring import read_metrics

COLUMNS = "strategy, GPUs, steps, loss first → last, validation, tokens/s, MFU, peak GPU memory, iterations mean / max"
HEADER = f"| {COLUMNS.replace(', ', ' | ')} |"


def run(arguments: argparse.Namespace, strategy: str, folder: Path) -> str:
    run_dir = folder / strategy
    (folder / "nvme").mkdir(exist_ok=True)
    overrides = [f"run_dir={run_dir}", f"deepspeed.config=ds_configs/{strategy}.json", *arguments.overrides]
    if strategy.endswith("nvme"):
        overrides.append(f"deepspeed.nvme_path={folder / 'nvme'}")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(arguments.gpus)]
    program = ["launch/pretrain.py", "--config", arguments.config, "--set", *overrides]
    subprocess.run([*launcher, *program], check=True, timeout=arguments.timeout)
    return row(strategy, arguments.gpus, run_dir)


def row(strategy: str, gpus: int, run_dir: Path) -> str:
    records = read_metrics(run_dir)
    training = [r for r in records if "loss" in r]
    validation = [r["validation_loss"] for r in records if "validation_loss" in r]
    steady = training[len(training) // 5 :]
    rate = statistics.median(r["tokens_per_second"] for r in steady)
    utilisation = [r["mfu"] for r in steady if r["mfu"] is not None]
    iterations = [r["solver_iterations"] for r in training]
    cells = [
        strategy,
        gpus,
        training[-1]["step"],
        f"{training[0]['loss']:.3f} → {training[-1]['loss']:.3f}",
        " → ".join(f"{loss:.3f}" for loss in (validation[0], validation[-1])) if validation else "–",
        f"{rate:,.0f}",
        f"{100 * statistics.median(utilisation):.1f} %" if utilisation else "–",
        f"{max(r['peak_memory_bytes'] for r in training) / 2**30:.1f} GiB",
        f"{statistics.mean(iterations):.1f} / {max(iterations):.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="launch/configs/350m.yaml")
    parser.add_argument("--strategies", nargs="+", default=["zero3"])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--set", dest="overrides", nargs="+", default=[])
    parser.add_argument("--timeout", type=float, default=None, help="seconds for each run")
    parser.add_argument("--folder", type=Path, help="keeps the run folders here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for strategy in arguments.strategies:
            rows.append(run(arguments, strategy, folder))
            print(HEADER, "|" + " --- |" * (HEADER.count("|") - 1), *rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()

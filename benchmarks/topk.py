"""Times a model's forward pass over a full ring with `read: dense` and `read: topk`, side by side.

    python benchmarks/topk.py [--slots 1024 4096 16384] [--tokens 1 1024] [--topk-blocks 16] [--threads 2]

Both have the same weights and the same ring of random keys. A measurement is the fastest of 5 runs after one to warm
up, taken in turns.
"""

import argparse
import time
from typing import Any

import torch

from mmrec_kernels import build_pyramid
from mmrec_train.model import MemoryState, MMRecConfig, MMRecForCausalLM

SHAPE: dict[str, Any] = dict(
    vocab_size=512,
    hidden_dim=256,
    num_layers=1,
    num_heads=4,
    num_memories=2,
    segment_len=64,
    short_window=128,
    ffn_dim=512,
)
RUNS = 5


def full_state(config: MMRecConfig, device: str) -> MemoryState:
    """The state in the middle of a document that has filled the ring."""
    empty = MemoryState.empty(config, 1, torch.float32, device)
    keys, values = torch.randn(2, *empty.slots_k.shape, device=device)
    written = torch.full_like(empty.slots_written, config.memory_slots)
    state = empty._replace(slots_k=keys, slots_v=values, slots_written=written, position=written * config.segment_len)
    if config.read == "topk":
        pages, coarse = build_pyramid(keys)
        state = state._replace(pages_k=pages, coarse_k=coarse)
    return state


def measure(slots: int, tokens: int, topk_blocks: int, device: str) -> dict[str, float]:
    """Seconds of a forward pass with each read."""
    calls = {}
    ids = torch.randint(0, SHAPE["vocab_size"], (1, tokens), device=device)
    for read in ("dense", "topk"):
        torch.manual_seed(0)
        config = MMRecConfig(**SHAPE, memory_slots=slots, read=read, topk_blocks=topk_blocks)
        calls[read] = (MMRecForCausalLM(config).to(device).eval(), (full_state(config, device),) * config.num_layers)
    seconds: dict[str, list[float]] = {read: [] for read in calls}
    with torch.no_grad():
        for _ in range(1 + RUNS):
            for read, (model, states) in calls.items():
                begin = time.perf_counter()
                model(ids, memory_states=states, logits_to_keep=1)
                if device != "cpu":
                    torch.cuda.synchronize()
                seconds[read].append(time.perf_counter() - begin)
    return {read: min(times[1:]) for read, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the model with dense and topk reads.")
    parser.add_argument("--slots", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 1024])
    parser.add_argument("--topk-blocks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| slots | tokens | dense, ms | topk, ms | dense / topk |\n|---|---|---|---|---|")
    for slots in arguments.slots:
        for tokens in arguments.tokens:
            times = measure(slots, tokens, arguments.topk_blocks, arguments.device)
            dense, topk = times["dense"] * 1e3, times["topk"] * 1e3
            print(f"| {slots} | {tokens} | {dense:.1f} | {topk:.1f} | {dense / topk:.2f} |", flush=True)


if __name__ == "__main__":
    main()

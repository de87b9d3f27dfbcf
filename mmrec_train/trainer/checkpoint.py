"""Saving and restoring a run, all ranks together.

A checkpoint holds, under `checkpoints/step_N/`:

- `deepspeed/`: parameters, fp32 master weights and optimizer states, as DeepSpeed partitions them (for states on NVMe,
  `ranks/optimizer_R_G.pt` instead, see `swapped_optimizer`);
- `ranks/rank_R.pt`: what each rank alone knows: its lanes' memories and its random number generators;
- `run.json`: what every rank knows: step, tokens, position in the data, the run's identity;
- `model/`: the weights in one piece with configuration and tokenizer, as Hugging Face loads them;
- `COMPLETE`: the manifest (see `checkpoint_files`).
"""

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.config import ZeroStageEnum
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.utils.tensor_fragment import fragment_address
from transformers import PreTrainedTokenizerBase

from mmrec_train import checkpoint_files
from mmrec_train.errors import UserError
from mmrec_train.model import MemoryState
from mmrec_train.pretrained import save_pretrained
from mmrec_train.trainer import swapped_optimizer
from mmrec_train.trainer.distributed import World
from mmrec_train.trainer.optimizer import replay_bias_correction

DEEPSPEED_TAG = "deepspeed"
RANKS_FOLDER = "ranks"
RUN_FILE = "run.json"


class WeightsOnlyCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's file format, read without executing pickles: only tensors and the classes named here are built."""

    _KNOWN_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]  # noqa: RUF012  (never changed)

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(self._KNOWN_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)


def save(
    run_dir: Path,
    engine: Any,
    world: World,
    *,
    step: int,
    run_state: dict[str, Any],
    memories: list[tuple[MemoryState, ...]],
    tokenizer: PreTrainedTokenizerBase,
    keep_last: int,
) -> Path:
    """Writes `checkpoints/step_N`; a collective call. An earlier checkpoint is removed only after this one is complete.

    run_state: JSON-able; the same on every rank. memories: of this rank's lanes, one tuple of layers per micro-batch.
    """
    folder = run_dir / "checkpoints" / f"step_{step}.tmp"
    if world.is_main:
        checkpoint_files.begin(run_dir, step)
    dist.barrier()
    (folder / RANKS_FOLDER).mkdir(exist_ok=True)
    if swapped_optimizer.is_swapped(engine):
        swapped_optimizer.save(engine, folder / RANKS_FOLDER, world.rank)
    else:
        engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, save_latest=False)
    rank_state = {
        "memories": [[tuple(t.cpu() for t in layer) for layer in micro_batch] for micro_batch in memories],
        "rng": torch.get_rng_state(),
        "device_rng": get_accelerator().get_rng_state(),
    }
    torch.save(rank_state, _rank_file(folder, world))
    weights = _whole_weights(engine, world)
    if world.is_main:
        (folder / RUN_FILE).write_text(json.dumps(run_state, indent=1))
        save_pretrained(engine.module, tokenizer, folder / checkpoint_files.MODEL_FOLDER, weights)
    dist.barrier()
    # every rank hashes its share of all files, rank 0 gathers the entries and commits
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    entries = checkpoint_files.hash_files(folder, files[world.rank :: world.size])
    gathered: list[dict | None] = [None] * world.size
    dist.all_gather_object(gathered, entries)
    if world.is_main:
        merged = {name: entry for part in gathered if part for name, entry in part.items()}
        checkpoint_files.commit(folder, merged, meta={"step": step})
        checkpoint_files.prune(run_dir, keep_last)
    dist.barrier()
    return run_dir / "checkpoints" / f"step_{step}"


def find(run_dir: Path, resume: str, report: Any) -> Path | None:
    """The checkpoint to go on from: of `--resume auto|never|PATH`. None to start anew.

    PATH is a checkpoint or a run folder. Raises UserError when PATH holds no complete checkpoint, and for `never` when
    the run folder has some already (nothing is overwritten).
    """
    if resume == "never":
        if checkpoint_files.latest_complete(run_dir, report) is not None:
            raise UserError(
                f"{run_dir} holds checkpoints and --resume is never; choose another run_dir, or --resume auto to go on"
            )
        return None
    if resume == "auto":
        return checkpoint_files.latest_complete(run_dir, report)
    path = checkpoint_files.resolve(Path(resume), report)
    newest = checkpoint_files.latest_complete(run_dir, report)
    if newest is not None and newest.resolve() != path.resolve():
        raise UserError(
            f"{run_dir} holds {newest.name}, which is not the checkpoint to resume from ({path}); "
            "choose another run_dir, so that nothing is overwritten"
        )
    return path


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / RUN_FILE).read_text())


def check_identity(checkpoint: Path, stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError that names every entry in which a checkpoint's identity differs from the run's."""
    differences = [
        f"{key} is {stored.get(key)} in the checkpoint and {current.get(key)} here"
        for key in sorted(stored.keys() | current.keys())
        if stored.get(key) != current.get(key)
    ]
    if differences:
        raise UserError(
            f"{checkpoint} belongs to another setting: {'; '.join(differences)}. "
            "Restore these, or start a new run in another run_dir."
        )


def restore(
    checkpoint: Path, engine: Any, world: World, memories: list[tuple[MemoryState, ...]]
) -> list[tuple[MemoryState, ...]]:
    """Loads parameters, optimizer and this rank's generators; returns its memories in the places of those given."""
    if swapped_optimizer.is_swapped(engine):
        swapped_optimizer.restore(engine, checkpoint / RANKS_FOLDER, world.rank)
    else:
        engine.checkpoint_engine = WeightsOnlyCheckpointEngine()
        engine.load_checkpoint(str(checkpoint), tag=DEEPSPEED_TAG)
    replay_bias_correction(getattr(engine.optimizer, "optimizer", engine.optimizer))
    rank_state = torch.load(_rank_file(checkpoint, world), map_location="cpu", weights_only=True)
    torch.set_rng_state(rank_state["rng"])
    get_accelerator().set_rng_state(rank_state["device_rng"])
    return [
        tuple(
            MemoryState(*(s.to(e.device) for s, e in zip(stored, empty, strict=True)))
            for stored, empty in zip(stored_layers, empty_layers, strict=True)
        )
        for stored_layers, empty_layers in zip(rank_state["memories"], memories, strict=True)
    ]


def _rank_file(folder: Path, world: World) -> Path:
    return folder / RANKS_FOLDER / f"rank_{world.rank}.pt"


def _whole_weights(engine: Any, world: World) -> dict[str, torch.Tensor]:
    """The unpartitioned weights in compute precision, in host memory of rank 0; a collective call.

    One parameter is whole at a time. DeepSpeed's own consolidation writes each of them back, which runs out of swap
    buffers when parameters are on NVMe.
    """
    if not engine.zero_optimization_partition_weights():
        return engine.module.state_dict()
    engine.optimizer.checkpoint_event_prologue()
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if world.is_main:
                weights[name] = parameter.detach().cpu().clone()
    engine.optimizer.checkpoint_event_epilogue()
    return weights

"""Loss on the validation sets, under DeepSpeed on all ranks; what is counted and how is in `mmrec_train.evaluation`."""

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed import comm as dist

from mmrec_train.data import TokenDataset
from mmrec_train.evaluation import POSITION_EDGES, Evaluation, FixedLanes, combine, losses_by_position, perplexity
from mmrec_train.trainer.distributed import World


def validate(
    engine: Any,
    sets: Mapping[str, TokenDataset],
    world: World,
    device: torch.device,
    *,
    chunk_len: int,
    micro_batch_size: int,
) -> dict[str, float]:
    """The metrics of all sets together and of each one; a collective call. The trainer's own lanes have no part in it.

    sets: what `evaluation.head` made, by name.
    """
    engine.eval()
    evaluations = {}
    for name, dataset in sets.items():
        lanes = FixedLanes(dataset, chunk_len=chunk_len, batch=micro_batch_size, rank=world.rank, world_size=world.size)
        total = torch.zeros(2, len(POSITION_EDGES), dtype=torch.float64, device=device)
        for part in losses_by_position(engine, lanes, device):
            total += part
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        evaluations[name] = Evaluation.of(total)
    engine.train()
    return metrics(evaluations)


def metrics(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """The record of one validation, without its step."""
    loss = combine(evaluations.values()).loss
    record = {"validation_loss": loss, "validation_perplexity": perplexity(loss)}
    for name, evaluation in evaluations.items():
        record[f"validation/{name}/loss"] = evaluation.loss
        record[f"validation/{name}/perplexity"] = perplexity(evaluation.loss)
        for bucket in evaluation.by_position:
            record[f"validation/{name}/loss_{bucket.name}"] = bucket.loss
            record[f"validation/{name}/perplexity_{bucket.name}"] = perplexity(bucket.loss)
    return record

"""The ranks of a run: who we are, and joining the others."""

import logging
import os
import socket
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init

from mmrec_train.config.yaml_file import by_dotted_key
from mmrec_train.errors import UserError

JOIN_TIMEOUT = timedelta(minutes=30)  # the slowest collective: rank 0 writes a checkpoint while the others wait


class World(NamedTuple):
    """This process among the ranks, as the launcher (deepspeed, torchrun, SLURM script) says it in the environment."""

    rank: int
    local_rank: int
    size: int

    @classmethod
    def from_environment(cls) -> Self:
        """Without a launcher: one rank."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            size=int(os.environ.get("WORLD_SIZE", 1)),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join(world: World, *, on_gpu: bool) -> torch.device:
    """Joins the process group through DeepSpeed and returns this rank's device.

    Raises UserError when the port that the ranks meet at is taken, or when DeepSpeed chose another kind of device.
    """
    chosen = get_accelerator().device_name()
    if (chosen == "cuda") != on_gpu:
        raise UserError(
            f"train.device asks for {'a GPU' if on_gpu else 'the CPU'}, but DeepSpeed was imported for {chosen}; "
            f"set DS_ACCELERATOR={'cuda' if on_gpu else 'cpu'} in the environment"
        )
    for name, value in (("RANK", world.rank), ("LOCAL_RANK", world.local_rank), ("WORLD_SIZE", world.size)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if world.is_main and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:  # torchrun's agent holds the port itself
        _check_port(int(os.environ["MASTER_PORT"]))
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    dist.init_distributed(timeout=JOIN_TIMEOUT, verbose=False)
    if not on_gpu:
        _release_shared_memory(world)
    return torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")


def check_agreement(world: World, settings: Mapping[str, Any]) -> None:
    """Raises UserError, on all ranks, where one has other `settings` than rank 0. A collective call.

    settings: Nested dictionaries of picklable values. Hosts have copies of configuration and data of their own, and one
    that was not brought up to date would train on something else without anyone noticing.
    """
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, (socket.gethostname(), by_dotted_key(settings)))
    main_host, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        differences = [
            f"{key} is {found.get(key)} there and {expected.get(key)} on rank 0"
            for key in {**expected, **found}
            if found.get(key) != expected.get(key)
        ]
        if differences:
            raise UserError(
                f"rank {rank} on {host} is not in the run of rank 0 on {main_host}: {'; '.join(differences)}. "
                "Start all ranks with the same configuration, and give all hosts the same copy of the data."
            )


def _release_shared_memory(world: World) -> None:
    """Removes the name of this rank's buffer for collectives on the CPU, 66 MiB of host memory.

    DeepSpeed 0.19 leaves it in /dev/shm for ever, where it takes memory, and misleads a later run that meets at its
    port. Once all ranks have opened each other's buffers the names have no use: the memory goes with the processes.
    """
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{world.rank}").unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OverflowError as error:
            raise UserError(f"MASTER_PORT is {port}; a port is at most 65535") from error
        except OSError as error:
            raise UserError(
                f"port {port}, where the ranks were to meet, cannot be used ({error.strerror}); "
                "another run may hold it: pass another one to the launcher, `deepspeed --master_port PORT …`"
            ) from error


_chosen_by_deepspeed = Init._set_dtype


def _set_dtype(init: Any, ds_config: Any, dtype: torch.dtype | None) -> None:
    """What ZeRO-3's partitions and their NVMe files are of: the dtype that it is told, if any.

    On CPUs without fp16 instructions DeepSpeed 0.19.8 would take bf16 instead (`dtype or fp16 if …` binds the other way
    round than meant), and swap fp32 weights through buffers of half the size.
    """
    _chosen_by_deepspeed(init, ds_config, dtype)
    if dtype is not None:
        init.dtype = dtype


Init._set_dtype = _set_dtype

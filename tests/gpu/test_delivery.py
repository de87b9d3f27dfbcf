"""Delivery on a GPU: pinned memory and a stream of its own change no token."""

from pathlib import Path

import torch

from mmrec_train.data import LaneLoader
from mmrec_train.data.delivery import Delivery
from mmrec_train.data.lanes import StreamSettings
from tests.data.documents import numbered_documents, write_documents


def test_the_same_steps_arrive_while_the_gpu_computes(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([3000] * 20), shard_tokens=10**6)

    def loader() -> LaneLoader:
        return LaneLoader(dataset, StreamSettings(), num_lanes=8, chunk_len=4096, micro_batch_size=4)

    plain, device = loader(), torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    arrived = []
    with Delivery(loader(), device) as delivery:
        for _ in range(50):
            for _ in range(10):
                busy = busy @ busy / 64
            # copied behind the work above, when the next steps' copies are under way or done
            arrived.append([[tensor.clone() for tensor in window] for window in delivery.next_step()])
    for step in arrived:
        for window, expected in zip(step, plain.next_step(), strict=True):
            assert all(torch.equal(tensor.cpu(), right) for tensor, right in zip(window, expected, strict=True))

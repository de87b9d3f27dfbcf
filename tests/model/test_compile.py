"""A model with `read: topk` under torch.compile; blocks with a dense read are compiled in tests/kernels."""

import pytest
import torch

from mmrec_train.model import ChunkPlan
from tests.kernels.test_compile import outputs_and_gradients
from tests.model.conftest import TOPK, random_documents, small_model


@pytest.mark.parametrize("lengths", [[40], [40, 33]], ids=["one length", "any length"])
def test_a_block_that_selects_compiles_as_one_graph_and_equals_eager(lengths, monkeypatch):
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    torch._dynamo.reset()
    model = small_model(**TOPK)
    block = model.model.layers[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=len(lengths) > 1)
    ids, reset = random_documents(2, 30, seed=1)
    carried = model(ids, reset=reset).memory_states[0].detach()
    for length in lengths:
        x = torch.randn(2, length, 16, dtype=torch.float64)
        _, reset = random_documents(2, length, seed=2, probability=0.05)
        plan = ChunkPlan.of(model.config, carried, reset)
        again = outputs_and_gradients(compiled, block, x, carried, plan)
        for a, e in zip(again, outputs_and_gradients(block, block, x, carried, plan), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)

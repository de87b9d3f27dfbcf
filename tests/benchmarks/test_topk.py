"""benchmarks/topk.py compares two reads of the same ring."""

import importlib
from pathlib import Path

import pytest
import torch

from mmrec_train.model import MMRecConfig, MMRecForCausalLM


@pytest.fixture
def topk(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("topk")


def test_both_reads_are_timed(topk):
    seconds = topk.measure(slots=40, tokens=3, topk_blocks=2, device="cpu")
    assert seconds.keys() == {"dense", "topk"} and min(seconds.values()) > 0


def test_its_ring_is_full_and_selecting_all_of_it_is_reading_it(topk):
    logits = []
    for read in ("dense", "topk"):
        torch.manual_seed(0)
        config = MMRecConfig(**topk.SHAPE, memory_slots=40, read=read, topk_blocks=10)
        model = MMRecForCausalLM(config).eval()
        torch.nn.init.ones_(model.model.layers[0].mixer.memory.output_gain)
        torch.manual_seed(1)
        state = topk.full_state(config, "cpu")
        assert state.slots_written.item() == 40
        logits.append(model(torch.arange(70)[None], memory_states=(state,)).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)

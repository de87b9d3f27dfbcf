import pytest
import torch

from mmrec_train.model import MMRecConfig, MMRecForCausalLM

SMALL = dict(
    vocab_size=37,
    hidden_dim=16,
    num_layers=2,
    num_heads=4,
    num_memories=2,
    memory_slots=5,
    segment_len=3,
    short_window=4,
    ffn_dim=24,
    decay_half_life=[1.0, 64.0],
)


# 21 slots in two nodes of level 2 and six pages, of which a head reads one: short documents fill the ring, too
TOPK = dict(read="topk", topk_blocks=1, memory_slots=21, segment_len=1)


def small_model(seed=0, **changes):
    """An fp64 model of two layers in which every parameter matters (no gain, bias or scorer is left at zero)."""
    torch.manual_seed(seed)
    model = MMRecForCausalLM(MMRecConfig(**(SMALL | changes))).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture
def model(request):
    """A `small_model`, changed by what `both_reads` gives."""
    return small_model(**getattr(request, "param", {}))


both_reads = pytest.mark.parametrize("model", [{}, TOPK], ids=["dense", "topk"], indirect=True)


def random_documents(batch, length, seed=0, probability=0.1):
    """Token ids and resets [B, T]; some rows start in the middle of a document."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SMALL["vocab_size"], (batch, length), generator=generator)
    return ids, torch.rand(batch, length, generator=generator) < probability


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()

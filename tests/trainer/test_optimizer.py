"""Learning-rate schedules against their closed formulas, and which group each parameter of a real model is in."""

import itertools
import math
from typing import Any, cast

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from mmrec_train.config.schema import OptimizerSection, ScheduleSection
from mmrec_train.model import MMRecConfig, MMRecForCausalLM
from mmrec_train.trainer.optimizer import (
    COMPONENTS,
    build_optimizer,
    component_of,
    has_weight_decay,
    learning_rate,
    parameter_groups,
)

# ---- learning rate


def test_cosine_by_hand() -> None:
    schedule = ScheduleSection(name="cosine", warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(step, 9, 2.0, schedule) for step in range(9)]
    # warm-up to 2, then 0.2 + 1.8·(1 + cos(π·i/4))/2 for i = 0 … 4
    half = math.sqrt(0.5)
    falling = [2.0, 0.2 + 0.9 * (1 + half), 1.1, 0.2 + 0.9 * (1 - half), 0.2]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, *falling])


def test_wsd_by_hand() -> None:
    schedule = ScheduleSection(name="wsd", warmup_steps=2, min_lr_ratio=0.0, decay_fraction=0.5)
    rates = [learning_rate(step, 10, 1.0, schedule) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_wsd_decays_after_warm_up_only() -> None:
    schedule = ScheduleSection(name="wsd", warmup_steps=3, min_lr_ratio=0.5, decay_fraction=1.0)
    rates = [learning_rate(step, 6, 1.0, schedule) for step in range(6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 0.75, 0.5])


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleSection, int, float]:
    """A schedule with at least two steps after warm-up, the number of steps, the peak."""
    warmup = draw(st.integers(0, 50))
    schedule = ScheduleSection(
        name=draw(st.sampled_from(["cosine", "wsd"])),
        warmup_steps=warmup,
        min_lr_ratio=draw(st.floats(0, 1)),
        decay_fraction=draw(st.floats(0.01, 1)),
    )
    return schedule, warmup + draw(st.integers(2, 200)), draw(st.floats(1e-6, 10))


@given(schedules())
def test_the_rate_rises_to_its_peak_and_falls_to_its_floor(case: tuple[ScheduleSection, int, float]) -> None:
    schedule, steps, peak = case
    rates = [learning_rate(step, steps, peak, schedule) for step in range(steps)]
    warmup = schedule.warmup_steps
    assert rates[:warmup] == pytest.approx([peak * (i + 1) / warmup for i in range(warmup)])
    assert rates[warmup] == pytest.approx(peak)
    after = rates[warmup:]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(after))
    assert all(peak * schedule.min_lr_ratio * (1 - 1e-12) <= rate <= peak * (1 + 1e-12) for rate in after)
    assert rates[-1] == pytest.approx(peak * schedule.min_lr_ratio)


@given(schedules(), st.integers(0, 250))
def test_the_rate_has_its_closed_formula(case: tuple[ScheduleSection, int, float], step: int) -> None:
    schedule, steps, peak = case
    assume(schedule.warmup_steps <= step < steps)
    last, floor = steps - 1, peak * schedule.min_lr_ratio
    if schedule.name == "cosine":
        begin = schedule.warmup_steps
        part = math.cos(math.pi / 2 * (step - begin) / (last - begin)) ** 2  # = (1 + cos(2x)) / 2
    else:
        begin = max(schedule.warmup_steps, steps - max(1, round(schedule.decay_fraction * steps)))
        falling = (last - step) / (last - begin) if last > begin else 0.0  # one step only: it is at the floor
        part = 1.0 if step < begin else falling
    assert learning_rate(step, steps, peak, schedule) == pytest.approx(floor + (peak - floor) * part, rel=1e-9)


# ---- parameter groups

LAYER_NAMES = {
    "base": [
        "mixer_norm.weight",
        "mixer.value_gain",
        "mixer.qkvz_proj.weight",
        "mixer.out_proj.weight",
        "ffn_norm.weight",
        "ffn.gate_up_proj.weight",
        "ffn.down_proj.weight",
    ],
    "memory": [
        "mixer.state_norm.weight",
        "mixer.state_proj.weight",
        "mixer.memory.pool_score",
        "mixer.memory.null_k",
        "mixer.memory.null_v",
        "mixer.memory.output_gain",
        "mixer.memory.query_norm.weight",
        "mixer.memory.key_norm.weight",
    ],
    "decay": [
        "mixer.decay.decay_bias",
        "mixer.decay.context_bias",
        "mixer.decay.decay_proj.weight",
        "mixer.decay.context_proj.weight",
    ],
    "gate": ["mixer.recurrence.weight"],
}
NOT_DECAYED = ("norm.weight", "_bias", "_gain", "null_k", "null_v")


@pytest.fixture(scope="module", params=["dense", "headwise", "none"])
def model(request: pytest.FixtureRequest) -> MMRecForCausalLM:
    config = MMRecConfig.from_preset(
        "tiny", hidden_dim=32, num_layers=2, ffn_dim=48, vocab_size=64, tie_word_embeddings=False, gate=request.param
    )
    return MMRecForCausalLM(config)


def test_the_component_of_every_parameter(model: MMRecForCausalLM) -> None:
    expected = dict.fromkeys(["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"], "base")
    for component, names in LAYER_NAMES.items():
        if component != "gate" or model.config.gate != "none":
            expected |= {f"model.layers.{layer}.{name}": component for layer in range(2) for name in names}
    assert {name: component_of(name) for name, _ in model.named_parameters()} == expected


def test_norms_biases_and_gains_do_not_decay(model: MMRecForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        assert has_weight_decay(name, parameter) == (not name.endswith(NOT_DECAYED)), name


def test_the_shape_is_that_before_zero_3_partitions() -> None:
    partitioned = cast(Any, nn.Parameter(torch.empty(0)))
    for shape, decays in ((torch.Size([4, 3]), True), (torch.Size([4]), False)):
        partitioned.ds_shape = shape
        assert has_weight_decay("model.layers.0.ffn.down_proj.weight", partitioned) is decays


def test_groups_hold_every_parameter_once(model: MMRecForCausalLM) -> None:
    groups = parameter_groups(model, OptimizerSection(learning_rate=1e-3, weight_decay=0.3))
    keys = [(group["component"], group["weight_decay"]) for group in groups]
    everything = [(component, decay) for component in COMPONENTS for decay in (0.3, 0.0)]
    absent = [("gate", 0.0)] if model.config.gate != "none" else [("gate", 0.3), ("gate", 0.0)]
    assert keys == [key for key in everything if key not in absent]

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["component"] == component_of(name)
            assert (group["weight_decay"] == 0.0) == name.endswith(NOT_DECAYED), name


def test_tied_embeddings_are_one_parameter() -> None:
    model = MMRecForCausalLM(MMRecConfig.from_preset("tiny", hidden_dim=32, num_layers=1, ffn_dim=48, vocab_size=64))
    groups = parameter_groups(model, OptimizerSection(learning_rate=1e-3))
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    assert id(model.get_output_embeddings().weight) in ids


def test_the_optimizer_is_adamw_with_the_settings_given() -> None:
    """One step on a constant gradient: decoupled decay, then a step of the learning rate against its sign."""
    settings = OptimizerSection(learning_rate=0.1, betas=(0.8, 0.9), eps=1e-12, weight_decay=0.5)
    decaying, other = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([2.0]))
    groups = [dict(params=[decaying], weight_decay=0.5), dict(params=[other], weight_decay=0.0)]
    optimizer = build_optimizer(groups, settings, offloaded=False)
    assert type(optimizer) is torch.optim.AdamW
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-12) for group in optimizer.param_groups)
    decaying.grad, other.grad = torch.tensor([-3.0]), torch.tensor([3.0])
    optimizer.step()
    assert decaying.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) + 0.1)
    assert other.item() == pytest.approx(2.0 - 0.1)

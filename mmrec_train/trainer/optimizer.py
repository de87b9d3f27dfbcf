"""AdamW over parameter groups by component, and the learning rate of each step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mmrec_train.config.schema import OptimizerSection, ScheduleSection

COMPONENTS = ("base", "memory", "decay", "gate")


def component_of(name: str) -> str:
    """Which component a parameter belongs to, by its name in `MMRecForCausalLM`.

    gate: W_g; decay: W_γ, b_γ, W_c, b_c; memory: what the slot memory owns, and the projections of the state that
    write and query it; base: everything else.
    """
    if ".recurrence." in name:
        return "gate"
    if ".decay." in name:
        return "decay"
    if ".memory." in name or ".state_proj." in name or ".state_norm." in name:
        return "memory"
    return "base"


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms, biases, gains and the null slot (a learned key and value, not a map) do not.

    The shape is asked of ZeRO-3's metadata where the parameter itself is partitioned.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2 and not name.endswith((".null_k", ".null_v"))


def parameter_groups(model: nn.Module, config: OptimizerSection) -> list[dict]:
    """One group per component and decay, in a fixed order; each dict has `params`, `weight_decay` and `component`."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((component_of(name), has_weight_decay(name, parameter)), []).append(parameter)
    return [
        dict(params=groups[key], weight_decay=config.weight_decay if key[1] else 0.0, component=key[0])
        for key in ((component, decays) for component in COMPONENTS for decays in (True, False))
        if key in groups
    ]


def build_optimizer(groups: Iterable[dict], config: OptimizerSection, *, offloaded: bool) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's vectorised one for states in host memory, torch's otherwise."""
    settings: dict[str, Any] = dict(lr=config.learning_rate, betas=config.betas, eps=config.eps)
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # imported late: it compiles its kernel on first use

        return DeepSpeedCPUAdam(list(groups), adamw_mode=True, **settings)
    return torch.optim.AdamW(list(groups), **settings)


def replay_bias_correction(optimizer: Any) -> None:
    """Brings the hidden counter of DeepSpeed's CPU Adam to where the restored states are; nothing for other optimizers.

    Its kernel keeps β₁ᵗ and β₂ᵗ as running fp32 products, which are in no checkpoint; a jump to step t would take a
    power instead and be off by rounding. So the steps are counted again on a dummy parameter.
    """
    kernel = getattr(optimizer, "ds_opt_adam", None)
    steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    if kernel is None or steps == 0:
        return
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    dummies = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        kernel.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *dummies)


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleSection) -> float:
    """The learning rate of optimizer step `step`, counted from 0; a pure function, so there is no state to resume.

    Linear warm-up over `warmup_steps` (the first step already moves), then `cosine` to `min_lr_ratio`·peak at the
    last step, or `wsd`: constant, then linear to `min_lr_ratio`·peak over the last `decay_fraction` of all steps.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = peak * schedule.min_lr_ratio
    first = schedule.warmup_steps
    if schedule.name == "wsd":
        first = max(first, total_steps - max(1, round(schedule.decay_fraction * total_steps)))
    span = total_steps - 1 - first
    progress = min(max(step - first, 0) / span, 1.0) if span > 0 else float(step >= first)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return floor + (peak - floor) * remaining

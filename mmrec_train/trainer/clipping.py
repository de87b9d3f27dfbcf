"""Clipping of gradient norms by component and as a whole, inside DeepSpeed's optimizer step.

Each component (memory, decay, gate) is scaled to its own largest norm first, then everything to the global one.
DeepSpeed knows the global norm only, and holds gradients in a different form for each ZeRO stage; so its own clipping
is off and the factors are applied at the two places where gradients are whole and about to be used:

- ZeRO-1 to 3 compute a norm per parameter group, then unscale group by group just before the update. Both methods of
  the optimizer instance are wrapped: the first one's results give the factors, the second one applies them. This also
  holds for gradients that were swapped to the host or NVMe.
- Without ZeRO, and in the bf16 optimizer of ZeRO-1, the inner optimizer is stepped once for all groups: a pre-step
  hook does both.
"""

import math
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from mmrec_train.config.schema import ClipSection
from mmrec_train.trainer.optimizer import COMPONENTS


class GradientClipper:
    """Clips the gradients of every step of a DeepSpeed engine; `norms` tells what they were.

    Args:
        engine: A DeepSpeed engine whose own clipping is off.
        components: The component of each of the optimizer's parameter groups, in their order.
        limits: Largest norms.

    Attributes:
        norms: Norms of the last step before clipping: `grad_norm` and `grad_norm_<component>`; NaN or Inf for a
            gradient that is not finite. DeepSpeed skips such a step in 16 bit, and takes it in fp32.
    """

    def __init__(self, engine: Any, components: list[str], limits: ClipSection):
        self._components = components
        self._limits = {"memory": limits.memory, "decay": limits.decay, "gate": limits.gate}
        self._global_limit = limits.global_
        self._factors = [1.0] * len(components)
        self.norms: dict[str, float] = {}
        optimizer = engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._attach_to_stage_3(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            self._attach_to_stage_1_and_2(optimizer)
        else:
            partitioned = isinstance(optimizer, BF16_Optimizer)
            inner = getattr(optimizer, "optimizer", optimizer)
            self._attach_to_inner(inner, engine.seq_data_parallel_group if partitioned else None)

    def _decide(self, squared_norms: list[float]) -> None:
        """Sets `norms` and the factor of each parameter group from the squared norm of each group's gradient."""
        squares = dict.fromkeys(COMPONENTS, 0.0)
        for component, square in zip(self._components, squared_norms, strict=True):
            squares[component] += square
        norms = {component: math.sqrt(square) if square >= 0 else math.nan for component, square in squares.items()}
        self.norms = {"grad_norm": math.sqrt(sum(n * n for n in norms.values()))}
        self.norms |= {f"grad_norm_{component}": norms[component] for component in COMPONENTS[1:]}
        factors = {c: _factor(norm, self._limits.get(c, math.inf)) for c, norm in norms.items()}
        clipped = math.sqrt(sum((factors[c] * norm) ** 2 for c, norm in norms.items()))
        overall = _factor(clipped, self._global_limit)
        self._factors = [factors[component] * overall for component in self._components]

    def _attach_to_stage_3(self, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
        group_norms, unscale = optimizer._get_norm_groups, optimizer.unscale_and_clip_grads
        group_of = optimizer.sub_group_to_group_id

        def norms_and_factors() -> list[torch.Tensor]:
            norms = group_norms()
            squares = [0.0] * len(self._components)
            for sub_group, norm in enumerate(_on_host(norms)):
                squares[group_of[sub_group]] += _unscaled_square(norm, optimizer.loss_scale)
            self._decide(squares)
            return norms

        def unscale_and_clip(sub_group: int, total_norm: torch.Tensor) -> None:
            unscale(sub_group, total_norm)
            optimizer.fp32_partitioned_groups_flat[sub_group].grad.mul_(self._factors[group_of[sub_group]])

        optimizer._get_norm_groups = norms_and_factors
        optimizer.unscale_and_clip_grads = unscale_and_clip

    def _attach_to_stage_1_and_2(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        total_norm, unscale = optimizer.scaled_global_norm, optimizer.unscale_and_clip_grads

        def norms_and_factors(*args: Any, **kwargs: Any) -> torch.Tensor:
            norms = []
            for group, parameters in enumerate(optimizer.params_in_partition):
                if optimizer.cpu_offload:
                    norms.append(optimizer.complete_grad_norm_calculation_for_cpu_offload(parameters))
                else:
                    norms.append(optimizer.get_grad_norm_direct(optimizer.averaged_gradients[group], parameters))
            self._decide([_unscaled_square(norm, optimizer.loss_scale) for norm in _on_host(norms)])
            return total_norm(*args, **kwargs)

        def unscale_and_clip(gradients: list[torch.Tensor], total_norm: torch.Tensor) -> None:
            unscale(gradients, total_norm)
            for partition, factor in zip(optimizer.single_partition_of_fp32_groups, self._factors, strict=True):
                if partition.grad is gradients[0]:
                    gradients[0].mul_(factor)

        optimizer.scaled_global_norm = norms_and_factors
        optimizer.unscale_and_clip_grads = unscale_and_clip

    def _attach_to_inner(self, inner: torch.optim.Optimizer, partition_group: Any) -> None:
        def clip(inner: torch.optim.Optimizer, *_: Any) -> None:
            gradients = [[p.grad for p in group["params"] if p.grad is not None] for group in inner.param_groups]
            squares = torch.stack([_sum_of_squares(group) for group in gradients])
            if partition_group is not None:
                dist.all_reduce(squares, group=partition_group)
            self._decide(squares.tolist())
            for group, factor in zip(gradients, self._factors, strict=True):
                if group and factor != 1.0:
                    torch._foreach_mul_(group, factor)

        inner.register_step_pre_hook(clip)


def _factor(norm: float, limit: float) -> float:
    """What brings a gradient of this norm down to the limit; 1 for one within it, and for a NaN."""
    return limit / norm if norm > limit else 1.0


def _on_host(norms: list[Any]) -> list[float]:
    """Norms as floats, with one transfer for those on the same device."""
    return torch.stack([torch.as_tensor(norm, dtype=torch.float64).cpu() for norm in norms]).tolist()


def _unscaled_square(norm: float, loss_scale: float) -> float:
    """The square of a norm without the loss scale; DeepSpeed marks a non-finite norm by −1, which stays negative."""
    return (norm / loss_scale) ** 2 if norm >= 0 else -math.inf


def _sum_of_squares(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()

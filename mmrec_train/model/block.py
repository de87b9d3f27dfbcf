"""One MM-Rec block: gated recurrence and memory read in parallel, then a SwiGLU feed-forward; pre-norm, residual."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_kernels import GatedRecurrence, compute_dtype, gated_recurrence, linear_scan
from mmrec_train.model.configuration import MMRecConfig
from mmrec_train.model.memory import ChunkPlan, MemoryState, SlotMemory

MIN_DECAY = 1e-6  # γ is kept in [MIN_DECAY, 1 − MIN_DECAY]


class SolverReport(NamedTuple):
    """How the recurrence of a layer was solved: iterations [B] int32 and residual [B] fp32 of each row."""

    iterations: Tensor
    residual: Tensor


class Decay(nn.Module):
    """log γ_t = logsigmoid(W_γ z_t + b_γ) + logsigmoid(W_c k_t + b_c), always in fp32 (MDI: decay × context)."""

    def __init__(self, config: MMRecConfig):
        super().__init__()
        self.config = config
        self.decay_proj = nn.Linear(config.hidden_dim, config.hidden_dim, bias=False)  # W_γ
        self.decay_bias = nn.Parameter(torch.empty(config.hidden_dim))  # b_γ
        self.context_proj = nn.Linear(config.hidden_dim, config.hidden_dim, bias=False)  # W_c
        self.context_bias = nn.Parameter(torch.empty(config.hidden_dim))  # b_c

    def init_biases(self) -> None:
        """b_γ gives each channel its half-life (with the context at one), b_c starts at +6."""
        config = self.config
        if config.decay_init is None:
            shortest, longest = config.decay_half_life
            half_life = torch.logspace(math.log2(shortest), math.log2(longest), config.hidden_dim, base=2)
            gamma = 0.5 ** (1 / half_life.double())
        else:
            gamma = torch.full((config.hidden_dim,), config.decay_init, dtype=torch.float64)
        with torch.no_grad():
            self.decay_bias.copy_(torch.logit(gamma))
            self.context_bias.fill_(6.0)

    def forward(self, z: Tensor, k: Tensor) -> Tensor:
        """log γ [B, T, D] in fp32 (fp64 for fp64 inputs)."""
        dtype = compute_dtype(z.dtype)
        # biases are added in fp32: a 16-bit logit near 6 would put 1 − γ off by one percent and more
        decay = self.decay_proj(z).to(dtype) + self.decay_bias.to(dtype)
        context = self.context_proj(k).to(dtype) + self.context_bias.to(dtype)
        log_gamma = F.logsigmoid(decay) + F.logsigmoid(context)
        return log_gamma.clamp(math.log(MIN_DECAY), math.log1p(-MIN_DECAY))


class Recurrence(nn.Module):
    """h_t = z̃_t ⊙ σ(W_g h_{t−1}) + γ_t ⊙ h_{t−1} with z̃_t = 2 (1 − γ_t) z_t; owns W_g."""

    def __init__(self, config: MMRecConfig):
        super().__init__()
        self.config = config
        d, heads = config.hidden_dim, config.num_heads
        shape = {"dense": (d, d), "headwise": (heads, d // heads, d // heads), "none": None}[config.gate]
        self.weight: nn.Parameter | None = None if shape is None else nn.Parameter(torch.empty(shape))

    def init_weight(self) -> None:
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)

    def forward(self, z: Tensor, log_gamma: Tensor, h: Tensor, reset: Tensor) -> GatedRecurrence:
        """States [B, T, D] in fp32 for inputs z [B, T, D], decays [B, T, D] and the state before them [B, D]."""
        gamma = log_gamma.exp()
        z = -2 * torch.expm1(log_gamma) * z  # 2 (1 − γ) z without the cancellation in 1 − γ
        if self.weight is None:
            states, final = linear_scan(gamma, z / 2, h, reset=reset)
            rows = z.shape[0]
            exact = torch.zeros(rows, dtype=torch.int32, device=z.device), torch.zeros(rows, device=z.device)
            return GatedRecurrence(states, final, *exact)
        return gated_recurrence(
            z,
            gamma,
            self.weight,
            h,
            reset=reset,
            tol=self.config.solver_tolerance,
            max_iterations=self.config.solver_max_iterations,
        )


class Mixer(nn.Module):
    """Mixes over time: the recurrence h, the memory read m and a direct path α v, through one output projection."""

    def __init__(self, config: MMRecConfig):
        super().__init__()
        d = config.hidden_dim
        self.qkvz_proj = nn.Linear(d, 4 * d, bias=False)
        self.decay = Decay(config)
        self.recurrence = Recurrence(config)
        self.state_norm = nn.RMSNorm(d, eps=config.norm_eps)
        self.state_proj = nn.Linear(d, 3 * d, bias=False)  # W_q', W_mk, W_mv: what the state adds to q, k and v
        self.memory = SlotMemory(config)
        self.value_gain = nn.Parameter(torch.full((1,), 0.1))  # α
        self.out_proj = nn.Linear(d, d, bias=False)

    def forward(self, y: Tensor, state: MemoryState, plan: ChunkPlan) -> tuple[Tensor, MemoryState, SolverReport]:
        """Mixes a normalised chunk y [B, T, D]; returns its update [B, T, D] and the state after it."""
        q, k, v, z = self.qkvz_proj(y).chunk(4, dim=-1)
        solution = self.recurrence(z, self.decay(z, k), state.h, plan.reset)
        normed_h = self.state_norm(solution.h.to(y.dtype))
        state_q, state_k, state_v = self.state_proj(normed_h).chunk(3, dim=-1)
        # not of the state that memory makes: torch 2.11 cannot trace _replace of a tuple made in the graph
        state = state._replace(h=solution.final_state)
        read, state = self.memory(q + state_q, k + state_k, v + state_v, normed_h, state, plan)
        mixed = solution.h + read + self.value_gain * v
        report = SolverReport(solution.iterations, solution.residual)
        return self.out_proj(mixed.to(y.dtype)), state, report


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) ⊙ W_up x), gate and up as one product."""

    def __init__(self, config: MMRecConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_dim, 2 * config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class MMRecBlock(nn.Module):
    """x¹ = x + Mixer(RMSNorm(x)); out = x¹ + SwiGLU(RMSNorm(x¹))."""

    def __init__(self, config: MMRecConfig):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_dim, eps=config.norm_eps)
        self.mixer = Mixer(config)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn_norm = nn.RMSNorm(config.hidden_dim, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x: Tensor, state: MemoryState, plan: ChunkPlan) -> tuple[Tensor, MemoryState, SolverReport]:
        """One chunk x [B, T, D] through the block; returns it, the state after it and the solver's report."""
        update, state, report = self.mixer(self.mixer_norm(x), state, plan)
        x = x + self.dropout(update)
        return x + self.ffn(self.ffn_norm(x)), state, report

"""The operations as plain loops over time: slow, literal, differentiable by autograd, in any dtype on any device.

Every kernel is tested against these. They compute in the dtype of their inputs, so run them in fp64.
"""

import torch
from torch import Tensor


def linear_scan(
    gamma: Tensor,
    x: Tensor,
    initial_state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """h_t = γ_t h_{t−1} + x_t; see `mmrec_kernels.linear_scan`."""
    batch, length, width = x.shape
    h = x.new_zeros(batch, width) if initial_state is None else initial_state
    states: list[Tensor] = [h] * length
    for t in reversed(range(length)) if reverse else range(length):
        if reset is not None:
            h = torch.where(reset[:, t, None], torch.zeros_like(h), h)
        h = gamma[:, t] * h + x[:, t]
        states[t] = h
    return torch.stack(states, dim=1), h


def associative_scan_exponential(gamma: Tensor, initial_log: Tensor | None = None) -> Tensor:
    """Y_t = exp(max(−50, Σ_{i≤t} max(−50, log γ_i))); see `mmrec_kernels.associative_scan_exponential`."""
    total = torch.zeros_like(gamma[:, 0]) if initial_log is None else initial_log
    products = []
    for t in range(gamma.shape[1]):
        total = (total + gamma[:, t].clamp(0, 1).log().clamp(-50, 0)).clamp(-50, 0)
        products.append(total.exp())
    return torch.stack(products, dim=1)


def gate_product(h: Tensor, weight: Tensor) -> Tensor:
    """W h for a dense [D, D] or a headwise [H, d, d] weight; h is [..., D]."""
    if weight.dim() == 2:
        return h @ weight.T
    heads, width, _ = weight.shape
    return torch.einsum("...hj,hij->...hi", h.unflatten(-1, (heads, width)), weight).flatten(-2)


def gated_recurrence(
    z: Tensor,
    gamma: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = z_t ⊙ σ(W h_{t−1}) + γ_t ⊙ h_{t−1}; returns (h [B, T, D], final state [B, D])."""
    batch, length, width = z.shape
    h = z.new_zeros(batch, width) if initial_state is None else initial_state
    states = []
    for t in range(length):
        if reset is not None:
            h = torch.where(reset[:, t, None], torch.zeros_like(h), h)
        h = z[:, t] * torch.sigmoid(gate_product(h, weight)) + gamma[:, t] * h
        states.append(h)
    return torch.stack(states, dim=1), h


def attend_one(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query [d] over keys and values [n, d]; returns (out [d], lse [])."""
    scores = keys @ q * q.shape[-1] ** -0.5
    return torch.softmax(scores, dim=0) @ values, torch.logsumexp(scores, dim=0)


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary position of one vector [d]: component i is paired with component i + d/2 (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def memory_attention(
    q: Tensor,
    slots_k: Tensor,
    slots_v: Tensor,
    *,
    slot_stamp: Tensor,
    slot_start: Tensor,
    slot_stop: Tensor,
    window_k: Tensor | None = None,
    window_v: Tensor | None = None,
    window_start: Tensor | None = None,
    window: int = 0,
    null_k: Tensor | None = None,
    null_v: Tensor | None = None,
    pages: Tensor | None = None,
    rope_theta: float = 10000.0,
) -> tuple[Tensor, Tensor]:
    """One query at a time over the keys it sees, gathered in a list; see `mmrec_kernels.memory_attention`."""
    batch, heads, length, width = q.shape
    heads_per_bank = heads // slots_k.shape[1]
    out_rows, lse_rows = [], []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                # a rotation by position 0 changes nothing, so the query stays as it is and keys turn by minus their age
                keys, values = [], []
                bank = h // heads_per_bank
                own_slice = slice(h % heads_per_bank * width, (h % heads_per_bank + 1) * width)
                for i in range(slots_k.shape[2]):
                    selected = pages is None or i // 4 in pages[b, h, t]
                    if selected and slot_start[b, t] <= slot_stamp[b, i] < slot_stop[b, t]:
                        keys.append(slots_k[b, bank, i, own_slice])
                        values.append(slots_v[b, bank, i, own_slice])
                if window_k is not None and window_v is not None and window_start is not None:
                    own = window_k.shape[2] - length + t
                    for i in range(max(own - window + 1, int(window_start[b, t])), own + 1):
                        keys.append(rotate(window_k[b, h, i], i - own, rope_theta))
                        values.append(window_v[b, h, i])
                if null_k is not None and null_v is not None:
                    keys.append(null_k[h])
                    values.append(null_v[h])
                if keys:
                    row, norm = attend_one(q[b, h, t], torch.stack(keys), torch.stack(values))
                else:
                    row, norm = torch.zeros_like(q[b, h, t]), q.new_tensor(float("-inf"))
                out_rows.append(row)
                lse_rows.append(norm)
    return torch.stack(out_rows).view_as(q), torch.stack(lse_rows).view(batch, heads, length)


def build_pyramid(slots_k: Tensor, size: int) -> Tensor:
    """Averages [B, R, ⌈M/size⌉, E] of `size` slots each; see `mmrec_kernels.build_pyramid`."""
    return torch.stack([node.mean(2) for node in slots_k.split(size, dim=2)], dim=2)


def select_pages(
    q: Tensor,
    slots_k: Tensor,
    *,
    slot_stamp: Tensor,
    slot_start: Tensor,
    slot_stop: Tensor,
    topk_blocks: int,
) -> list[list[list[set[int]]]]:
    """The set of pages of each [b][h][t]; see `mmrec_kernels.select_pages`."""
    heads_per_bank = q.shape[1] // slots_k.shape[1]
    width = q.shape[-1]

    def one(b: int, h: int, t: int) -> set[int]:
        own_slice = slice(h % heads_per_bank * width, (h % heads_per_bank + 1) * width)
        scores = slots_k[b, h // heads_per_bank, :, own_slice] @ q[b, h, t]
        seen = (slot_stamp[b] >= slot_start[b, t]) & (slot_stamp[b] < slot_stop[b, t])

        def best(size: int, nodes: list[int]) -> list[int]:
            means = {}
            for node in nodes:
                slots = slice(node * size, node * size + size)
                if seen[slots].any():
                    means[node] = scores[slots][seen[slots]].mean().item()
            return sorted(means, key=lambda node: (-means[node], node))[:topk_blocks]

        coarse = best(16, list(range((len(scores) + 15) // 16)))
        return set(best(4, [child for node in coarse for child in range(4 * node, 4 * node + 4)]))

    batch, heads, length, _ = q.shape
    return [[[one(b, h, t) for t in range(length)] for h in range(heads)] for b in range(batch)]

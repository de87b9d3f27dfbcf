"""Inputs as MM-Rec makes them, and an operation with its inputs as one thing that can be run, checked and timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HEAD_DIM = 128
BANKS = 8
SLOTS, SEGMENT, WINDOW = 1024, 64, 512
CARRIED = 100_001  # tokens of the document before the chunk: the ring is full, and a segment is unfinished
PIECE = 8192  # tokens made at a time, so that nothing in fp32 exists for the whole length


@dataclass
class Case:
    """An operation and its inputs; its first two outputs are differentiable.

    Attributes:
        name: What the tables call it.
        operation: A function of `leaves` and `options`.
        leaves: The tensors it is differentiated by.
        options: All other arguments.
        exact: Options that make it exact in fp64.
    """

    name: str
    operation: Callable[..., Sequence[Tensor]]
    leaves: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self._probes: list[Tensor] | None = None

    def forward(self) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.operation(**self.leaves, **self.options)

    def training(self) -> list[Tensor]:
        """Outputs, and gradients of a random functional of them by each leaf."""
        outputs = self.operation(**self.leaves, **self.options)[:2]
        if self._probes is None:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            self._probes = [torch.randn(o.shape, generator=generator, device=o.device, dtype=o.dtype) for o in outputs]
        probes = [p.to(o.dtype) for p, o in zip(self._probes, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(self.leaves.values()), probes)
        return [*(o.detach() for o in outputs), *gradients]

    def labels(self) -> list[str]:
        """Names of what `training` returns."""
        return ["output", "state or lse", *(f"gradient of {name}" for name in self.leaves)]

    def in_dtype(self, dtype: torch.dtype, **options: Any) -> "Case":
        """The same case on the same numbers in another dtype, its gradients driven by the same numbers."""
        leaves = {name: leaf.detach().to(dtype) for name, leaf in self.leaves.items()}
        other = replace(self, leaves=leaves, options=self.options | options)
        other._probes = self._probes
        return other


def gates(
    batch: int, length: int, width: int, dtype: torch.dtype, device: torch.device | str = "cuda", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """γ and z̃ = 2 (1 − γ) z [B, T, D]: half-lives log-spaced from 1 to 512 tokens, with a random context."""
    generator = torch.Generator(device).manual_seed(seed)
    logit = torch.logit(0.5 ** (1 / torch.logspace(0, 9, width, base=2, dtype=torch.float64))).float().to(device)
    gamma, z = (torch.empty(batch, length, width, dtype=dtype, device=device) for _ in range(2))
    for first in range(0, length, PIECE):
        piece = slice(first, min(first + PIECE, length))
        shape = (batch, piece.stop - piece.start, width)
        context = torch.randn(shape, generator=generator, device=device)
        gamma[:, piece] = torch.sigmoid(logit + context)
        z[:, piece] = 2 * torch.sigmoid(-logit - context) * torch.randn(shape, generator=generator, device=device)
    return gamma, z


def gate_weight(heads: int, width: int, dtype: torch.dtype, device: torch.device | str = "cuda") -> Tensor:
    """W with standard deviation 1/√fan_in: [H, d, d], or [D, D] for 0 heads."""
    generator = torch.Generator(device).manual_seed(7)
    shape = (heads, width // heads, width // heads) if heads else (width, width)
    return (torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5).to(dtype)


def _normed(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random vectors [..., n, H, d], RMS-normalised per head; made in pieces along dim 1."""
    out = torch.empty(shape, dtype=dtype, device=generator.device)
    for first in range(0, shape[1], PIECE):
        piece = out[:, first : first + PIECE]
        raw = torch.randn(piece.shape, generator=generator, device=generator.device)
        piece.copy_(F.rms_norm(raw, (shape[-1],)))
    return out


def segment_rule(length: int, device: torch.device | str = "cuda") -> dict[str, Tensor]:
    """Stamps of the slots and what each token of a chunk sees of them, in the middle of one long document, for B = 1.

    The ring holds the document's last `SLOTS` segments and goes round at an odd place; ⌈T/S⌉ new slots follow it.
    """
    position = CARRIED + torch.arange(length, device=device)
    written = CARRIED // SEGMENT
    before = position // SEGMENT - written
    ring = (torch.arange(SLOTS, device=device) - written) % SLOTS
    new = torch.arange(SLOTS, SLOTS + (length + SEGMENT - 1) // SEGMENT, device=device)
    stop = SLOTS + before
    return {
        "slot_stamp": torch.cat([ring, new]).unsqueeze(0),
        "slot_start": (stop - (position // SEGMENT).clamp_max(SLOTS)).unsqueeze(0),
        "slot_stop": stop.unsqueeze(0),
        "window_start": torch.zeros(1, length, dtype=torch.int64, device=device),
    }


def memory_inputs(
    length: int, heads: int, dtype: torch.dtype, device: torch.device | str = "cuda"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and options of `memory_attention` for one chunk of a lane (B = 1), with the model's strides."""
    generator = torch.Generator(device).manual_seed(3)
    options: dict[str, Any] = segment_rule(length, device) | {"window": WINDOW}
    keys, banks = options["slot_stamp"].shape[1], min(BANKS, heads)

    def tokens(count: int) -> Tensor:  # [1, H, n, d], a view of [1, n, H·d]
        return _normed((1, count, heads, HEAD_DIM), generator, dtype).transpose(1, 2)

    def slots() -> Tensor:  # [1, R, K, E]
        return tokens(keys).unflatten(1, (banks, -1)).transpose(2, 3).flatten(3).contiguous()

    tensors = {
        "q": tokens(length),
        "slots_k": slots(),
        "slots_v": slots(),
        "window_k": tokens(WINDOW + length),
        "window_v": tokens(WINDOW + length),
        "null_k": torch.randn(heads, HEAD_DIM, generator=generator, device=device).to(dtype) / 10,
        "null_v": torch.randn(heads, HEAD_DIM, generator=generator, device=device).to(dtype) / 10,
    }
    return tensors, options


def by_head(banks: Tensor) -> Tensor:
    """Slots [B, R, K, E] as [B, H, K, d]."""
    return banks.unflatten(-1, (-1, HEAD_DIM)).transpose(2, 3).flatten(1, 2)

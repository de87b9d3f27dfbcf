"""What scans over time share when they are split over the programs of one Triton launch.

A program takes a tile of `STEPS` consecutive tokens by some channels. Each thread walks the tokens of its own channels
one after another, so threads exchange nothing (`register_tiles`). For its tile a program

1. walks the tokens to get what the tile does to the state that enters it, h ↦ decay · h + state, and publishes that;
2. looks back for the state that enters the tile (`look_back`);
3. walks the tokens again, which are in registers, and writes the states.

So every input is read from device memory once. Tiles form groups of `GROUP`, groups form supergroups of `GROUP`
groups. The last tile of a group publishes what the whole group does, the last tile of a supergroup the state that
leaves it. A tile combines the earlier tiles of its group, the earlier groups of its supergroup and the state that left
the supergroup before. So only one tile in GROUP² stands in a chain, and what is added to what depends on nothing but
the number of tokens.

Tiles are taken by ticket, in the order of the scan: whatever a program waits for belongs to a program that has started.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.checks import cdiv
from mmrec_kernels.handoff import received, send

WARPS = 2  # of a program
CHANNELS = 32  # of a tile, per warp; of 16-bit inputs twice as many
STEPS = 64  # tokens of a tile
GROUP = 5


def handoff_size(length: int, states: int, steps: int) -> int:
    """How many int32 words the tiles of a scan talk through; the first 4 are for the ticket counter. Zero at first.

    Args:
        length: Tokens.
        states: Number of states that are scanned, B · D.
        steps: Tokens of a tile.
    """
    tiles = cdiv(length, steps)
    groups = cdiv(tiles, GROUP)
    supergroups = cdiv(groups, GROUP)
    return 4 + (2 * tiles + 2 * groups + supergroups) * states


@triton.jit
def _load_pairs(place, states, count, mask, GROUP: tl.constexpr):
    """Words of the decay and the state of `count` < GROUP consecutive tiles or groups; −1 beyond them."""
    words = ()
    for i in tl.static_range(GROUP - 1):
        there = mask & (i < count)
        words += (tl.load(place + 2 * i * states, there, other=-1, volatile=True),)  # type: ignore[assignment]
        words += (tl.load(place + (2 * i + 1) * states, there, other=-1, volatile=True),)  # type: ignore[assignment]
    return words


@triton.jit
def _all_there(words):
    there = words[0] != 0
    for i in tl.static_range(1, len(words)):
        there = there & (words[i] != 0)
    return tl.min(there.to(tl.int32)) != 0


@triton.jit
def _combine(words, count, GROUP: tl.constexpr):
    """What `count` consecutive tiles or groups do one after another: decay and state."""
    decay = tl.full(words[0].shape, 1.0, tl.float32)
    state = tl.zeros(words[0].shape, tl.float32)
    for i in tl.static_range(GROUP - 1):
        if i < count:
            factor = received(words[2 * i])
            decay = factor * decay
            state = factor * state + received(words[2 * i + 1])
    return decay, state


@triton.jit
def publish_tile(words, states, chunk, index, mask, decay, state):
    """Tells what a tile does to the states that enter it.

    Args:
        words: As many as `handoff_size` says, without the counter.
        states: Number of states that are scanned, B · D (int64).
        chunk: Number of the tile in the order of the scan.
        index: Which of the `states` the tile is about, int tensor of any shape; and their mask.
        decay, state: fp32, of that shape.
    """
    place = words + 2 * chunk.to(tl.int64) * states + index
    send(place, decay, mask)
    send(place + states, state, mask)


@triton.jit
def look_back(words, states, chunk, chunks, index, mask, decay, state, initial, GROUP: tl.constexpr):
    """The states that enter a tile, fp32. The tile must have been published.

    Args:
        chunks: Number of tiles along time.
        initial: States that enter the first tile, fp32.
        words, states, chunk, index, mask, decay, state: As in `publish_tile`.
    """
    group = chunk // GROUP
    above = group // GROUP
    tile_count = chunk % GROUP
    group_count = group % GROUP
    tile_place = words + 2 * (group * GROUP).to(tl.int64) * states + index
    words += 2 * chunks.to(tl.int64) * states
    group_place = words + 2 * (above * GROUP).to(tl.int64) * states + index
    above_place = words + (2 * tl.cdiv(chunks, GROUP) + above).to(tl.int64) * states + index

    # everything is asked for at once, since most of it has been there for long
    tile_pairs = _load_pairs(tile_place, states, tile_count, mask, GROUP)
    group_pairs = _load_pairs(group_place, states, group_count, mask, GROUP)
    entering = tl.load(above_place - states, mask & (above > 0), other=-1, volatile=True)

    while not _all_there(tile_pairs):
        tile_pairs = _load_pairs(tile_place, states, tile_count, mask, GROUP)
    before_decay, before_state = _combine(tile_pairs, tile_count, GROUP)
    group_decay = decay * before_decay
    group_state = decay * before_state + state
    if tile_count == GROUP - 1:
        send(group_place + 2 * group_count * states, group_decay, mask)
        send(group_place + (2 * group_count + 1) * states, group_state, mask)

    while not _all_there(group_pairs):
        group_pairs = _load_pairs(group_place, states, group_count, mask, GROUP)
    groups_decay, groups_state = _combine(group_pairs, group_count, GROUP)
    while not _all_there((entering,)):
        entering = tl.load(above_place - states, mask & (above > 0), other=-1, volatile=True)
    start = tl.where(above > 0, received(entering), initial)
    start = groups_decay * start + groups_state
    if (tile_count == GROUP - 1) & (group_count == GROUP - 1):
        send(above_place, group_decay * start + group_state, mask)
    return before_decay * start + before_state


@triton.jit
def tile_of_ticket(ticket, batch, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """A ticket's tile: its number in the order of the scan, sequence (int64), channels [BLOCK_D], and their mask."""
    blocks: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    chunk = ticket // (batch * blocks)
    column = ticket % (batch * blocks)
    channel = column % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return chunk, (column // blocks).to(tl.int64), channel, channel < WIDTH


@triton.jit
def first_token(chunk, length, STEP: tl.constexpr, STEPS: tl.constexpr):
    """The token (int64) of a tile that the scan comes to first; STEP is −1 if it goes from the last one to token 0."""
    return (chunk * STEPS if STEP > 0 else length - 1 - chunk * STEPS).to(tl.int64)


@triton.jit
def tile_mask(rows, channels, WHOLE: tl.constexpr):
    """Mask of a tile's elements, from those of its rows and channels. WHOLE: tiles fill the tensors."""
    return tl.full((rows.shape[0], 1), True, tl.int1) if WHOLE else rows[:, None] & channels[None, :]


@triton.jit
def _places(base, first, channel, TIME: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr):
    return base + (first * TIME + channel)[None, :] + (tl.arange(0, ROWS) * (STEP * TIME)).to(tl.int64)[:, None]


@triton.jit
def load_tile(
    base, first, channel, TIME: tl.constexpr, STEP: tl.constexpr, mask, other: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Elements [ROWS, channels] of a sequence whose tokens are TIME elements apart, of tokens first, first + STEP, …"""
    return tl.load(_places(base, first, channel, TIME, STEP, ROWS), mask, other=other)


@triton.jit
def store_tile(base, first, channel, TIME: tl.constexpr, STEP: tl.constexpr, mask, value):
    """The reverse of `load_tile`."""
    tl.store(_places(base, first, channel, TIME, STEP, value.shape[0]), value, mask)


def readable(x: Tensor) -> Tensor:
    """x itself if its channels are next to each other, else a copy in which they are.

    Offsets within a tile are 32-bit, so its tokens may not be too far apart either.
    """
    return x if x.stride(2) == 1 and x.stride(1) * STEPS < 2**31 else x.contiguous()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the one that kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(kernel: Any, batch: int, length: int, width: int, device: torch.device, **arguments: Any) -> None:
    """Runs a kernel on the tiles of [B, T, D] inputs, a program for each.

    Args:
        arguments: The kernel's own; those that every kernel of this kind has are added here.
    """
    # a register holds two 16-bit channels or one of fp32
    wide = any(isinstance(x, Tensor) and x.dim() == 3 and x.element_size() > 2 for x in arguments.values())
    vector = 1 if wide else 2
    block_d = WARPS * CHANNELS * vector
    with on_device(device):
        kernel[(cdiv(length, STEPS) * batch * cdiv(width, block_d),)](
            **arguments,
            words=torch.zeros(handoff_size(length, batch * width, STEPS), dtype=torch.int32, device=device),
            batch=batch,
            length=length,
            shift=0,
            WIDTH=width,
            WHOLE=length % STEPS == 0 and width % block_d == 0,
            VECTOR=vector,
            BLOCK_D=block_d,
            STEPS=STEPS,
            GROUP=GROUP,
            num_warps=WARPS,
        )

"""What a model costs: parameters, floating-point operations, bytes. Plain arithmetic on the configuration.

`flops_per_token` is the count behind the reported MFU (model FLOPs utilisation, Chowdhery et al. 2022, appendix B):
what the model's mathematics needs once. Repeated work (activation recomputation, further solver iterations) is
deliberately not counted, so that it shows as lost utilisation.
"""

from typing import NamedTuple

from mmrec_kernels.attention import PAGE
from mmrec_kernels.hierarchy import COARSE
from mmrec_train.model.configuration import MMRecConfig


class SlotRead(NamedTuple):
    """What a token reads of a full ring: pages it selects, slots it attends, averages of slots it only scores."""

    pages: int
    attended: int
    scored: int


def slot_read(config: MMRecConfig) -> SlotRead:
    slots, blocks = config.memory_slots, config.topk_blocks
    if config.read == "dense":
        return SlotRead(pages=0, attended=slots, scored=0)
    in_all, coarse = -(-slots // PAGE), -(-slots // COARSE)
    below = min(in_all, COARSE // PAGE * min(blocks, coarse))
    pages = min(blocks, below)
    return SlotRead(pages, attended=min(slots, PAGE * pages), scored=coarse + below)


def _block_matrices(config: MMRecConfig) -> int:
    """Weights of one block that enter a matrix product: 10 D² of the mixer, the gate, 3 D·F of the feed-forward."""
    d, heads = config.hidden_dim, config.num_heads
    gate = {"dense": d * d, "headwise": d * d // heads, "none": 0}[config.gate]
    return 10 * d * d + gate + 3 * d * config.ffn_dim + config.num_memories * d


def parameter_count(config: MMRecConfig) -> int:
    """Number of parameters, shared ones once."""
    d = config.hidden_dim
    # b_γ, b_c, β, null key and value, three RMSNorm gains of width D; two of width d; α
    vectors = 8 * d + 2 * config.head_dim + 1
    embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    return config.num_layers * (_block_matrices(config) + vectors) + embeddings + d


def flops_per_token(config: MMRecConfig) -> float:
    """Floating-point operations of one training token: forward plus backward, which is three times the forward.

    6 for each weight that enters a matrix product (the output head counts, the embedding look-up does not), and
    12·D for each key a token attends: the slots that `read` gives it and W tokens, all full (the steady state of a long
    document). Averages of slots that it only scores count 2·D: selecting has no gradient.
    """
    matrices = config.num_layers * _block_matrices(config) + config.vocab_size * config.hidden_dim
    read = slot_read(config)
    a_channel = 12.0 * (read.attended + config.short_window) + 2.0 * read.scored
    return 6.0 * matrices + config.num_layers * config.hidden_dim * a_channel


def state_bytes(config: MMRecConfig, batch: int, bytes_per_element: int) -> int:
    """Bytes of the memory states of all layers for `batch` lanes.

    Slots, their averages and the window have `bytes_per_element`; h and the sums of the unfinished segment are fp32,
    the counters int64.
    """
    d, r, slots = config.hidden_dim, config.num_memories, config.memory_slots
    averages = -(-slots // PAGE) - (-slots // COARSE) if config.read == "topk" else 0
    banks = (2 * (slots + config.short_window) + averages) * d * bytes_per_element
    sums = 4 * (d + 2 * d + 2 * r)
    return batch * config.num_layers * (banks + sums + 3 * 8)


def activation_bytes(
    config: MMRecConfig,
    micro_batch_size: int,
    chunk_len: int,
    checkpointing: str | int,
    bytes_per_element: int,
) -> int:
    """Estimated bytes of activations at the peak of a training step.

    A block without checkpointing keeps about 20 D + 3 F values a token in compute precision and 17 D in fp32 (gates,
    inputs, states and reads), which is within 5 % of the peaks measured for `350m` with 2 and 4 lanes of 8192 tokens;
    with a `topk` read also the numbers of the pages of each head. A checkpointed block keeps its input and output
    state only. The peak adds one block being recomputed and the slice of logits the loss works on.
    """
    tokens = micro_batch_size * chunk_len
    d, f = config.hidden_dim, config.ffn_dim
    pages = slot_read(config).pages * config.num_heads * 8
    kept = tokens * ((20 * d + 3 * f) * bytes_per_element + 17 * d * 4 + pages)
    boundary = (
        tokens * d * bytes_per_element + state_bytes(config, micro_batch_size, bytes_per_element) // config.num_layers
    )
    every = (
        {"none": 0, "full": 1}.get(checkpointing, checkpointing) if isinstance(checkpointing, str) else checkpointing
    )
    checkpointed = config.num_layers // int(every) if every else 0
    logits = 3 * min(tokens, LOSS_SLICE_TOKENS) * config.vocab_size * 4
    blocks = (config.num_layers - checkpointed) * kept + checkpointed * boundary + (kept if checkpointed else 0)
    return blocks + tokens * d * bytes_per_element + logits


LOSS_SLICE_TOKENS = 2048  # tokens whose logits exist at one time while the loss is computed

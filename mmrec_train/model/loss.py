"""Next-token cross-entropy that never holds the logits of more than a slice of the tokens."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmrec_kernels import compute_dtype
from mmrec_train.model.accounting import LOSS_SLICE_TOKENS

IGNORE_INDEX = -100


def sliced_cross_entropy(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies, in nats and fp32 (fp64 for fp64), and the number of labels that count.

    Args:
        hidden: Final hidden states [B, T, D].
        labels: The token that follows each [B, T], int64; `IGNORE_INDEX` counts for nothing.
        head: Hidden states [n, D] → logits [n, V]. Called once a slice, and again in the backward pass: the logits of
            a slice are recomputed there rather than kept.
    """

    dtype = compute_dtype(hidden.dtype)

    def slice_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).to(dtype), labels, ignore_index=IGNORE_INDEX, reduction="sum")

    total = hidden.new_zeros((), dtype=dtype)
    slices = zip(hidden.flatten(0, 1).split(LOSS_SLICE_TOKENS), labels.flatten().split(LOSS_SLICE_TOKENS), strict=True)
    for hidden_slice, label_slice in slices:
        if torch.is_grad_enabled():
            total = total + checkpoint(slice_loss, hidden_slice, label_slice, use_reentrant=False)
        else:
            total = total + slice_loss(hidden_slice, label_slice)
    return total, (labels != IGNORE_INDEX).sum()

"""Next-token cross-entropy that never holds the logits of more than a slice of the tokens."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmrec_kernels import compute_dtype
from mmrec_train.model.accounting import LOSS_SLICE_TOKENS

IGNORE_INDEX = -100


def sliced_cross_entropy(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Cross-entropy of each token [B, T], in nats and fp32 (fp64 for fp64); 0 where the label counts for nothing.

    Args:
        hidden: Final hidden states [B, T, D].
        labels: The token that follows each [B, T], int64; `IGNORE_INDEX` counts for nothing.
        head: Hidden states [n, D] → logits [n, V]. Called once a slice, and again in the backward pass: the logits of
            a slice are recomputed there rather than kept.
    """

    def slice_losses(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden).to(compute_dtype(hidden.dtype))
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")

    losses = []
    slices = zip(hidden.flatten(0, 1).split(LOSS_SLICE_TOKENS), labels.flatten().split(LOSS_SLICE_TOKENS), strict=True)
    for hidden_slice, label_slice in slices:
        if torch.is_grad_enabled():
            losses.append(checkpoint(slice_losses, hidden_slice, label_slice, use_reentrant=False))
        else:
            losses.append(slice_losses(hidden_slice, label_slice))
    return torch.cat(losses).view_as(labels)

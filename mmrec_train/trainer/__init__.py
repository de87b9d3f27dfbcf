"""Training under DeepSpeed."""

from mmrec_train.trainer.trainer import Outcome, Trainer

__all__ = ["Outcome", "Trainer"]

"""Pretraining of MM-Rec, a language model with a gated nonlinear recurrence and slot memories, under DeepSpeed."""

__version__ = "0.1.0"

"""Tokenizers that take text for text."""

from tokenizers import Tokenizer


def only_text(backend: Tokenizer) -> Tokenizer:
    """Set a tokenizer to encode whole texts as nothing but text: one that spells a special token must not end there."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend

"""Shape and behaviour of an MM-Rec model, and the named sizes that ship with it."""

from typing import Any, ClassVar, Literal, Self

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=4096, hidden_dim=192, num_layers=4, num_heads=4, num_memories=2, ffn_dim=512,
        memory_slots=64, segment_len=16, short_window=64, max_seq_len=4096, tie_word_embeddings=True,
    ),
    "125m": dict(hidden_dim=768, num_layers=9, num_heads=12, num_memories=4, ffn_dim=2048, tie_word_embeddings=True),
    "350m": dict(hidden_dim=1024, num_layers=16, num_heads=16, num_memories=8, ffn_dim=2816, tie_word_embeddings=True),
    "1b": dict(hidden_dim=2048, num_layers=12, num_heads=16, num_memories=8, ffn_dim=5632, tie_word_embeddings=True),
    "7b": dict(hidden_dim=4096, num_layers=24, num_heads=32, num_memories=8, ffn_dim=11008),
}  # fmt: skip


@strict
class MMRecConfig(PreTrainedConfig):
    """Configuration of an MM-Rec model; the defaults are those of `7b`.

    Args:
        vocab_size: Entries of the embedding and of the output head.
        hidden_dim: Width of the residual stream, D.
        num_layers: Blocks, L.
        num_heads: Heads of the memory read and blocks of a headwise gate, H; head_dim d = D / H.
        num_memories: Memory banks, R; each holds keys and values of width E = D / R. Head i reads bank i·R // H.
        memory_slots: Slots of the ring of each bank, M.
        segment_len: Tokens pooled into one slot, S.
        short_window: Tokens of the short-term bank that a token sees, itself included, W; 0 turns the bank off.
        ffn_dim: Inner width of the SwiGLU feed-forward.
        max_seq_len: Longest sequence the model is meant for; nothing in the model is sized by it.
        gate: W_g of the recurrence: a [D, D] matrix (`dense`), block-diagonal by head (`headwise`) or none, which sets
            the gate to ½ (a linear recurrence, for ablation).
        decay_half_life: Half-lives in tokens of the first and the last channel at initialisation, log-spaced between.
        decay_init: One γ for all channels at initialisation, instead of `decay_half_life`.
        dropout: Dropout on the output of the mixer, while training.
        read: `dense` attends every slot a token may see; `topk` finds the pages of 4 slots worth reading through
            averages of slots (HDS) and attends only these.
        topk_blocks: With `topk`: nodes of 16 slots that a head descends into for a token, and pages it reads then.
        memory_across_documents: Keep the slots of earlier documents of the lane visible (nothing else crosses).
        rope_theta: Base of the rotary positions of the short-term bank.
        norm_eps: Epsilon of every RMSNorm.
        initializer_range: Standard deviation of the initial weights (all but W_g, which has 1/√fan_in).
        solver_tolerance: Largest change, relative to the state's scale, at which the fixed-point iteration stops.
            None: 1e-6 with fp32 weights, 1e-3 with 16-bit ones (their operands' rounding is 4e-4).
        solver_max_iterations: Iterations before the rest is computed token by token.
    """

    model_type = "mmrec"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["memory_states"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_dim",
        "max_position_embeddings": "max_seq_len",
    }

    vocab_size: int = 32000
    hidden_dim: int = 4096
    num_layers: int = 24
    num_heads: int = 32
    num_memories: int = 8
    memory_slots: int = 1024
    segment_len: int = 64
    short_window: int = 512
    ffn_dim: int = 11008
    max_seq_len: int = 32768
    gate: Literal["dense", "headwise", "none"] = "dense"
    decay_half_life: list[float] | tuple[float, ...] = (1.0, 512.0)
    decay_init: float | None = None
    dropout: float = 0.0
    read: Literal["dense", "topk"] = "dense"
    topk_blocks: int = 16
    memory_across_documents: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    solver_tolerance: float | None = None
    solver_max_iterations: int = 32
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def validate_architecture(self) -> None:
        """Raises ValueError for shapes and values that cannot work; called by the base class on construction."""
        positive = (
            "vocab_size hidden_dim num_layers num_heads num_memories memory_slots segment_len ffn_dim max_seq_len"
        )
        for name in [*positive.split(), "topk_blocks", "solver_max_iterations"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.short_window < 0:
            raise ValueError(f"short_window is {self.short_window}; it must be 0 (off) or positive")
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not divisible by num_heads {self.num_heads}")
        if self.num_heads % self.num_memories:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_memories {self.num_memories}")
        if self.short_window and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions of the short window need it even")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        if self.decay_init is not None and not 0.0 < self.decay_init < 1.0:
            raise ValueError(f"decay_init is {self.decay_init}; it must lie in (0, 1)")
        if len(self.decay_half_life) != 2 or not 0.0 < self.decay_half_life[0] <= self.decay_half_life[1]:
            raise ValueError(f"decay_half_life is {self.decay_half_life}; it must be [shortest, longest], in tokens")
        if self.solver_tolerance is not None and self.solver_tolerance <= 0.0:
            raise ValueError(f"solver_tolerance is {self.solver_tolerance}; it must be positive")

    @property
    def head_dim(self) -> int:
        return self.hidden_dim // self.num_heads

    @property
    def mem_dim(self) -> int:
        return self.hidden_dim // self.num_memories

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """The named size (a key of `PRESETS`) with some values replaced.

        Raises ValueError on an unknown name and on shapes and values that cannot work.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        try:
            return cls(**(PRESETS[name] | overrides))
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

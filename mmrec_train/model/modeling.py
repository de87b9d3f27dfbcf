"""MM-Rec behind the Hugging Face interfaces: `MMRecModel` and `MMRecForCausalLM`."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from mmrec_train.model.block import Decay, MMRecBlock, Recurrence, SolverReport
from mmrec_train.model.chunking import chunk_bounds
from mmrec_train.model.configuration import MMRecConfig
from mmrec_train.model.loss import IGNORE_INDEX, sliced_cross_entropy
from mmrec_train.model.memory import ChunkPlan, MemoryState, SlotMemory


@dataclass
class MMRecModelOutput(ModelOutput):
    """Output of `MMRecModel`.

    Attributes:
        last_hidden_state: [B, T, D], after the final norm.
        memory_states: One `MemoryState` per layer, after the last token.
        solver_iterations: [L, B], mean over the chunks, fp32.
        solver_residual: [L, B], largest over the chunks, fp32.
    """

    last_hidden_state: Tensor | None = None
    memory_states: tuple[MemoryState, ...] | None = None
    solver_iterations: Tensor | None = None
    solver_residual: Tensor | None = None


@dataclass
class MMRecCausalLMOutput(ModelOutput):
    """Output of `MMRecForCausalLM`: `loss` in nats (the mean over the labels that count, or [B, T]), `logits` [B, n, V]
    and the rest as in `MMRecModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory_states: tuple[MemoryState, ...] | None = None
    solver_iterations: Tensor | None = None
    solver_residual: Tensor | None = None


class MMRecPreTrainedModel(PreTrainedModel):
    config_class = MMRecConfig
    base_model_prefix = "model"
    _no_split_modules = ["MMRecBlock"]  # noqa: RUF012  (the base class reads it as a plain class attribute)
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Recurrence):
            module.init_weight()
        elif isinstance(module, Decay):
            module.init_biases()
        elif isinstance(module, SlotMemory):
            for parameter in (module.pool_score, module.null_k, module.null_v, module.output_gain):
                nn.init.zeros_(parameter)


def document_starts(sequence: Tensor, reset: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Which tokens of a sequence [B, T, …] start a document, [B, T] bool: those of `reset`, and the first real token
    of each row of a left-padded mask [B, ≥ T], whose last T columns belong to the sequence."""
    batch, length = sequence.shape[:2]
    if reset is None:
        reset = torch.zeros(batch, length, dtype=torch.bool, device=sequence.device)
    if attention_mask is None:
        return reset
    mask = attention_mask.bool()
    before = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
    return reset | (mask & ~before)[:, -length:]


def _sequence(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if input_ids is not None and inputs_embeds is None:
        return input_ids
    if inputs_embeds is not None and input_ids is None:
        return inputs_embeds
    raise ValueError("give either input_ids or inputs_embeds")


class MMRecModel(MMRecPreTrainedModel):
    """The stack of blocks: token ids or embeddings to hidden states, chunk by chunk, with memories carried along.

    `checkpoint_every` k > 0 recomputes the activations of every k-th block in the backward pass instead of keeping
    them (0: none, 1: all).
    """

    def __init__(self, config: MMRecConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.layers = nn.ModuleList(MMRecBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_dim, eps=config.norm_eps)
        self.checkpoint_every = 0
        self.post_init()

    def empty_memory(self, batch: int, device: torch.device | str | None = None) -> tuple[MemoryState, ...]:
        """The memories of `batch` rows before any token, one `MemoryState` a layer; on the model's device if None."""
        device = self.device if device is None else device
        return tuple(MemoryState.empty(self.config, batch, self.dtype, device) for _ in self.layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        memory_states: tuple[MemoryState, ...] | None = None,
        reset: Tensor | None = None,
        chunk_size: int | str | None = None,
        **_: Any,
    ) -> MMRecModelOutput:
        """Runs a sequence through the blocks.

        Args:
            input_ids: [B, T] int64, or `inputs_embeds` [B, T, D].
            attention_mask: [B, ≥ T], 0 on left padding: the first real token of a row starts a document.
            memory_states: What the rows remember, from an earlier call or `empty_memory`; None for nothing.
            reset: [B, T] bool, the first tokens of documents: they and what follows see nothing of what came before.
            chunk_size: See `chunk_bounds`. Results do not depend on it.
        """
        sequence = _sequence(input_ids, inputs_embeds)
        batch, length = sequence.shape[:2]
        states = self.empty_memory(batch, sequence.device) if memory_states is None else tuple(memory_states)
        reset = document_starts(sequence, reset, attention_mask)
        hidden, iterations, residuals = [], [], []
        # no weight is touched here outside its own module: ZeRO-3 would take it for one of this module's
        where = dict(batch=batch, device=sequence.device, dtype=self.dtype)
        for chunk in chunk_bounds(length, chunk_size, self.config, **where):
            x = sequence[:, chunk] if input_ids is None else self.embed_tokens(sequence[:, chunk])
            x, states, reports = self._chunk(x, states, reset[:, chunk])
            hidden.append(self.norm(x))
            iterations.append(torch.stack([r.iterations for r in reports]).float())
            residuals.append(torch.stack([r.residual for r in reports]))
        return MMRecModelOutput(
            last_hidden_state=hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1),
            memory_states=states,
            solver_iterations=torch.stack(iterations).mean(0),
            solver_residual=torch.stack(residuals).amax(0),
        )

    def _chunk(
        self, x: Tensor, states: tuple[MemoryState, ...], reset: Tensor
    ) -> tuple[Tensor, tuple[MemoryState, ...], list[SolverReport]]:
        plan = ChunkPlan.of(self.config, states[0], reset)
        after, reports = [], []
        for index, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            if self.checkpoint_every and index % self.checkpoint_every == 0 and torch.is_grad_enabled():
                x, state, report = checkpoint(layer, x, state, plan, use_reentrant=False)
            else:
                x, state, report = layer(x, state, plan)
            after.append(state)
            reports.append(report)
        return x, tuple(after), reports


class MMRecForCausalLM(MMRecPreTrainedModel, GenerationMixin):
    """MM-Rec with a language-model head. Generation carries the memories: constant state and time per token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (as above)

    def __init__(self, config: MMRecConfig):
        super().__init__(config)
        self.model = MMRecModel(config)
        self.lm_head = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        memory_states: tuple[MemoryState, ...] | None = None,
        reset: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        chunk_size: int | str | None = None,
        logits_to_keep: int | None = None,
        use_cache: bool | None = None,
        loss_reduction: Literal["mean", "none"] = "mean",
        **_: Any,
    ) -> MMRecCausalLMOutput:
        """Logits, loss or both; arguments not named here are those of `MMRecModel.forward`.

        Args:
            labels: [B, T], the input ids themselves (they are shifted here, the last one predicts nothing).
            shift_labels: [B, T], the token that follows each input token; −100 counts for nothing.
            logits_to_keep: Logits of this many last tokens are returned, 0 for all. None: all without labels; none
                in training with labels, where [T, V] logits never exist (the loss works slice by slice).
            loss_reduction: What `loss` is: the mean over the labels that count (0 if none does), or ("none") the loss
                of each token [B, T] in fp32, 0 where the label counts for nothing.
        """
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f'loss_reduction is {loss_reduction!r}; it must be "mean" or "none"')
        sequence = _sequence(input_ids, inputs_embeds)
        batch, length = sequence.shape[:2]
        if labels is not None:
            if shift_labels is not None:
                raise ValueError("give either labels or shift_labels")
            shift_labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)
        if logits_to_keep is None:
            kept = 0 if shift_labels is not None and self.training else length
        else:
            kept = logits_to_keep or length
        reset = document_starts(sequence, reset, attention_mask)

        losses, logits, iterations, residuals = [], [], [], []
        states = memory_states
        where = dict(batch=batch, device=sequence.device, dtype=self.dtype)
        for chunk in chunk_bounds(length, chunk_size, self.config, **where):
            size = chunk.stop - chunk.start
            output = self.model(
                input_ids=None if input_ids is None else input_ids[:, chunk],
                inputs_embeds=None if inputs_embeds is None else inputs_embeds[:, chunk],
                memory_states=states,
                reset=reset[:, chunk],
                chunk_size=size,
            )
            states = output.memory_states
            iterations.append(output.solver_iterations)
            residuals.append(output.solver_residual)
            if shift_labels is not None:
                losses.append(sliced_cross_entropy(output.last_hidden_state, shift_labels[:, chunk], self.lm_head))
            wanted = min(size, kept - (length - chunk.stop))
            if wanted > 0:
                logits.append(self.lm_head(output.last_hidden_state[:, -wanted:]))
        loss = torch.cat(losses, dim=1) if losses else None
        if loss is not None and shift_labels is not None and loss_reduction == "mean":
            loss = loss.sum() / (shift_labels != IGNORE_INDEX).sum().clamp_min(1)
        return MMRecCausalLMOutput(
            loss=loss,
            logits=torch.cat(logits, dim=1) if logits else None,
            memory_states=None if use_cache is False else states,
            solver_iterations=torch.stack(iterations).mean(0),
            solver_residual=torch.stack(residuals).amax(0),
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        memory_states: tuple[MemoryState, ...] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The prompt at first; then only the newest token, which the memories go before."""
        inputs: dict[str, Any] = {"logits_to_keep": logits_to_keep, "use_cache": True}
        if memory_states is not None:
            return inputs | {"input_ids": input_ids[:, -1:], "memory_states": memory_states}
        prompt = {"inputs_embeds": inputs_embeds} if inputs_embeds is not None else {"input_ids": input_ids}
        return inputs | prompt | {"attention_mask": attention_mask}

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        return model_kwargs | {"memory_states": outputs.memory_states}

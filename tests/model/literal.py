"""MM-Rec token by token, written from the formulas: plain lists for memories, one document after another, any dtype.

Slow, differentiable by autograd; the model is tested against it in fp64.
"""

import torch
from torch.nn import functional as F

from mmrec_kernels import reference


def rms_norm(x, gain, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gain


class LayerMemory:
    """Memories of one layer in one row: h, the slots and the tokens of the document, the unfinished segment."""

    def __init__(self, width):
        self.h = torch.zeros(width, dtype=torch.float64)
        self.slots = []  # (key [D], value [D]) of each completed segment
        self.window = []  # (key, value) of each token
        self.segment = []  # (key, value, scores [R]) of each token of the unfinished segment

    def start_document(self, keep_slots):
        slots = self.slots if keep_slots else []
        self.__init__(len(self.h))
        self.slots = slots


def per_head_norm(x, gain, config):
    return rms_norm(x.view(config.num_heads, -1), gain, config.norm_eps).flatten()


def read_slots(q, part, memory, config):
    """The slots a head reads, its part of keys and values: the last M, or those of them in the best pages."""
    visible = memory.slots[-config.memory_slots :]
    if config.read == "topk":
        first = len(memory.slots) - len(visible)
        index = [(first + i) % config.memory_slots for i in range(len(visible))]  # in the ring
        scores = [torch.dot(q[part], key[part]).item() for key, _ in visible]

        def best(size, candidates):
            """Indices in `visible`, of the best nodes of this size among those that have a candidate."""
            nodes = {}
            for i in candidates:
                nodes.setdefault(index[i] // size, []).append(i)
            ranked = sorted(nodes, key=lambda node: (-sum(scores[i] for i in nodes[node]) / len(nodes[node]), node))
            return [i for node in ranked[: config.topk_blocks] for i in nodes[node]]

        visible = [visible[i] for i in best(4, best(16, range(len(visible))))]
    return [(key[part], value[part]) for key, value in visible]


def layer_step(layer, x, memory, config):
    """One token x [D] through one block; changes memory."""
    mixer = layer.mixer
    heads, d = config.num_heads, config.head_dim
    y = rms_norm(x, layer.mixer_norm.weight, config.norm_eps)
    q, k, v, z = (mixer.qkvz_proj.weight @ y).chunk(4)
    decay = mixer.decay
    log_gamma = F.logsigmoid(decay.decay_proj.weight @ z + decay.decay_bias)
    log_gamma = log_gamma + F.logsigmoid(decay.context_proj.weight @ k + decay.context_bias)
    gamma = log_gamma.exp().clamp(1e-6, 1 - 1e-6)
    weight = mixer.recurrence.weight
    gate = torch.full_like(z, 0.5) if weight is None else torch.sigmoid(reference.gate_product(memory.h, weight))
    h = 2 * (1 - gamma) * z * gate + gamma * memory.h
    memory.h = h

    normed_h = rms_norm(h, mixer.state_norm.weight, config.norm_eps)
    state_q, state_k, state_v = (mixer.state_proj.weight @ normed_h).chunk(3)
    q, key, value = q + state_q, k + state_k, v + state_v
    slots = mixer.memory
    q = per_head_norm(q, slots.query_norm.weight, config)
    memory.window.append((per_head_norm(key, slots.key_norm.weight, config), value))
    read = []
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        keys, values = [slots.null_k[head]], [slots.null_v[head]]
        for slot_key, slot_value in read_slots(q, part, memory, config):
            keys.append(slot_key)
            values.append(slot_value)
        recent = memory.window[-config.short_window :] if config.short_window else []
        for age, (window_key, window_value) in enumerate(reversed(recent)):
            keys.append(reference.rotate(window_key[part], -age, config.rope_theta))
            values.append(window_value[part])
        read.append(reference.attend_one(q[part], torch.stack(keys), torch.stack(values))[0])
    m = slots.output_gain * torch.cat(read)

    memory.segment.append((key, value, slots.pool_score @ normed_h))
    if len(memory.segment) == config.segment_len:
        keys, values, scores = (torch.stack(parts) for parts in zip(*memory.segment, strict=True))
        weights = torch.softmax(scores, dim=0).repeat_interleave(config.mem_dim, dim=1)  # [S, D]
        pooled_key = per_head_norm((weights * keys).sum(0), slots.key_norm.weight, config)
        memory.slots.append((pooled_key, (weights * values).sum(0)))
        memory.segment = []

    x = x + mixer.out_proj.weight @ (h + m + mixer.value_gain * v)
    y = rms_norm(x, layer.ffn_norm.weight, config.norm_eps)
    gate, up = (layer.ffn.gate_up_proj.weight @ y).chunk(2)
    return x + layer.ffn.down_proj.weight @ (F.silu(gate) * up)


def logits(model, input_ids, reset):
    """Logits [B, T, V] of an fp64 `MMRecForCausalLM`; reset [B, T]."""
    config = model.config
    rows = []
    for ids, starts in zip(input_ids.tolist(), reset.tolist(), strict=True):
        memories = [LayerMemory(config.hidden_dim) for _ in model.model.layers]
        row = []
        for token, start in zip(ids, starts, strict=True):
            x = model.model.embed_tokens.weight[token]
            for layer, memory in zip(model.model.layers, memories, strict=True):
                if start:
                    memory.start_document(config.memory_across_documents)
                x = layer_step(layer, x, memory, config)
            row.append(model.lm_head.weight @ rms_norm(x, model.model.norm.weight, config.norm_eps))
        rows.append(torch.stack(row))
    return torch.stack(rows)

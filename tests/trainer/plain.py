"""Training without DeepSpeed: what the trainer must come to."""

import functools
import math

import torch

from mmrec_train.config import load_config
from mmrec_train.config.stream import stream_settings, training_data
from mmrec_train.data import LaneLoader
from mmrec_train.model import MMRecForCausalLM

LIMITS = dict(memory=0.005, decay=0.003, gate=0.002)  # as in `write_config`


@functools.cache
def plain_losses(config_path, overrides=()):
    """The loss of each step from a plain loop: one process, all lanes at once, torch's AdamW, no DeepSpeed."""
    config = load_config(config_path, overrides)
    steps, peak = config.train.steps, config.optimizer.learning_rate
    data = training_data(config, verify=False)
    torch.manual_seed(config.train.seed)
    model = MMRecForCausalLM(config.model.to_model_config(data.manifest.vocab_size))
    lanes, chunk_len = config.train.global_batch_size, config.data.chunk_len
    loader = LaneLoader(data, stream_settings(config), num_lanes=lanes, chunk_len=chunk_len, micro_batch_size=lanes)
    decaying = [p for n, p in model.named_parameters() if p.dim() >= 2 and not n.endswith(("null_k", "null_v"))]
    others = [p for p in model.parameters() if not any(p is q for q in decaying)]
    groups = [dict(params=decaying, weight_decay=0.1), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    components = {
        "memory": ("mixer.memory.", "mixer.state_proj.", "mixer.state_norm."),
        "decay": ("mixer.decay.",),
        "gate": ("mixer.recurrence.",),
    }
    states, losses = None, []
    for step in range(steps):
        # linear warm-up over 3 steps, then a cosine from the peak to a tenth of it at the last step
        rate = (step + 1) / 3 if step < 3 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / (steps - 4)))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        (window,) = loader.next_step()
        model.train()
        optimizer.zero_grad()
        loss = 0.0
        for chunk in window.split(chunk_len):
            out = model(chunk.input_ids, shift_labels=chunk.labels, reset=chunk.reset, memory_states=states)
            # every token of the step weighs the same; those without label, after a finite stream's end, weigh nothing
            tokens = (chunk.labels != -100).sum()
            (out.loss * tokens / window.labels.numel()).backward()
            states = [s.detach() for s in out.memory_states]
            loss += out.loss.item() * tokens.item()
        for component, parts in components.items():
            members = [p for n, p in model.named_parameters() if any(part in n for part in parts)]
            assert members
            torch.nn.utils.clip_grad_norm_(members, LIMITS[component])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss / (window.labels != -100).sum().item())
    return losses

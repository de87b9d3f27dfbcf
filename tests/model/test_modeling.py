import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mmrec_train.model import PRESETS, MemoryState, MMRecConfig, MMRecForCausalLM, MMRecModel
from mmrec_train.model.accounting import activation_bytes, flops_per_token, parameter_count, state_bytes
from mmrec_train.model.chunking import chunk_bounds
from tests.model.conftest import SMALL, TOPK, both_reads, random_documents, small_model

NAMED_SIZES = {"125m": 125e6, "350m": 350e6, "1b": 1e9, "7b": 7e9}


@pytest.mark.parametrize("name", NAMED_SIZES)
def test_parameter_count_is_within_15_percent_of_the_name(name):
    config = MMRecConfig.from_preset(name)
    with torch.device("meta"):
        model = MMRecForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == parameter_count(config)
    assert abs(count / NAMED_SIZES[name] - 1) < 0.15


def test_7b_has_the_published_dimensions():
    config = MMRecConfig.from_preset("7b")
    assert (config.vocab_size, config.hidden_dim, config.num_layers, config.num_heads) == (
        32000,
        4096,
        24,
        32,
    )
    assert (config.head_dim, config.num_memories, config.mem_dim, config.memory_slots) == (128, 8, 512, 1024)
    assert (config.ffn_dim, config.max_seq_len, config.segment_len, config.short_window) == (
        11008,
        32768,
        64,
        512,
    )
    assert round(parameter_count(config) / 1e9, 1) == 7.9


@pytest.mark.parametrize("gate", ["dense", "headwise", "none"])
def test_counts_follow_the_model(gate):
    for tied, read in ((True, {}), (False, {}), (False, TOPK)):
        config = MMRecConfig(**SMALL | read, gate=gate, tie_word_embeddings=tied)
        model = MMRecForCausalLM(config)
        assert parameter_count(config) == sum(p.numel() for p in model.parameters())
        states = model.model.empty_memory(3)
        assert state_bytes(config, 3, 4) == sum(t.numel() * t.element_size() for s in states for t in s)


def test_flops_per_token_of_a_hand_counted_model():
    config = MMRecConfig(**SMALL)
    d, f, vocab = 16, 24, 37
    matrices = 2 * (11 * d * d + 3 * d * f + 2 * d) + vocab * d
    assert flops_per_token(config) == 6 * matrices + 12 * 2 * d * (5 + 4)
    one_page = MMRecConfig(**SMALL | TOPK)  # attends 4 of 21 slots; scores 2 averages of 16, and 4 of 4
    assert flops_per_token(one_page) == 6 * matrices + 12 * 2 * d * (4 + 4) + 2 * 2 * d * (2 + 4)
    every_page = MMRecConfig(**SMALL | TOPK | dict(topk_blocks=50))
    assert flops_per_token(every_page) == 6 * matrices + 12 * 2 * d * (21 + 4) + 2 * 2 * d * (2 + 6)


def test_activations_of_topk_are_those_of_dense_and_the_selected_pages():
    config = MMRecConfig(**SMALL | TOPK | dict(topk_blocks=3))
    dense = MMRecConfig(**SMALL | TOPK | dict(read="dense"))
    counted, without = (activation_bytes(c, 2, 100, "none", 4) for c in (config, dense))
    assert counted - without == 2 * (2 * 100) * 3 * 4 * 8  # layers, tokens, pages, heads, bytes


def test_initial_values():
    torch.manual_seed(0)
    config = MMRecConfig(**(SMALL | dict(hidden_dim=256, vocab_size=512, decay_half_life=[1.0, 512.0])))
    mixer = MMRecForCausalLM(config).model.layers[0].mixer
    assert mixer.qkvz_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert mixer.recurrence.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert mixer.value_gain.item() == pytest.approx(0.1)
    assert (mixer.memory.output_gain == 0).all() and (mixer.decay.context_bias == 6).all()
    gamma = torch.sigmoid(mixer.decay.decay_bias.double())
    half_life = math.log(0.5) / gamma.log()
    assert half_life[0].item() == pytest.approx(1, rel=1e-3) and half_life[-1].item() == pytest.approx(512, rel=1e-3)
    assert half_life.log2().diff().std() < 1e-3  # log-spaced
    one_value = MMRecForCausalLM(MMRecConfig(**SMALL, decay_init=0.99)).model.layers[0].mixer.decay
    torch.testing.assert_close(torch.sigmoid(one_value.decay_bias), torch.full((16,), 0.99))


def test_coarse_levels_are_there_for_topk_only():
    sizes = {"dense": (0, 0), "topk": (6, 2)}
    for read, (pages, coarse) in sizes.items():
        model = MMRecForCausalLM(MMRecConfig(**SMALL | TOPK | dict(read=read)))
        (state, _) = model.model.empty_memory(3)
        assert state.pages_k.shape == (3, 2, pages, 8) and state.coarse_k.shape == (3, 2, coarse, 8)
        ids, _ = random_documents(3, 30)
        (after, _) = model(ids, memory_states=model.model.empty_memory(3)).memory_states
        assert [t.shape for t in after] == [t.shape for t in state]
        assert not after.pages_k.requires_grad and after.slots_k.requires_grad
        for level, size in ((after.pages_k, 4), (after.coarse_k, 16)):  # 30 slots of one document: all are of use
            for node in range(level.shape[2]):
                mean = after.slots_k[:, :, size * node : size * node + size].mean(2)
                torch.testing.assert_close(level[:, :, node], mean)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_heads=5, num_memories=1), "not divisible by num_heads"),
        (dict(num_memories=3), "not divisible by num_memories"),
        (dict(gate="sparse"), "gate"),
        (dict(dropout=1.0), "dropout"),
        (dict(decay_half_life=[5.0, 1.0]), "decay_half_life"),
        (dict(segment_len=0), "segment_len"),
        (dict(hidden_dim="wide"), "hidden_dim"),
        (dict(read="sparse"), "read"),
        (dict(read="topk", topk_blocks=0), "topk_blocks is 0; it must be at least 1"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MMRecConfig.from_preset("tiny", **changes)


def test_losses_agree_and_training_keeps_no_logits(model):
    ids, reset = random_documents(2, 30, seed=1)
    expected = F.cross_entropy(model(ids, reset=reset).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    model.train()
    out = model(ids, reset=reset, labels=ids)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    torch.testing.assert_close(model(ids, reset=reset, shift_labels=shifted).loss, expected)
    assert model(ids, labels=ids, logits_to_keep=2).logits.shape == (2, 2, 37)


def test_losses_of_each_token(model, monkeypatch):
    ids, reset = random_documents(2, 30, seed=1)
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    labels[0, 3:9] = -100
    out = model(ids, reset=reset, shift_labels=labels)
    expected = F.cross_entropy(out.logits.mT, labels, ignore_index=-100, reduction="none")
    monkeypatch.setattr("mmrec_train.model.loss.LOSS_SLICE_TOKENS", 7)
    for options in (dict(), dict(chunk_size=11), dict(logits_to_keep=1)):
        with torch.no_grad():
            losses = model(ids, reset=reset, shift_labels=labels, loss_reduction="none", **options).loss
        torch.testing.assert_close(losses, expected)
        assert (losses[labels == -100] == 0).all()
    torch.testing.assert_close(losses.sum() / (labels != -100).sum(), out.loss)
    by_token = model(ids, reset=reset, shift_labels=labels, loss_reduction="none").loss
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(by_token.sum() / (labels != -100).sum(), parameters)
    for a, e in zip(gradients, torch.autograd.grad(out.loss, parameters), strict=True):
        torch.testing.assert_close(a, e)
    nothing = model(ids, shift_labels=torch.full_like(ids, -100)).loss
    assert nothing == 0 and all((g == 0).all() for g in torch.autograd.grad(nothing, parameters))
    assert model.float()(ids, labels=ids, loss_reduction="none").loss.dtype == torch.float32
    assert model.bfloat16()(ids, labels=ids, loss_reduction="none").loss.dtype == torch.float32
    with pytest.raises(ValueError, match="loss_reduction is 'sum'"):
        model(ids, labels=ids, loss_reduction="sum")


def test_loss_slices_change_nothing(model, monkeypatch):
    ids, _ = random_documents(2, 30, seed=2)
    parameters = list(model.parameters())
    whole = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    monkeypatch.setattr("mmrec_train.model.loss.LOSS_SLICE_TOKENS", 7)
    for a, b in zip(torch.autograd.grad(model(ids, labels=ids).loss, parameters), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("every, read", [(1, {}), (2, {}), (1, TOPK)])
def test_activation_checkpointing_changes_no_bit(every, read):
    ids, reset = random_documents(2, 30, seed=3)
    results = []
    for k in (0, every):
        model = small_model(dropout=0.2, **read)
        model.model.checkpoint_every = k
        model.train()
        torch.manual_seed(0)
        loss = model(ids, reset=reset, labels=ids).loss
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_save_load_and_auto_classes(model, tmp_path):
    model = model.float()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["segment_len"] == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, MMRecForCausalLM)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_tied_embeddings_survive_saving(tmp_path):
    model = MMRecForCausalLM(MMRecConfig(**SMALL, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@both_reads
def test_generation_one_token_at_a_time_equals_recomputing_everything(model, monkeypatch):
    ids, _ = random_documents(2, 11, seed=4)
    lengths = []
    forward = MMRecModel.forward

    def spy(self, *args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MMRecModel, "forward", spy)
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert lengths == [11] + [1] * 19
    assert torch.equal(generated, greedy(model, ids, 20))


@both_reads
def test_left_padded_generation_equals_each_prompt_alone(model):
    long, _ = random_documents(1, 13, seed=5)
    short = long[:, :6]
    batch = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.int64), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :7] = 0
    generated = model.generate(batch, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(generated[0, 7:], greedy(model, short, 9)[0])
    assert torch.equal(generated[1], greedy(model, long, 9)[0])


@both_reads
def test_state_has_constant_size_and_rows_can_be_picked(model):
    ids, _ = random_documents(3, 64, seed=6)
    empty = model.model.empty_memory(3)
    for length in (1, 64):
        states = model(ids[:, :length]).memory_states
        assert [[t.shape for t in s] for s in states] == [[t.shape for t in s] for s in empty]
    picked = [s.rows(torch.tensor([2, 0])) for s in states]
    whole = model(ids[:, :5], memory_states=states).logits
    torch.testing.assert_close(model(ids[[2, 0], :5], memory_states=picked).logits, whole[[2, 0]])


def test_ring_overwrites_the_oldest_slot(model):
    """5 slots of 3 tokens: after 24 tokens, 8 slots are written; numbers 3 to 7 remain, number n at index n mod 5."""
    ids, _ = random_documents(1, 24, seed=7)
    state = model(ids).memory_states[0]
    assert state.slots_written.tolist() == [8] and state.position.tolist() == [24]
    for number in range(3, 8):
        before = model(ids[:, : 3 * (number + 1)]).memory_states[0]
        torch.testing.assert_close(state.slots_k[:, :, number % 5], before.slots_k[:, :, number % 5])
        torch.testing.assert_close(state.slots_v[:, :, number % 5], before.slots_v[:, :, number % 5])


@both_reads
def test_slots_and_states_are_detached_on_demand(model):
    ids, _ = random_documents(1, 24, seed=8)
    states = model(ids).memory_states
    assert states[0].slots_k.requires_grad and states[0].h.requires_grad
    assert not any(t.requires_grad for s in states for t in s.detach())
    assert isinstance(states[0].detach(), MemoryState)


def test_long_sequences_are_cut_by_themselves():
    config = MMRecConfig.from_preset("tiny")
    where = dict(batch=1, device=torch.device("cpu"), dtype=torch.float32)
    assert chunk_bounds(32768, None, config, **where) == [slice(0, 32768)]
    assert [s.stop - s.start for s in chunk_bounds(32769, None, config, **where)] == [8192] * 4 + [1]
    assert chunk_bounds(10, 4, config, **where) == [slice(0, 4), slice(4, 8), slice(8, 10)]


def test_auto_chunk_size_follows_free_memory(monkeypatch):
    config = MMRecConfig.from_preset("tiny")

    where = dict(batch=1, device=torch.device("cpu"), dtype=torch.float32)

    class Memory:
        available = 1 << 60

    monkeypatch.setattr("mmrec_train.model.chunking.psutil.virtual_memory", lambda: Memory)
    assert chunk_bounds(100000, "auto", config, **where)[0] == slice(0, 32768)
    Memory.available = 0
    assert chunk_bounds(100000, "auto", config, **where)[0] == slice(0, 256)


def test_solver_report(model):
    ids, _ = random_documents(2, 40, seed=9)
    out = model.float()(ids)
    assert out.solver_iterations.shape == out.solver_residual.shape == (2, 2)
    assert (out.solver_iterations >= 2).all() and (out.solver_residual <= 1e-6).all()


def test_presets_are_buildable():
    for name in PRESETS:
        assert MMRecConfig.from_preset(name).head_dim % 2 == 0

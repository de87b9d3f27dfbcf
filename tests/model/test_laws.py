"""The laws of the model: the literal formulas, the law of chunks, the law of documents, causality."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmrec_train.model import MemoryState, MMRecForCausalLM
from tests.model import literal
from tests.model.conftest import TOPK, both_reads, random_documents, relative_error, small_model


def gradients(model, logits, ids):
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True))


def run_in_chunks(model, ids, reset, cuts):
    """Logits of all tokens and the last memory states, each chunk a call of its own that the memories go into."""
    states, logits = None, []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(ids[:, start:stop], reset=reset[:, start:stop], memory_states=states)
        states = out.memory_states
        logits.append(out.logits)
    return torch.cat(logits, 1), states


@pytest.mark.parametrize("gate", ["dense", "headwise", "none"])
@pytest.mark.parametrize("changes", [{}, {"short_window": 0}, {"memory_across_documents": True}])
def test_equals_the_literal_formulas_with_all_gradients(gate, changes):
    model = small_model(gate=gate, **changes)
    ids, reset = random_documents(2, 40, seed=1, probability=0.06)
    actual = model(ids, reset=reset).logits
    expected = literal.logits(model, ids, reset)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    expected_gradients = gradients(model, expected, ids)
    for name, gradient in gradients(model, actual, ids).items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-8, name


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(memory_slots=37, topk_blocks=2, num_memories=1),
        dict(memory_slots=16, short_window=0),
        dict(segment_len=2, num_memories=4),
        dict(memory_across_documents=True),
    ],
)
def test_topk_equals_the_literal_selection_with_all_gradients(changes):
    model = small_model(**TOPK | changes)
    ids, reset = random_documents(2, 70, seed=1, probability=0.03)
    actual = model(ids, reset=reset).logits
    expected = literal.logits(model, ids, reset)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    dense = small_model(**TOPK | changes | dict(read="dense"))(ids, reset=reset).logits
    assert relative_error(dense, expected) > 1e-4  # the selection matters
    expected_gradients = gradients(model, expected, ids)
    for name, gradient in gradients(model, actual, ids).items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-8, name


@pytest.mark.parametrize("blocks", [6, 100])
@pytest.mark.parametrize("across", [False, True])
def test_topk_of_all_pages_is_the_dense_read(blocks, across):
    changes = TOPK | dict(topk_blocks=blocks, memory_across_documents=across)
    ids, reset = random_documents(2, 80, seed=2, probability=0.03)
    results = []
    for read in ("dense", "topk"):
        model = small_model(**changes | dict(read=read))
        logits, _ = run_in_chunks(model, ids, reset, [7, 50])
        results.append((logits, gradients(model, logits, ids)))
    (dense, dense_gradients), (topk, topk_gradients) = results
    torch.testing.assert_close(topk, dense, rtol=1e-9, atol=1e-9)
    for name, gradient in topk_gradients.items():
        assert relative_error(gradient, dense_gradients[name]) < 1e-8, name


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 47), max_size=8),
    seed=st.integers(0, 1000),
    probability=st.sampled_from([0.0, 0.05, 0.3]),
    across=st.booleans(),
    read=st.sampled_from([{}, TOPK, TOPK | dict(segment_len=2, topk_blocks=2)]),
)
def test_law_of_chunks_in_fp64(cuts, seed, probability, across, read):
    model = small_model(memory_across_documents=across, **read)
    ids, reset = random_documents(2, 48, seed, probability)
    whole = model(ids, reset=reset)
    logits, states = run_in_chunks(model, ids, reset, sorted(cuts))
    torch.testing.assert_close(logits, whole.logits, rtol=1e-9, atol=1e-9)
    for state, expected in zip(states, whole.memory_states, strict=True):
        for name, a, e in zip(MemoryState._fields, state, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    expected_gradients = gradients(model, whole.logits, ids)
    for name, gradient in gradients(model, logits, ids).items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-8, name


@pytest.mark.parametrize(
    "cuts", [range(1, 200), [77], [64, 128], [1, 199]], ids=["token by token", "odd", "even", "ends"]
)
@pytest.mark.parametrize(
    "read", [dict(segment_len=8), TOPK | dict(segment_len=2, topk_blocks=2)], ids=["dense", "topk"]
)
def test_law_of_chunks_in_fp32(cuts, read):
    model = small_model(**dict(hidden_dim=32, memory_slots=16, short_window=16) | read).float()
    ids, reset = random_documents(2, 200, seed=3, probability=0.01)
    whole = model(ids, reset=reset)
    logits, states = run_in_chunks(model, ids, reset, list(cuts))
    assert relative_error(logits, whole.logits) < 1e-5
    for state, expected in zip(states, whole.memory_states, strict=True):
        for name, a, e in zip(MemoryState._fields, state, expected, strict=True):
            assert a.isinf().equal(e.isinf())
            assert relative_error(a.nan_to_num(neginf=0), e.nan_to_num(neginf=0)) < 1e-5, name
    expected_gradients = gradients(model, whole.logits, ids)
    for name, gradient in gradients(model, logits, ids).items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("cuts", [range(1, 96), [33], [32, 64]], ids=["token by token", "odd", "even"])
@pytest.mark.parametrize("read", [{}, TOPK | dict(topk_blocks=3)], ids=["dense", "topk"])
def test_law_of_chunks_in_bf16(cuts, read):
    one_pass, in_chunks = 0.0, 0.0
    for seed in range(4 if read else 1):  # rounding picks one of two pages with nearly equal scores: look at several
        reference = small_model(seed, hidden_dim=32, **read).float()
        model = MMRecForCausalLM(reference.config).bfloat16()
        model.load_state_dict(reference.state_dict())
        reference.load_state_dict(model.state_dict())  # the same rounded weights
        ids, reset = random_documents(4, 96, seed + 4, probability=0.02)
        with torch.no_grad():
            expected = reference(ids, reset=reset).logits
            error = relative_error(model(ids, reset=reset).logits, expected)
            logits, _ = run_in_chunks(model, ids, reset, list(cuts))
        assert 0 < error < 0.1
        one_pass += error
        in_chunks += relative_error(logits, expected)
    assert in_chunks <= 2 * one_pass


@both_reads
def test_chunk_size_of_forward_changes_nothing(model):
    ids, reset = random_documents(2, 50, seed=5)
    whole = model(ids, reset=reset, labels=ids)
    for chunk_size in (1, 7, 50, 64, "auto"):
        out = model(ids, reset=reset, labels=ids, chunk_size=chunk_size)
        torch.testing.assert_close(out.logits, whole.logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.loss, whole.loss, rtol=1e-9, atol=1e-9)
        hidden = model.model(ids, reset=reset, chunk_size=chunk_size).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), whole.logits, rtol=1e-9, atol=1e-9)
    for wrong in (0, "half", 2.5):
        with pytest.raises(ValueError, match="chunk_size"):
            model(ids, chunk_size=wrong)


@both_reads
def test_law_of_documents(model):
    """A document's logits alone, packed behind another one in a lane, and left-padded in a batch."""
    ids, _ = random_documents(1, 60, seed=6)
    first, second = ids[:, :23], ids[:, 23:]
    alone = model(second).logits
    packed_reset = torch.zeros(1, 60, dtype=torch.bool)
    packed_reset[0, [0, 23]] = True
    packed = model(ids, reset=packed_reset).logits[:, 23:]
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)
    padded = torch.cat([first, second], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :23] = 0
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 23:], alone, rtol=1e-9, atol=1e-9)


@both_reads
def test_no_gradient_crosses_a_document_boundary(model):
    ids, _ = random_documents(1, 40, seed=7)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 20] = True
    embeddings = model.model.embed_tokens(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, reset=reset).logits
    (gradient,) = torch.autograd.grad(logits[:, 20:].square().sum(), embeddings)
    assert torch.equal(gradient[:, :20], torch.zeros_like(gradient[:, :20]))
    assert (gradient[:, 20:].norm(dim=-1) > 0).all()


def test_memory_across_documents_shows_slots_and_only_them():
    model = small_model(memory_across_documents=True)
    ids, _ = random_documents(1, 40, seed=8)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 20] = True
    embeddings = model.model.embed_tokens(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, reset=reset).logits
    (gradient,) = torch.autograd.grad(logits[:, 20:].square().sum(), embeddings)
    assert (gradient[:, :18].norm(dim=-1) > 0).any()  # through the slots
    # the unfinished segment of the first document (tokens 18 and 19) wrote nothing and is forgotten
    assert torch.equal(gradient[:, 18:20], torch.zeros_like(gradient[:, 18:20]))


@both_reads
def test_future_tokens_change_nothing(model):
    ids, reset = random_documents(2, 40, seed=9)
    logits = model(ids, reset=reset).logits
    for t in (1, 17, 39):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % model.config.vocab_size
        torch.testing.assert_close(model(changed, reset=reset).logits[:, :t], logits[:, :t], rtol=1e-10, atol=1e-10)
    embeddings = model.model.embed_tokens(ids).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits[:, 17].square().sum(), embeddings)
    assert torch.equal(gradient[:, 18:], torch.zeros_like(gradient[:, 18:]))

"""The laws of the model: the literal formulas, the law of chunks, the law of documents, causality."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmrec_train.model import MemoryState, MMRecForCausalLM
from tests.model import literal
from tests.model.conftest import random_documents, relative_error, small_model


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


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 47), max_size=8),
    seed=st.integers(0, 1000),
    probability=st.sampled_from([0.0, 0.05, 0.3]),
    across=st.booleans(),
)
def test_law_of_chunks_in_fp64(cuts, seed, probability, across):
    model = small_model(memory_across_documents=across)
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
def test_law_of_chunks_in_fp32(cuts):
    model = small_model(hidden_dim=32, segment_len=8, memory_slots=16, short_window=16).float()
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
def test_law_of_chunks_in_bf16(cuts):
    reference = small_model(hidden_dim=32).float()
    model = MMRecForCausalLM(reference.config).bfloat16()
    model.load_state_dict(reference.state_dict())
    reference.load_state_dict(model.state_dict())  # the same rounded weights
    ids, reset = random_documents(4, 96, seed=4, probability=0.02)
    expected = reference(ids, reset=reset).logits
    one_pass = relative_error(model(ids, reset=reset).logits, expected)
    assert 0 < one_pass < 0.1
    logits, _ = run_in_chunks(model, ids, reset, list(cuts))
    assert relative_error(logits, expected) <= 2 * one_pass


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

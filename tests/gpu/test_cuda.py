"""What CPU tests cannot show: the same numbers on a GPU, in 16 bit on tensor cores, and the same bits each time."""

import pytest
import torch
from safetensors.torch import load_file

from mmrec_kernels import gated_recurrence, linear_scan, reference
from mmrec_train.model import MMRecConfig, MMRecForCausalLM
from tests.kernels.test_attention import problem as attention_problem
from tests.kernels.test_attention import run as run_attention
from tests.kernels.test_recurrence import problem, relative_error
from tests.kernels.test_recurrence import run as run_recurrence
from tests.model.conftest import random_documents, small_model
from tests.trainer import ranks


def on_gpu(tensors, dtype):
    return [t.to("cuda", dtype) for t in tensors]


def test_linear_scan_in_fp32():
    z, gamma, _, initial, reset = problem(2, 8192, 256, seed=1, resets=0.001)
    h, final = linear_scan(*on_gpu((gamma, z, initial), torch.float32), reset=reset.cuda())
    expected, expected_final = reference.linear_scan(gamma, z, initial, reset=reset)
    assert relative_error(h.cpu(), expected) < 1e-6
    assert relative_error(final.cpu(), expected_final) < 1e-6


@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_recurrence_and_its_gradients(heads, dtype):
    *inputs, reset = problem(2, 1000, 128, heads, seed=2, resets=0.003)
    expected = run_recurrence(reference.gated_recurrence, inputs, reset)
    actual = run_recurrence(gated_recurrence, on_gpu(inputs, dtype), reset.cuda())
    plain = run_recurrence(reference.gated_recurrence, [t.to(dtype) for t in inputs], reset)
    for a, p, e in zip(actual, plain, expected, strict=True):
        limit = 1e-5 if dtype == torch.float32 else 2 * relative_error(p, e)
        assert relative_error(a.cpu(), e) <= limit


def test_what_does_not_contract_is_finished_exactly():
    *inputs, _ = problem(2, 200, 64, seed=3, gate_scale=4.0, contracting=False)
    inputs[1] = torch.full_like(inputs[1], 0.999)
    result = gated_recurrence(*on_gpu(inputs, torch.float64), max_iterations=6)
    assert (result.residual > 1e-12).all()
    assert relative_error(result.h.cpu(), reference.gated_recurrence(*inputs)[0]) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_attention(dtype):
    from mmrec_kernels import memory_attention

    tensors, options = attention_problem(2, 2, 60, 24, 16, 16, seed=4)
    expected = run_attention(reference.memory_attention, tensors, options)
    plain = run_attention(reference.memory_attention, {n: t.to(dtype) for n, t in tensors.items()}, options)
    gpu_options = {n: o.cuda() if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    actual = run_attention(memory_attention, {n: t.to("cuda", dtype) for n, t in tensors.items()}, gpu_options)
    for a, p, e in zip(actual, plain, expected, strict=True):
        limit = 1e-5 if dtype == torch.float32 else 2 * relative_error(p, e)
        assert relative_error(a.cpu(), e) <= limit


@pytest.mark.parametrize("cuts", [range(1, 96), [33], [32, 64]], ids=["token by token", "odd", "even"])
def test_law_of_chunks(cuts):
    cpu_model = small_model(hidden_dim=64).float()
    ids, reset = (t.cuda() for t in random_documents(4, 96, seed=5, probability=0.02))
    for dtype in (torch.float32, torch.bfloat16):
        model = MMRecForCausalLM(cpu_model.config).to("cuda", dtype).eval()
        model.load_state_dict(cpu_model.state_dict())
        rounded = MMRecForCausalLM(cpu_model.config).cuda().eval()
        rounded.load_state_dict(model.state_dict())
        expected = rounded(ids, reset=reset).logits
        one_pass = relative_error(model(ids, reset=reset).logits, expected)
        states, logits = None, []
        for start, stop in zip([0, *cuts], [*cuts, 96], strict=True):
            out = model(ids[:, start:stop], reset=reset[:, start:stop], memory_states=states)
            states = out.memory_states
            logits.append(out.logits)
        error = relative_error(torch.cat(logits, 1), expected)
        assert error <= (1e-5 if dtype == torch.float32 else 2 * one_pass)


def test_same_inputs_same_bits():
    torch.manual_seed(6)
    config = MMRecConfig.from_preset("tiny", hidden_dim=256, segment_len=8, memory_slots=32)
    model = MMRecForCausalLM(config).to("cuda", torch.bfloat16)
    ids, reset = (t.cuda() for t in random_documents(4, 1500, seed=6, probability=0.01))
    names = ["loss", *(name for name, _ in model.named_parameters())]
    runs = []
    for _ in range(20):
        loss = model(ids, reset=reset, labels=ids).loss
        runs.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for other in runs[1:]:
        assert [n for n, a, b in zip(names, runs[0], other, strict=True) if not torch.equal(a, b)] == []


@pytest.mark.parametrize(
    ("strategy", "precision"), [("zero1", "bf16"), ("zero2", "fp16"), ("zero3", "fp16"), ("zero3", "bf16")]
)
def test_training_in_16_bit_learns_and_resumes_to_the_bit(strategy, precision, config_file, tmp_path):
    overrides = [f"deepspeed.config=ds_configs/{strategy}.json", f"train.precision={precision}", "train.device=gpu"]
    overrides += ["train.steps=40", "checkpoint.every=20"]
    ranks.run(config_file, [*overrides, f"run_dir={tmp_path / 'whole'}"], world_size=1)
    expected = ranks.training_records(tmp_path / "whole")
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.5
    checkpoint = tmp_path / "whole/checkpoints/step_20"
    resumed = [*overrides, f"run_dir={tmp_path / 'resumed'}"]
    ranks.run(config_file, resumed, world_size=1, resume=str(checkpoint))
    actual = ranks.training_records(tmp_path / "resumed")
    assert [(r["step"], r["loss"]) for r in actual] == [(r["step"], r["loss"]) for r in expected if r["step"] > 20]
    weights = [
        load_file(tmp_path / run / "checkpoints/step_40/model/model.safetensors") for run in ("whole", "resumed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

import warnings

import pytest
import torch
from triton import knobs

from mmrec_kernels import backend
from mmrec_kernels.backend import use_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch):
    monkeypatch.setattr(backend, "_reported", set())


def choose(monkeypatch, mode, interpreted):
    if mode is None:
        monkeypatch.delenv(backend.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(backend.VARIABLE, mode)
    monkeypatch.setattr(knobs.runtime, "interpret", interpreted)


@pytest.mark.parametrize(
    ("mode", "interpreted", "device", "expected"),
    [
        (None, False, CPU, False),
        (None, False, CUDA, True),
        ("auto", False, CPU, False),
        ("auto", True, CPU, False),
        ("auto", False, CUDA, True),
        ("torch", True, CPU, False),
        ("torch", False, CUDA, False),
        ("triton", True, CPU, True),
        ("triton", False, CUDA, True),
    ],
)
def test_what_runs(monkeypatch, mode, interpreted, device, expected):
    choose(monkeypatch, mode, interpreted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_triton("scan", device) is expected


def test_the_variable_is_read_at_every_call(monkeypatch):
    choose(monkeypatch, "torch", False)
    assert not use_triton("scan", CUDA)
    monkeypatch.setenv(backend.VARIABLE, "auto")
    assert use_triton("scan", CUDA)


@pytest.mark.parametrize("value", ["", "cuda", "TRITON"])
def test_an_unknown_mode_is_refused_with_those_there_are(monkeypatch, value):
    monkeypatch.setenv(backend.VARIABLE, value)
    with pytest.raises(ValueError, match=f"MMREC_KERNELS is '{value}', expected one of auto, triton, torch"):
        use_triton("scan", CPU)


def test_what_no_kernel_can_do_is_said_once_with_its_reason(monkeypatch):
    choose(monkeypatch, "auto", False)
    with pytest.warns(
        RuntimeWarning, match="scan runs in PyTorch, slowly, because no kernel can run: fp64 inputs"
    ) as raised:
        assert [use_triton("scan", CUDA, "fp64 inputs") for _ in range(3)] == [False] * 3
    assert len(raised) == 1
    with pytest.warns(RuntimeWarning, match="d = 7"):
        use_triton("scan", CUDA, "d = 7")
    with pytest.warns(RuntimeWarning, match="read runs in PyTorch"):
        use_triton("read", CUDA, "fp64 inputs")


@pytest.mark.parametrize(("mode", "device"), [("auto", CPU), ("torch", CUDA), ("torch", CPU)])
def test_who_asks_for_no_kernel_hears_nothing(monkeypatch, mode, device):
    choose(monkeypatch, mode, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use_triton("scan", device, "fp64 inputs")


@pytest.mark.parametrize(
    ("interpreted", "device", "unsupported", "reason"),
    [
        (False, CUDA, "fp64 inputs", "scan: MMREC_KERNELS=triton, but no kernel can run: fp64 inputs"),
        (True, CPU, "fp64 inputs", "no kernel can run: fp64 inputs"),
        (False, CPU, None, "tensors are on cpu, and kernels run on CUDA devices"),
        (True, CUDA, None, "tensors are on cuda, and kernels run on the CPU in Triton's interpreter"),
    ],
)
def test_triton_mode_never_falls_back(monkeypatch, interpreted, device, unsupported, reason):
    choose(monkeypatch, "triton", interpreted)
    with pytest.raises(RuntimeError, match=reason):
        use_triton("scan", device, unsupported)


def test_interpreted_kernels_do_not_run_on_a_gpu(monkeypatch):
    choose(monkeypatch, "auto", True)
    with pytest.warns(RuntimeWarning, match="tensors are on cuda"):
        assert not use_triton("scan", CUDA)

import pytest
import torch

from mmrec_kernels import backend as backends


@pytest.fixture
def device():
    """Where kernels are tested: the GPU if there is one, else the CPU (kernels in Triton's interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Runs the test once with each implementation."""
    monkeypatch.setenv(backends.VARIABLE, request.param)
    return request.param

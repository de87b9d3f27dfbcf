import pytest
import torch

from mmrec_kernels import backend as backends
from mmrec_kernels import dense_triton, headwise_triton, time_tiles
from tests.kernels import fast_interpreter


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Kernels that are interpreted are interpreted faster."""
    if backends.interpreted():
        fast_interpreter.install(monkeypatch)


@pytest.fixture
def device():
    """Where kernels are tested: the GPU if there is one, else the CPU (kernels in Triton's interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Runs the test once with each implementation.

    In the interpreter, which scans element by element, kernels get smaller tiles.
    """
    monkeypatch.setenv(backends.VARIABLE, request.param)
    if backends.interpreted():
        monkeypatch.setattr(headwise_triton, "TILE", 16)
        for module in (time_tiles, dense_triton):
            monkeypatch.setattr(module, "CHANNELS", 4)
            monkeypatch.setattr(module, "STEPS", 16)
        monkeypatch.setattr(dense_triton, "STEPS_MEASURED", 8)
        monkeypatch.setattr(dense_triton, "STEP_CHANNELS", 16)
    return request.param

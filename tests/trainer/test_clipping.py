"""What clipping decides, from the gradients of an optimizer that DeepSpeed leaves alone (ZeRO-0).

The other strategies are compared with a plain loop that clips, in test_training.py.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmrec_train.config.schema import ClipSection
from mmrec_train.trainer.clipping import GradientClipper

GROUPS = ["base", "base", "memory", "memory", "decay", "gate"]  # the component of each parameter group
NO_LIMIT = 1e30


def limits(**values: float) -> ClipSection:
    return ClipSection.model_validate(dict.fromkeys(["global", "memory", "decay", "gate"], NO_LIMIT) | values)


def clip(gradients: list[list[list[float]]], clip_section: ClipSection) -> tuple[list[list[Tensor]], dict[str, float]]:
    """Gradients of each group's parameters as they are used, and the norms that were logged."""
    parameters = [[nn.Parameter(torch.zeros(len(g))) for g in group] for group in gradients]
    optimizer = torch.optim.SGD([dict(params=group) for group in parameters], lr=1.0)
    clipper = GradientClipper(SimpleNamespace(optimizer=optimizer), GROUPS[: len(gradients)], clip_section)
    for group, values in zip(parameters, gradients, strict=True):
        for parameter, value in zip(group, values, strict=True):
            parameter.grad = torch.tensor(value)
    optimizer.step()
    # SGD from zero with rate 1: a parameter is now minus the gradient that it was moved by
    return [[-parameter.detach() for parameter in group] for group in parameters], clipper.norms


def norm(*groups: list[Tensor]) -> float:
    return math.sqrt(sum(gradient.double().square().sum().item() for group in groups for gradient in group))


def test_by_hand() -> None:
    gradients = [[[3.0], [0.0, 4.0]], [[0.0]], [[6.0]], [[8.0]], [[1.0]], [[0.5]]]
    used, norms = clip(gradients, limits(**{"global": 13.0, "memory": 5.0, "decay": 2.0, "gate": 0.1}))
    assert norms == pytest.approx(
        {
            "grad_norm": math.sqrt(25 + 100 + 1 + 0.25),
            "grad_norm_memory": 10.0,
            "grad_norm_decay": 1.0,
            "grad_norm_gate": 0.5,
        }
    )
    # memory has two groups with one norm, halved together; decay is within its limit; then the whole is within 13
    assert [[g.tolist() for g in group] for group in used] == [
        [[3.0], [0.0, 4.0]],
        [[0.0]],
        [[3.0]],
        [[4.0]],
        [[1.0]],
        [[pytest.approx(0.1)]],
    ]


def test_the_whole_is_clipped_after_its_components() -> None:
    gradients = [[[3.0]], [[0.0]], [[0.0]], [[400.0]]]
    used, norms = clip(gradients, limits(**{"global": 1.0, "memory": 4.0}))
    assert norms["grad_norm"] == pytest.approx(math.hypot(3, 400))  # as it was
    assert [g.item() for group in used for g in group] == pytest.approx([0.6, 0.0, 0.0, 0.8])  # (3, 4) / 5


values = st.floats(-100, 100, width=32)
groups_of_gradients = st.lists(
    st.lists(st.lists(values, min_size=1, max_size=3), min_size=1, max_size=2),
    min_size=len(GROUPS),
    max_size=len(GROUPS),
)
bounds = st.fixed_dictionaries({name: st.floats(0.01, 1000) for name in ("global", "memory", "decay", "gate")})


@given(groups_of_gradients, bounds)
def test_as_torch_clips_one_component_after_the_other(
    gradients: list[list[list[float]]], bound: dict[str, float]
) -> None:
    used, norms = clip(gradients, limits(**bound))
    parameters = [[nn.Parameter(torch.zeros(len(g))) for g in group] for group in gradients]
    for group, given_ in zip(parameters, gradients, strict=True):
        for parameter, value in zip(group, given_, strict=True):
            parameter.grad = torch.tensor(value)
    everything = [parameter for group in parameters for parameter in group]
    whole = torch.nn.utils.get_total_norm([p.grad for p in everything if p.grad is not None])
    assert norms["grad_norm"] == pytest.approx(whole.item(), rel=1e-5, abs=1e-30)
    for component in ("memory", "decay", "gate"):
        members = [p for group, name in zip(parameters, GROUPS, strict=True) if name == component for p in group]
        before = torch.nn.utils.clip_grad_norm_(members, bound[component])
        assert norms[f"grad_norm_{component}"] == pytest.approx(before.item(), rel=1e-5, abs=1e-30)
        clipped = [group for group, name in zip(used, GROUPS, strict=True) if name == component]
        assert norm(*clipped) <= bound[component] * (1 + 1e-5)
    torch.nn.utils.clip_grad_norm_(everything, bound["global"])
    assert norm(*used) <= bound["global"] * (1 + 1e-5)
    for group, used_group in zip(parameters, used, strict=True):
        for parameter, gradient in zip(group, used_group, strict=True):
            # torch divides by norm + 1e-6
            torch.testing.assert_close(gradient, parameter.grad, rtol=3e-4, atol=1e-6)


def test_gradients_within_the_limits_are_used_to_the_bit() -> None:
    gradients = [[[0.1, 0.2]], [[0.3]], [[0.7]], [[0.0]], [[0.01]], [[0.02]]]
    used, _ = clip(gradients, limits())
    assert [[g.tolist() for g in group] for group in used] == [
        [torch.tensor(g).tolist() for g in group] for group in gradients
    ]


@pytest.mark.parametrize("group, component", [(0, None), (2, "memory"), (4, "decay"), (5, "gate")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_its_norm(group: int, component: str | None, bad: float) -> None:
    gradients = [[[1.0]] for _ in GROUPS]
    gradients[group] = [[bad]]
    _, norms = clip(gradients, ClipSection())
    bad_keys = {"grad_norm"} | ({f"grad_norm_{component}"} if component else set())
    assert {key for key, value in norms.items() if not math.isfinite(value)} == bad_keys


def test_a_parameter_without_gradient_does_not_count() -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([dict(params=parameters)], lr=1.0)
    clipper = GradientClipper(SimpleNamespace(optimizer=optimizer), ["base"], limits(**{"global": 1.0}))
    parameters[0].grad = torch.tensor([4.0])
    optimizer.step()
    assert clipper.norms["grad_norm"] == 4.0
    assert [p.item() for p in parameters] == [-1.0, 0.0]

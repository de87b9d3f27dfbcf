import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec_train.data.permutation import Permutation


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 1000))
def test_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    image = Permutation(size, f"{seed}/{epoch}")(np.arange(size))
    assert sorted(image.tolist()) == list(range(size))


@given(st.integers(2, 10**12), st.integers(0, 100), st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_parts_agree_with_the_whole_for_any_size(size: int, seed: int, positions: list[int]) -> None:
    permutation = Permutation(size, f"{seed}/1")
    chosen = np.array([position % size for position in positions])
    together = permutation(chosen)
    assert together.tolist() == [int(permutation(chosen[i : i + 1])[0]) for i in range(len(chosen))]
    assert ((together >= 0) & (together < size)).all()
    assert len(set(together.tolist())) == len(set(chosen.tolist()))


def test_is_the_same_on_every_machine() -> None:
    """Resuming elsewhere must find the same order: these values may never change."""
    assert Permutation(10, "7/0")(np.arange(10)).tolist() == [7, 1, 5, 3, 0, 8, 2, 6, 9, 4]
    assert Permutation(10**9, "7/3")(np.arange(3)).tolist() == [546019378, 602870337, 987904229]


def test_another_key_is_another_order() -> None:
    orders = {
        tuple(Permutation(50, f"{seed}/{epoch}")(np.arange(50)).tolist()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


@pytest.mark.parametrize("size", [2, 3, 5, 17])
def test_every_place_is_about_equally_likely(size: int) -> None:
    """Chi-squared over 2000 epochs: where the first, a middle and the last position go."""
    images = np.array([Permutation(size, f"1/{epoch}")(np.arange(size)) for epoch in range(2000)])
    for position in {0, size // 2, size - 1}:
        counts = np.bincount(images[:, position], minlength=size)
        expected = 2000 / size
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        # Mean size - 1, variance 2 (size - 1): five standard deviations, and fixed seeds.
        assert chi_squared < size - 1 + 5 * (2 * (size - 1)) ** 0.5


def test_neighbours_are_torn_apart() -> None:
    image = Permutation(10_000, "0/0")(np.arange(10_000))
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(image)) == 1) < 0.002

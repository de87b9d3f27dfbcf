import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec_train.monitoring.formatting import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (9.5, "9.5"),
        (950, "950"),
        (999.4, "999"),
        (999.9, "1.00k"),
        (12_345, "12.3k"),
        (999_999, "1.00M"),
        (123_456_789, "123M"),
        (7.9e9, "7.90B"),
        (1.5e12, "1.50T"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_count(value: float, expected: str) -> None:
    assert format_count(value) == expected


@given(st.floats(1e3, 9e14))
def test_a_count_is_right_to_three_digits(value: float) -> None:
    text = format_count(value)
    unit = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[text[-1]]
    assert float(text[:-1]) * unit == pytest.approx(value, rel=5.1e-3)
    assert len(text) <= 5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (512, "512 B"),
        (1024, "1.0 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (3.25 * 2**30, "3.2 GiB"),
        (2**41, "2.0 TiB"),
    ],
)
def test_bytes(value: float, expected: str) -> None:
    assert format_bytes(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (3 * 3600 + 62, "3:01:02"),
        (2 * 86400 + 4 * 3600 + 306, "2d 04:05:06"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected

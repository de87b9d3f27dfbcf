import math
import re

import pytest

from mmrec_train.monitoring import Record, loss_curve


def falling(steps: int) -> list[Record]:
    return [{"step": step, "loss": 2.0 + 8.0 * 0.98**step} for step in range(1, steps + 1)]


def test_the_curve_falls_from_the_upper_left_to_the_lower_right() -> None:
    lines = loss_curve(falling(400), width=80, height=20).splitlines()
    assert "▄▀ training" in lines[0]
    canvas = [re.sub("^[^┤│]*[┤│]", "", line).removesuffix("│") for line in lines[2:-3]]
    top = next(line for line in canvas if line.strip())
    bottom = next(line for line in reversed(canvas) if line.strip())
    assert len(top) - len(top.lstrip()) < 3
    assert len(bottom.rstrip()) > 70
    assert max(map(len, lines)) <= 80
    assert len(lines) == 20
    assert lines[-2].split() == ["50", "100", "150", "200", "250", "300", "350", "400"]


def test_validation_has_its_own_mark_for_each_point() -> None:
    records = falling(100) + [{"step": step, "validation_loss": 12.0 - step / 20} for step in (0, 50, 100)]
    assert loss_curve(records).count("●") == 1 + 3  # one in the title


def test_the_curve_is_plain_text_whatever_was_drawn_before() -> None:
    first = loss_curve(falling(50))
    loss_curve([{"step": 7, "validation_loss": 100.0}])
    assert loss_curve(falling(50)) == first
    assert not [c for c in first if not c.isprintable() and c != "\n"]


@pytest.mark.parametrize("height", [8, 22])
@pytest.mark.parametrize("key", ["loss", "validation_loss"])
def test_one_point_is_enough(key: str, height: int) -> None:
    drawing = loss_curve([{"step": 3, key: 5.0}], height=height)
    assert sum(line.count("●") + len(set(line) & set("▘▝▖▗")) for line in drawing.splitlines()[1:]) == 1
    assert drawing.splitlines()[-2].strip() == "3"


def test_numbers_that_are_not_finite_are_left_out() -> None:
    bad: list[Record] = [{"step": 5000, "loss": math.nan}, {"step": 6000, "validation_loss": math.inf}]
    assert loss_curve(falling(50) + bad) == loss_curve(falling(50))
    assert loss_curve(bad) == "(no finite loss was logged)"

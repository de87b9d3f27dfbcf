import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec_train.errors import UserError
from mmrec_train.monitoring.metrics_file import FILE_NAME, MetricsFile, Record, decode, encode, read_metrics

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text(min_size=1).filter(lambda key: key not in ("step", "nonfinite"))
records = st.builds(
    lambda step, rest: {"step": step, **rest},
    st.integers(0, 10**9),
    st.dictionaries(keys, scalars, max_size=6),
)


def strict_json(text: str) -> Any:
    """JSON as the standard has it: Python's reader would also take NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def write(run_dir: Path, records: list[Record], resume_step: int = 0) -> None:
    file = MetricsFile(run_dir, resume_step)
    for record in records:
        file.append(record)
    file.close()


@given(records)
def test_every_record_comes_back_from_one_line_of_strict_json(record: Record) -> None:
    line = encode(record)
    assert "\n" not in line
    assert strict_json(line)["step"] == record["step"]
    assert repr(sorted(decode(line).items())) == repr(sorted(record.items()))  # repr: NaN is not equal to itself


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    write(tmp_path, [{"step": 3, "loss": math.nan, "grad_norm": -math.inf, "mfu": None, "tokens": 7}])
    assert strict_json((tmp_path / FILE_NAME).read_text()) == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "mfu": None,
        "tokens": 7,
        "nonfinite": {"loss": "nan", "grad_norm": "-inf"},
    }
    (record,) = map(dict, read_metrics(tmp_path))
    loss = record.pop("loss")
    assert isinstance(loss, float)
    assert math.isnan(loss)
    assert record == {"step": 3, "grad_norm": -math.inf, "mfu": None, "tokens": 7}


def test_a_tensor_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, 0)
    with pytest.raises(TypeError):
        file.append({"step": 1, "loss": torch.tensor(1.0)})  # type: ignore[dict-item]
    file.append({"step": 2, "loss": 1.0})
    file.close()
    assert read_metrics(tmp_path) == [{"step": 2, "loss": 1.0}]


def test_a_resumed_run_drops_what_it_will_log_again(tmp_path: Path) -> None:
    write(tmp_path, [{"step": step, "loss": float(step)} for step in range(1, 11)])
    write(tmp_path, [{"step": step, "loss": -float(step)} for step in range(7, 13)], resume_step=6)
    read = read_metrics(tmp_path)
    assert [record["step"] for record in read] == list(range(1, 13))
    assert [record["loss"] for record in read] == [1, 2, 3, 4, 5, 6, -7, -8, -9, -10, -11, -12]


@given(st.lists(records, max_size=8), st.integers(1, 10**9))
def test_truncation_keeps_exactly_the_steps_up_to_the_resumed_one(
    tmp_path_factory: pytest.TempPathFactory, logged: list[Record], resume_step: int
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    write(run_dir, logged)
    MetricsFile(run_dir, resume_step).close()
    kept = [record for record in logged if isinstance(step := record["step"], int) and step <= resume_step]
    assert list(map(repr, read_metrics(run_dir))) == [repr(decode(encode(record))) for record in kept]
    assert [path.name for path in run_dir.iterdir()] == [FILE_NAME]  # no temporary file is left


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, [{"step": 0, "validation_loss": 9.0}, {"step": 1, "loss": 8.0}])
    write(tmp_path, [{"step": 0, "validation_loss": 7.0}], resume_step=0)
    assert read_metrics(tmp_path) == [{"step": 0, "validation_loss": 7.0}]


def test_a_line_cut_by_a_kill_does_not_count_and_is_removed_on_resume(tmp_path: Path) -> None:
    write(tmp_path, [{"step": 1, "loss": 8.0}])
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 8.0}]
    write(tmp_path, [{"step": 2, "loss": 7.0}], resume_step=1)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 8.0}, {"step": 2, "loss": 7.0}]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1.0}', '{"step": "1"}', "\x00\x00", ""])
def test_any_other_broken_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE_NAME).write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is no metrics record"):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_is_a_plain_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path)


def test_records_are_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, 0)
    file.append({"step": 1, "loss": 8.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 8.0}]
    file.close()

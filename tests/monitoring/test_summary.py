import math

from mmrec_train.monitoring import Record, summarize


def test_rows_of_a_run() -> None:
    records: list[Record] = [{"step": 0, "validation_loss": 9.0, "validation_perplexity": math.exp(9.0)}]
    records += [
        {
            "step": step,
            "tokens": step * 1000,
            "loss": 9.0 - step,
            "tokens_per_second": rate,
            "step_seconds": 1000 / rate,
            "data_wait_seconds": 1 / rate,
            "mfu": rate / 1e4,
            "peak_memory_bytes": step * 2**30,
            "solver_iterations": 4 + step,
            "skipped": step - 1,
        }
        for step, rate in ((1, 10.0), (2, 2000.0), (3, 3000.0))
    ]
    records += [
        {"step": 3, "validation_loss": 6.5, "validation_perplexity": 665.14},
        {"step": 4, "loss": math.nan},
    ]
    assert summarize(records) == [
        ("steps", "4"),
        ("tokens", "3.00k"),
        ("training loss", "8.0000 → 6.0000"),
        ("validation loss", "9.0000 → 6.5000"),
        ("validation perplexity", "665.14"),
        ("tokens/s", "2.00k"),
        ("waiting for data", "0.10% of a step"),
        ("MFU", "20.0%"),
        ("peak memory", "3.0 GiB"),
        ("solver iterations", "6.0, at most 7"),
        ("skipped steps", "2"),
    ]


def test_what_was_never_recorded_is_left_out() -> None:
    assert summarize([]) == [("steps", "0")]
    assert summarize([{"step": 12, "mfu": None, "loss": math.inf}]) == [("steps", "12")]

"""Sweeps: which runs a sweep file asks for (`specification`), and what has become of them (`results`).

Neither knows how a trial is run: launch/sweep.py runs them here, one after another.
"""

from mmrec_train.sweep.results import Result, read_result, record_exit, sorted_results, write_results
from mmrec_train.sweep.specification import Sweep, Trial, load_sweep

__all__ = [
    "Result",
    "Sweep",
    "Trial",
    "load_sweep",
    "read_result",
    "record_exit",
    "sorted_results",
    "write_results",
]

"""From text to a data set, for launch/prepare_data.py: `ingest` is where it comes together.

What worker processes import (`workers`, `records`, `filters`) stays apart from mmrec_train.data and its torch: a worker
starts in a fraction of a second, and is small.
"""

"""From records to token ids: what the worker processes of launch/prepare_data.py do.

Apart from mmrec_train.data, which imports torch: a worker starts in a fraction of a second, and is small.
"""

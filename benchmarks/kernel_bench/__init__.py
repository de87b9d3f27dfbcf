"""Parts of benchmarks/kernels.py: problems, baselines, measuring, and the curve over T."""

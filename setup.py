"""Where the two packages of this distribution live; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["mmrec_train", "mmrec_train.*"])
    + find_packages("kernels", include=["mmrec_kernels", "mmrec_kernels.*"]),
    package_dir={"mmrec_kernels": "kernels/mmrec_kernels"},
)

"""Maps the source tree to packages: fastattn/ as it lies, and kernels/ as fastattn.kernels."""

from setuptools import find_packages, setup

KERNELS = "fastattn.kernels"

setup(
    packages=[
        *find_packages(include=["fastattn", "fastattn.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
)

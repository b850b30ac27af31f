"""Build script: maps triton_kernels/ to pydecode.triton_kernels, and bench/ to pydecode.bench.

The Triton repository ships a top-level package called triton_kernels that vLLM and SGLang import;
ours must never answer to that name, so the folder is installed under pydecode only.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["pydecode", "pydecode.*"]),
        "pydecode.triton_kernels",
        "pydecode.triton_kernels.configurations",
        "pydecode.bench",
        "pydecode.bench.peers",
        "pydecode.bench.static",
    ],
    package_dir={"pydecode.triton_kernels": "triton_kernels", "pydecode.bench": "bench"},
    package_data={
        "pydecode": ["py.typed"],
        "pydecode.triton_kernels.configurations": ["*.json"],
    },
)

"""Build script: maps the folder triton_kernels/ to the package pydecode.triton_kernels.

The Triton repository ships a top-level package called triton_kernels that vLLM and SGLang import;
ours must never answer to that name, so the folder is installed under pydecode only.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["pydecode", "pydecode.*"]), "pydecode.triton_kernels"],
    package_dir={"pydecode.triton_kernels": "triton_kernels"},
    package_data={"pydecode": ["py.typed"]},
)

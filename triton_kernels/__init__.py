"""Triton kernels, one file an op, installed as ``pydecode.triton_kernels``.

No kernel has landed yet: every op runs on the ``reference`` backend, and ``pydecode.backends()``
says so.
"""

"""Triton kernels, one file an op, installed as ``pydecode.triton_kernels``.

A face (``tree_attention.py``) takes the schema's arguments; what it launches has files of its own
(``decode_attention.py``, ``decode_kernel.py``), and so has what kernels share (``numerics.py``).
"""

"""The reference backend: PyTorch on any device and any float dtype, fp64 included.

It is the specification: one function an op, which reads like the formula in the paper, with the
schema's arguments in the schema's order (less ``backend``).
"""

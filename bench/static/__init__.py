"""The parts of ``python -m pydecode.bench.static_report``: what binaries hold, proven with no GPU.

``targets`` (the hardware's limits), ``rules`` (what to expect), ``launches`` (what is compiled, and
whether public calls stay within it), ``binary`` (what a compiled kernel holds), ``examine`` (one
Triton launch), ``cuda`` (one CUDA source), ``pool`` (all of them, in other processes).
"""
